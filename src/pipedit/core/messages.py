"""The words between scheduler and workers: commands down, events up.

Frozen and small, so that they can be logged, compared in tests, and sent between processes. Tensors never travel in
them; decoded frames do, because the controller writes them.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

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
class Denoise(Command):
    """Run denoising step `step` (0 draws the noise first); the ranks share it as `parallel` says."""

    step: int
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(Command):
    """Decode chunk `chunk` of the clean latents. Chunks come in order, because causal VAEs carry state."""

    chunk: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release(Command):
    """Forget everything kept for the request. Legal at any time.

    `after_failure`: some rank failed in the midst of a command, so that messages between ranks may be left over."""

    after_failure: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Base of what a rank reports. `rank` finished the matching command for the request."""

    request_id: str
    rank: int
    spans: tuple[Span, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded(Event):
    """Conditioning is ready."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """Denoising step `step` is done."""

    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkDecoded(Event):
    """Frames of chunk `chunk`: uint8 [F, H, W, 3] on the rank that answers for the output, None on the others."""

    chunk: int
    frames: "np.ndarray[Any, np.dtype[np.uint8]] | None" = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Released(Event):
    """Nothing is kept for the request any more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandFailed(Event):
    """The command raised; the rank itself lives on. `doing` says what it was at, in words."""

    doing: str
    error: Exception
