"""The words between scheduler and workers: commands down, events up.

Frozen and small, so that they can be logged, compared in tests, and sent between processes. Tensors never travel in
them; decoded frames do, because the controller writes them.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from pipedit.core.blocks import BlockPlan
from pipedit.core.parallel import ParallelConfig
from pipedit.core.request import VideoRequest
from pipedit.core.spans import Span

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Base of what the scheduler asks of a group of ranks. All ranks of the group get the same command."""

    request_id: str
    ranks: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encode(Command):
    """Turn the prompt into conditioning and keep it under the request's id."""

    request: VideoRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchanging(Command):
    """Base of what ranks may do together, each waiting for messages of the others.

    `epoch` counts how often such a command has failed so far. Messages may then be left over between ranks, so a rank
    that hears of a new epoch drops the process groups of the old one first.
    """

    request: VideoRequest
    epoch: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aco:
    """Attention co-processing (PipeDiT, section 3.3): decoders that are idle take attention heads of a step.

    `helpers`: for each Ulysses group of the denoisers, in order, the ranks that help it. `heads`: the shares of such a
    group's members, its denoisers first, the same for each group. `text_tokens`: for each forward pass of the step, the
    text tokens that take part in self-attention (0 where text is cross-attended).
    """

    helpers: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...]
    text_tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoise(Exchanging):
    """Run `num_steps` denoising steps from `step` on (0 draws the noise first); `ranks` share them as `parallel` says.

    With `aco`, `ranks` ends with the helpers. Before step 0 the conditioning is fetched from the rank `conditioning_at`
    (None: this rank has encoded the prompt itself).
    """

    step: int
    num_steps: int = 1
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    conditioning_at: int | None = None
    aco: Aco | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(Exchanging):
    """Decode `num_chunks` chunks of the clean latents from `chunk` on. Chunks come in order, because causal VAEs carry
    state. Before chunk 0 the latents are fetched from the rank `latents_at` (None: this rank has denoised them)."""

    chunk: int
    num_chunks: int = 1
    latents_at: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiseBlocks(Exchanging):
    """Run `count` operations from number `first` on of the list that `blocks` lays down, as one stage of a layer
    pipeline. Every stage gets such commands for itself, and they wait for each other inside them.

    Before the first one the conditioning is fetched as in Denoise. `decoded`: so many blocks have reached the decoder
    and need no longer be kept. `resume`: the video goes on from this snapshot (see SaveBlocks), which was taken at
    `first` operations.
    """

    first: int
    count: int
    blocks: BlockPlan
    conditioning_at: int | None = None
    decoded: int = 0
    resume: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeBlock(Exchanging):
    """Fetch the clean latents of block number `block` from the rank `latents_at`, and decode whatever can be decoded
    now. Blocks come in order. `resume`: decoding goes on from this snapshot (see SaveBlocks), which was taken when
    `block` blocks were decoded."""

    block: int
    blocks: BlockPlan
    latents_at: int
    resume: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveBlocks(Command):
    """Write everything that the rank needs to go on with the video from here into its file of a snapshot, the folder
    `path`: the denoising after `at` operations, which all stages have run and none has exceeded, and the decoding of
    `decoded` blocks. Nobody is at work on the video meanwhile."""

    request: VideoRequest
    blocks: BlockPlan
    path: str
    at: int
    decoded: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release(Command):
    """Forget everything kept for the request. Legal at any time. `failed`: some rank has failed at it, so what is on
    its way between ranks never comes."""

    failed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Base of what a rank reports. `rank` finished the matching command for the request.

    `peak_bytes`: the most memory that the worker has held so far, on its device (on the CPU: resident in its process);
    0 where nobody measured.
    """

    request_id: str
    rank: int
    spans: tuple[Span, ...] = ()
    peak_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded(Event):
    """Conditioning is ready. `text_tokens` as in Aco."""

    text_tokens: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """Denoising is done up to and with step `step`."""

    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkDecoded(Event):
    """Decoding is done up to and with chunk `chunk`. Frames of the command's chunks: uint8 [F, H, W, 3] on the rank
    that answers for the output, None on the others."""

    chunk: int
    frames: "np.ndarray[Any, np.dtype[np.uint8]] | None" = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlocksDone(Event):
    """The stage has run `done` operations in all. From the first stage: so many blocks are `finished` in order of time,
    and their clean latents can be fetched."""

    done: int
    finished: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDecoded(Event):
    """Decoding is done up to and with block number `block`. `frames`: those that are final now, uint8 [F, H, W, 3];
    None where there are none yet."""

    block: int
    frames: "np.ndarray[Any, np.dtype[np.uint8]] | None" = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlocksSaved(Event):
    """The rank's file of a snapshot is whole and on disk, `num_bytes` long. `finished` as in BlocksDone."""

    at: int
    num_bytes: int
    finished: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Released(Event):
    """Nothing is kept for the request any more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandFailed(Event):
    """The command raised; the rank itself lives on. `doing` says what it was at, in words."""

    doing: str
    error: Exception
