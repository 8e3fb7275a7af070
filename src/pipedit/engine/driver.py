"""Drives the request scheduler and an executor, one exchange at a time, and keeps what happens until it is asked for.

Several iterators may be open on one engine: whoever waits turns the crank for everybody, and each takes only the news
of its own requests. Knows nothing of prompts, models or files.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from pipedit.core import messages
from pipedit.core.errors import PipeditError, SnapshotError, WorkerDiedError
from pipedit.core.request import VideoRequest
from pipedit.core.snapshots import Snapshot
from pipedit.core.spans import Span
from pipedit.engine.updates import Cancelled, Checkpointed, Failed, Finished, Frames, Progress, Restarted, Update
from pipedit.executor.base import Executor
from pipedit.plan.jobs import Phase, Work
from pipedit.plan.scheduling import Scheduler

if TYPE_CHECKING:
    import numpy as np

    DecodedFrames = np.ndarray[Any, np.dtype[np.uint8]]

RECEIVE_TIMEOUT_S = 5.0
MAX_SPANS = 200_000  # about 100 MiB; an engine that serves for weeks keeps the newest ones


@dataclasses.dataclass(kw_only=True)
class _Running:
    """A request under way: how many frames were decoded (again, if it had to begin again) and handed out, and seconds
    spent by kind of work. `error`: it is cancelled because of this."""

    request: VideoRequest
    recorder: "Recorder | None"
    frames_decoded: int
    frames_out: int
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    error: SnapshotError | None = None


class Recorder(Protocol):
    """Keeps what a run needs to go on later. Both raise SnapshotError where that is not possible."""

    def keep(self, frames: "DecodedFrames") -> None:
        """The next ones, in order."""

    def complete(self, snapshot: Snapshot) -> None:
        """All ranks have written their files of it, and all frames of its decoded blocks were kept."""


class Driver:
    """One thread calls it; only `cancel` may be called from another.

    When workers die, the request that one of them worked on fails; the others wait until `start` is called again.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._running: dict[str, _Running] = {}
        self._news: collections.deque[Update] = collections.deque()
        self._to_cancel: collections.deque[str] = collections.deque()  # filled by any thread, emptied by `turn`
        self._is_turning = False
        self._unwanted: set[str] = set()  # dropped in the midst of another thread's turn, which sees to them
        self.has_workers = False
        self.spans: collections.deque[Span] = collections.deque(maxlen=MAX_SPANS)
        self.peak_bytes: dict[int, int] = {}  # rank -> the most memory that it held

    def submit(
        self,
        request_id: str,
        request: VideoRequest,
        work: Work,
        *,
        recorder: Recorder | None = None,
        first_frame: int = 0,
    ) -> None:
        """`first_frame`: so many frames came before it went on from a snapshot. Raises PipeditError, with nothing
        queued, while another thread turns."""
        self._refuse_second_thread()
        self._scheduler.submit(request_id, request, work)
        self._running[request_id] = _Running(
            request=request, recorder=recorder, frames_decoded=first_frame, frames_out=first_frame
        )

    def cancel(self, request_id: str) -> None:
        self._to_cancel.append(request_id)

    def is_under_way(self, request_id: str) -> bool:
        return request_id in self._running

    @property
    def mentioned(self) -> set[str]:
        """Requests that are under way or of which there is news."""
        return {*self._running, *(update.request_id for update in self._news)}

    def next_news(self, request_ids: Collection[str]) -> Update | None:
        """The oldest update of any of these requests that was not taken yet."""
        for index, update in enumerate(self._news):
            if update.request_id in request_ids:
                del self._news[index]
                return update
        return None

    def start(self, executor: Executor, timeout_s: float) -> None:
        """Starts the workers, if there are none."""
        if not self.has_workers:
            self.spans += executor.start(timeout_s)
            self.has_workers = True

    def turn(self, executor: Executor | None) -> None:
        """Sends what can be sent, and waits for one answer if any is owed. Without workers, only takes note of what was
        cancelled. Raises PipeditError if two threads turn."""
        self._refuse_second_thread()
        self._is_turning = True
        try:
            while self._to_cancel:
                self._scheduler.cancel(self._to_cancel.popleft())
            self._note_endings()
            if self.has_workers:
                assert executor is not None
                self._exchange(executor)
            self._note_endings()
        except WorkerDiedError as error:
            self.lose_workers(error)
        finally:
            self._forget_unwanted()
            self._is_turning = False

    def _refuse_second_thread(self) -> None:
        if self._is_turning:
            raise PipeditError("another thread is using this engine; an engine works for one thread at a time")

    def _exchange(self, executor: Executor) -> None:
        executor.check()  # a worker that died while there was nothing to do costs no request
        for command in self._scheduler.next_commands():
            executor.send(command)
        if not self._scheduler.is_idle:
            for event in executor.receive(RECEIVE_TIMEOUT_S):
                self._note(event)

    def lose_workers(self, error: WorkerDiedError) -> None:
        """There are no workers any more, and what they kept is gone."""
        self.has_workers = False
        self._scheduler.lose_workers(error)
        self._note_endings()
        for request_id, running in self._running.items():
            job = self._scheduler.job(request_id)
            if running.seconds and job.phase is Phase.QUEUED:  # it had begun
                running.frames_decoded, running.seconds = 0, {}
                self._news.append(Restarted(request_id=request_id, error=error))

    def abandon(self) -> None:
        """The workers were stopped for good: ends every request, so that nobody waits for an answer in flight."""
        self.has_workers = False
        self._scheduler.abandon()

    def drop(self, request_ids: Iterable[str], executor: Executor | None) -> None:
        """Cancels what nobody waits for any more, and lets the workers forget it. In the midst of another thread's
        turn, leaves it to that thread."""
        ids = set(request_ids)
        for request_id in ids & self._running.keys():
            self.cancel(request_id)
        self._unwanted |= ids
        if self._is_turning:
            return
        while ids & self._running.keys() or (self.has_workers and any(map(self._scheduler.is_held, ids))):
            self.turn(executor)
        self._forget_unwanted()

    def rest(self, executor: Executor | None) -> None:
        """Where nothing is under way, lets the workers forget what is over. Whatever is under way makes them do it."""
        while self.has_workers and not self._is_turning and not self._running and not self._scheduler.is_idle:
            self.turn(executor)

    def _forget_unwanted(self) -> None:
        """Takes back the news of requests that were dropped; those that are still under way will make more."""
        unwanted = set(self._unwanted)
        self._news = collections.deque(update for update in self._news if update.request_id not in unwanted)
        self._unwanted -= unwanted - self._running.keys()

    def _note(self, event: messages.Event) -> None:
        self.spans += event.spans
        self.peak_bytes[event.rank] = max(event.peak_bytes, self.peak_bytes.get(event.rank, 0))
        running = self._running.get(event.request_id)
        speaks = running is not None and self._scheduler.speaks(event)
        self._scheduler.receive(event)
        if running is None:
            return
        if speaks:  # ranks work at the same time: one of them tells how long it took
            for span in event.spans:
                running.seconds[span.what] = running.seconds.get(span.what, 0.0) + span.duration_s
            self._progress(event, running.seconds)
        if isinstance(event, (messages.ChunkDecoded, messages.BlockDecoded)) and event.frames is not None:
            self._hand_out(running, event.request_id, event.frames)
        if isinstance(event, messages.BlocksSaved):
            self._note_snapshot(running, event)

    def _progress(self, event: messages.Event, seconds: Mapping[str, float]) -> None:
        if (advance := self._scheduler.advance(event)) is not None:
            self._news.append(
                Progress(
                    request_id=event.request_id,
                    stage=advance.stage,
                    done=advance.done,
                    total=advance.total,
                    spent_s=seconds.get(advance.what, 0.0),
                )
            )

    def _hand_out(self, running: _Running, request_id: str, decoded: "DecodedFrames") -> None:
        """The frames that were not handed out yet: after a new beginning the first ones were."""
        known = max(running.frames_out - running.frames_decoded, 0)
        running.frames_decoded += len(decoded)
        if known < len(decoded):
            frames = decoded[known:]
            if running.recorder is not None:
                with self._cancelling(running, request_id):
                    running.recorder.keep(frames)
            self._news.append(Frames(request_id=request_id, first=running.frames_out, frames=frames))
            running.frames_out += len(frames)

    def _note_snapshot(self, running: _Running, event: messages.BlocksSaved) -> None:
        """The rank that is the last to save makes a snapshot whole."""
        snapshot = self._scheduler.job(event.request_id).snapshot
        if snapshot is None or snapshot.at != event.at or running.recorder is None or running.error is not None:
            return
        with self._cancelling(running, event.request_id):
            running.recorder.complete(snapshot)
            self._news.append(
                Checkpointed(request_id=event.request_id, operations=snapshot.at, blocks_decoded=snapshot.decoded)
            )

    @contextlib.contextmanager
    def _cancelling(self, running: _Running, request_id: str) -> Iterator[None]:
        """Ends the request if it cannot be kept: who asked for that would not want to go on without."""
        try:
            yield
        except SnapshotError as error:
            running.error = running.error or error
            self._scheduler.cancel(request_id)

    def _note_endings(self) -> None:
        """Last news of requests that have ended."""
        for request_id, running in list(self._running.items()):
            job = self._scheduler.job(request_id)
            if job.is_over:
                del self._running[request_id]
                self._scheduler.forget(request_id)
                self._news.append(_ending(request_id, running, job.phase, job.failure))


def _ending(
    request_id: str, running: _Running, phase: Phase, failure: messages.CommandFailed | None
) -> Finished | Cancelled | Failed:
    if phase is Phase.DONE:  # even if the last frames could not be kept
        return Finished(request_id=request_id, request=running.request, seconds=running.seconds)
    if running.error is not None:
        return Failed(request_id=request_id, error=running.error)
    if phase is Phase.CANCELLED:
        return Cancelled(request_id=request_id)
    assert failure is not None
    return Failed(request_id=request_id, error=failure.error)
