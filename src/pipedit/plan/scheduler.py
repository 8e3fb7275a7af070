"""The request scheduler: a state machine without I/O. Events in, commands out; no clock, no threads, no torch.

Two drivers run it: the engine (real workers, real time) and, later, the simulator (a cost model, virtual time). What
it decides is a pure function of the order of calls, so every policy can be tested in milliseconds.

Usage: `submit` and `cancel` state wishes, `receive` reports what a rank did; after each, `next_commands` returns what
to send now. A rank has at most one command in flight.
"""

import dataclasses
import enum
from collections.abc import Iterator

from pipedit.core import messages
from pipedit.core.errors import WorkerDiedError
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Placement, Role
from pipedit.core.request import VideoRequest


class Phase(enum.StrEnum):
    QUEUED = "queued"
    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


_ENDS = frozenset({Phase.DONE, Phase.CANCELLED, Phase.FAILED})
LEGAL_TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.QUEUED: frozenset({Phase.ENCODING, Phase.CANCELLED}),
    Phase.ENCODING: frozenset({Phase.DENOISING, Phase.CANCELLED, Phase.FAILED}),
    Phase.DENOISING: frozenset({Phase.DECODING, Phase.CANCELLED, Phase.FAILED}),
    Phase.DECODING: frozenset({Phase.DONE, Phase.CANCELLED, Phase.FAILED}),
    Phase.DONE: frozenset(),
    Phase.CANCELLED: frozenset(),
    Phase.FAILED: frozenset(),
}
_ROLE = {
    Phase.QUEUED: Role.ENCODER,
    Phase.ENCODING: Role.ENCODER,
    Phase.DENOISING: Role.DENOISER,
    Phase.DECODING: Role.DECODER,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How much a request asks for: denoising steps and decode chunks, both at least 1. The denoisers share each step as
    `parallel` says."""

    num_steps: int
    num_chunks: int
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)


@dataclasses.dataclass(kw_only=True)
class Job:
    """One request on its way. `done` counts finished units (steps, chunks) of the current phase."""

    request_id: str
    request: VideoRequest
    work: Work
    phase: Phase = Phase.QUEUED
    done: int = 0
    awaited: set[int] = dataclasses.field(default_factory=set)  # ranks that still owe the answer to a command
    cancel_wanted: bool = False
    failure: messages.CommandFailed | None = None  # the first one

    @property
    def is_over(self) -> bool:
        return self.phase in _ENDS

    def move(self, phase: Phase) -> None:
        assert phase in LEGAL_TRANSITIONS[self.phase], f"{self.phase} -> {phase} is not legal"
        self.phase, self.done = phase, 0


class RequestScheduler:
    """First come, first served; an older request always wins a free group.

    On one colocated group this is serial generation. On disjoint groups the same rule pipelines requests: the decoder
    works on request k while the denoiser has k + 1.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._jobs: dict[str, Job] = {}
        self._busy: dict[int, str] = {}  # rank -> request whose command it is running
        self._to_release: list[messages.Release] = []  # one for each rank

    def submit(self, request_id: str, request: VideoRequest, work: Work) -> None:
        assert request_id not in self._jobs, f"request id {request_id} is already in use"
        assert work.num_steps >= 1 and work.num_chunks >= 1, work
        self._jobs[request_id] = Job(request_id=request_id, request=request, work=work)

    def cancel(self, request_id: str) -> None:
        """Ends the request as soon as its command in flight is answered. No effect on a request that is over."""
        job = self._jobs.get(request_id)
        if job is None or job.is_over:
            return
        job.cancel_wanted = True
        self._settle(job)

    def receive(self, event: messages.Event) -> None:
        """Takes a rank's report. Group commands count as done when every rank has reported."""
        if self._busy.get(event.rank) == event.request_id:
            del self._busy[event.rank]
        job = self._jobs.get(event.request_id)
        if job is None or isinstance(event, messages.Released):
            return
        job.awaited.discard(event.rank)
        if isinstance(event, messages.CommandFailed):
            job.failure = job.failure or event
        if not job.awaited:
            if job.failure is None:
                job.done += 1
            self._settle(job)

    def lose_workers(self, error: WorkerDiedError) -> None:
        """All ranks are gone, and with them what they kept: fails every request that has begun. Requests that still
        wait for their turn stay, for fresh workers."""
        self._busy.clear()
        self._to_release.clear()
        for job in self._jobs.values():
            if job.is_over or job.phase is Phase.QUEUED:
                continue
            job.awaited.clear()
            if job.cancel_wanted and job.failure is None:
                job.move(Phase.CANCELLED)
                continue
            job.failure = job.failure or messages.CommandFailed(
                request_id=job.request_id, rank=error.rank, doing=error.doing, error=error
            )
            job.move(Phase.FAILED)

    def abandon(self) -> None:
        """There will be no workers any more, so nobody answers what is in flight: ends every request."""
        self._busy.clear()
        self._to_release.clear()
        for job in self._jobs.values():
            if not job.is_over:
                job.awaited.clear()
                job.move(Phase.FAILED if job.failure is not None else Phase.CANCELLED)

    def job(self, request_id: str) -> Job:
        return self._jobs[request_id]

    def forget(self, request_id: str) -> None:
        """Drops the record of a request that is over."""
        assert self._jobs[request_id].is_over
        del self._jobs[request_id]

    def is_held(self, request_id: str) -> bool:
        """Whether some rank still works on the request or has to forget it."""
        return request_id in self._busy.values() or any(held.request_id == request_id for held in self._to_release)

    @property
    def is_idle(self) -> bool:
        """No request is under way and no rank owes an answer."""
        return not self._busy and not self._to_release and all(job.is_over for job in self._jobs.values())

    def next_commands(self) -> list[messages.Command]:
        """Everything that can be sent now, oldest request first. Sending is the caller's duty."""
        return [*self._releases(), *self._work()]

    def _releases(self) -> Iterator[messages.Command]:
        waiting, self._to_release = self._to_release, []
        for release in waiting:
            (rank,) = release.ranks
            if rank in self._busy:
                self._to_release.append(release)
                continue
            self._busy[rank] = release.request_id
            yield release

    def _work(self) -> Iterator[messages.Command]:
        for job in self._jobs.values():
            if job.is_over or job.awaited or job.cancel_wanted:
                continue
            ranks = self._placement.ranks(_ROLE[job.phase])
            if any(rank in self._busy for rank in ranks):
                continue
            if job.phase is Phase.QUEUED:
                job.move(Phase.ENCODING)
            job.awaited = set(ranks)
            self._busy.update(dict.fromkeys(ranks, job.request_id))
            yield _command(job, ranks)

    def _settle(self, job: Job) -> None:
        """Moves a job on once nothing is in flight for it."""
        if job.awaited or job.is_over:
            return
        if job.failure is not None:
            job.move(Phase.FAILED)
        elif job.cancel_wanted:
            job.move(Phase.CANCELLED)
        elif job.phase is Phase.ENCODING:
            job.move(Phase.DENOISING)
        elif job.phase is Phase.DENOISING and job.done == job.work.num_steps:
            job.move(Phase.DECODING)
        elif job.phase is Phase.DECODING and job.done == job.work.num_chunks:
            job.move(Phase.DONE)
        if job.is_over:
            self._to_release.extend(
                messages.Release(request_id=job.request_id, ranks=(rank,), after_failure=job.phase is Phase.FAILED)
                for rank in self._placement.world
            )


def _command(job: Job, ranks: tuple[int, ...]) -> messages.Command:
    if job.phase is Phase.ENCODING:
        return messages.Encode(request_id=job.request_id, ranks=ranks, request=job.request)
    if job.phase is Phase.DENOISING:
        return messages.Denoise(request_id=job.request_id, ranks=ranks, step=job.done, parallel=job.work.parallel)
    return messages.Decode(request_id=job.request_id, ranks=ranks, chunk=job.done)
