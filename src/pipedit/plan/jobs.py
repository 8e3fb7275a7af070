"""One request on its way through the phases. Knows no ranks' order and no policy."""

import dataclasses
import enum
from collections.abc import Hashable

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan
from pipedit.core.parallel import ParallelConfig
from pipedit.core.request import VideoRequest
from pipedit.core.snapshots import Saving, Snapshot


class Phase(enum.StrEnum):
    QUEUED = "queued"
    ENCODING = "encoding"
    ENCODED = "encoded"  # waits for the denoisers
    DENOISING = "denoising"
    DENOISED = "denoised"  # clean latents wait for a decoder
    DECODING = "decoding"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


ENDS = frozenset({Phase.DONE, Phase.CANCELLED, Phase.FAILED})
_BREAKS = frozenset({Phase.CANCELLED, Phase.FAILED, Phase.QUEUED})  # QUEUED: again, because the workers were lost
LEGAL_TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.QUEUED: frozenset({Phase.ENCODING, Phase.CANCELLED}),
    Phase.ENCODING: _BREAKS | {Phase.ENCODED},
    Phase.ENCODED: _BREAKS | {Phase.DENOISING},
    Phase.DENOISING: _BREAKS | {Phase.DENOISED},
    Phase.DENOISED: _BREAKS | {Phase.DECODING},
    Phase.DECODING: _BREAKS | {Phase.DONE},
    Phase.DONE: frozenset(),
    Phase.CANCELLED: frozenset(),
    Phase.FAILED: frozenset(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How much a request asks for: denoising steps and decode chunks, all at least 1.

    The denoisers share each step as `parallel` says. `num_chunks`: with one decoder; `num_chunks_spread`: where all
    decoders share each chunk (None: as many). `heads`: attention heads that may be dealt out to helpers, 0 where they
    may not. `shape`: equal for requests whose steps take equally long. Higher `priority` goes first. `blocks`: the
    video is made block by block; only then, `saving` tells where it is saved on the way, and `resume` from where it
    goes on.
    """

    num_steps: int
    num_chunks: int
    num_chunks_spread: int | None = None
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    heads: int = 0
    shape: Hashable = None
    priority: int = 0
    blocks: BlockPlan | None = None
    saving: Saving | None = None
    resume: Snapshot | None = None

    def chunks(self, decoders: int) -> int:
        return self.num_chunks if decoders == 1 or self.num_chunks_spread is None else self.num_chunks_spread


@dataclasses.dataclass(kw_only=True)
class Job:
    """One request on its way. `done` counts finished units (steps, chunks) of the current phase."""

    request_id: str
    request: VideoRequest
    work: Work
    number: int  # in order of submission
    phase: Phase = Phase.QUEUED
    done: int = 0
    in_flight: messages.Command | None = None
    awaited: set[int] = dataclasses.field(default_factory=set)  # ranks that still owe the answer to it
    seconds: float = 0.0  # the longest that a rank has reported for it
    unit_s: float = 0.0  # what each step or chunk of the phase took in the last command; 0: not known yet
    holders: set[int] = dataclasses.field(default_factory=set)  # ranks that keep something for the request
    encoded_at: int | None = None
    text_tokens: tuple[int, ...] = ()
    decoders: tuple[int, ...] = ()
    attempts: int = 0  # times that its denoising has begun
    overtaken: int = 0  # times that a younger request went first
    is_promoted: bool = False  # overtaken too often: goes before everything now
    cancel_wanted: bool = False
    failure: messages.CommandFailed | None = None  # the first one
    snapshot: Snapshot | None = None  # the newest one that is whole

    def order(self) -> tuple[bool, int, int]:
        """The smaller, the earlier its turn. Promoted ones go by age alone, so that none of them waits for ever."""
        return (not self.is_promoted, 0 if self.is_promoted else -self.work.priority, self.number)

    @property
    def is_over(self) -> bool:
        return self.phase in ENDS

    @property
    def is_ready(self) -> bool:
        """Whether it can be given a command."""
        return self.in_flight is None and not self.cancel_wanted and not self.is_over

    def move(self, phase: Phase) -> None:
        assert phase in LEGAL_TRANSITIONS[self.phase], f"{self.phase} -> {phase} is not legal"
        self.phase, self.done, self.unit_s = phase, 0, 0.0

    def begin_again(self) -> None:
        """What the workers had of it is gone."""
        self.move(Phase.QUEUED)
        self.in_flight, self.encoded_at, self.text_tokens, self.decoders = None, None, (), ()
        self.awaited.clear()
        self.holders.clear()
