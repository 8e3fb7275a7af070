"""The Engine: takes requests, drives the request scheduler and an executor, hands out progress and frames.

It owns the order of things, the spans and what people see. It does not know how a stage works or where ranks live.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pipedit.core import messages
from pipedit.core.errors import CancelledError, InvalidRequestError
from pipedit.core.placement import Placement, Role
from pipedit.core.request import VideoRequest
from pipedit.core.spans import Span
from pipedit.core.version import __version__
from pipedit.engine.intake import check_memory, complete_requests, make_requests, request_problems, with_seed
from pipedit.engine.settings import EngineSettings, open_adapter
from pipedit.engine.updates import Cancelled, Failed, Finished, Frames, Progress, Update
from pipedit.engine.video import Video
from pipedit.executor.base import Executor
from pipedit.media import VideoMetadata
from pipedit.models.adapter import Precision
from pipedit.models.registry import EMBEDDED, fetch_weights
from pipedit.plan.scheduler import Phase, RequestScheduler, Work
from pipedit.plan.timeline import Timeline
from pipedit.worker.device import resolve_device

START_TIMEOUT_S = 1800.0
RECEIVE_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 10.0
MAX_SPANS = 200_000  # about 100 MiB; an engine that serves for weeks keeps the newest ones


@dataclasses.dataclass(kw_only=True)
class _Running:
    """A request under way: how many frames were handed out, and seconds spent by kind of work."""

    request: VideoRequest
    work: Work
    frames_out: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


class Engine:
    """Generates videos with one model. Weights load at the first request and stay until `close`.

    with pipedit.Engine(model="tiny") as engine:
        for video in engine.generate(["a red ball moves right", "a blue square grows"], num_frames=33):
            video.save(f"{video.request.seed}.mp4")

    The constructor reads the model's config files and raises InvalidRequestError, with every problem, for settings
    that cannot work here. One thread drives it; only `cancel` may be called from another.
    """

    def __init__(
        self,
        model: str | Path = EMBEDDED,
        *,
        num_workers: int = 1,
        device: str = "auto",
        dtype: str = "auto",
        vae_tiling: bool = False,
        compile_layers: bool = False,
        executor: Executor | None = None,
    ) -> None:
        self.settings = EngineSettings(
            model=str(model),
            num_workers=num_workers,
            device=device,
            dtype=dtype,
            vae_tiling=vae_tiling,
            compile_layers=compile_layers,
        )
        self.adapter = open_adapter(self.settings)
        self._executor, self._started = executor, False
        self._placement = Placement.colocated(num_workers)
        self._scheduler = RequestScheduler(self._placement)
        self._running: dict[str, _Running] = {}
        self._ids = (f"request-{number}" for number in itertools.count(1))
        self._to_cancel: collections.deque[str] = collections.deque()  # filled by any thread, emptied by the driver
        self._spans: collections.deque[Span] = collections.deque(maxlen=MAX_SPANS)

    # -- for people ---------------------------------------------------------------------------------------------

    def generate(self, prompts: str | VideoRequest | Sequence[str | VideoRequest], **settings: Any) -> Iterator[Video]:
        """One Video for each prompt, in order, each as soon as it is done.

        `settings` are fields of VideoRequest and hold for every prompt given as text. A seed given here is the seed
        of every prompt; without one, each gets a random seed of its own, recorded in `video.request.seed`. All input
        is checked now, before anything runs: InvalidRequestError lists every problem. A failed request raises its
        error when its turn comes.
        """
        return self._collect(self.prepare(make_requests(prompts, settings)))

    def stream(self, prompt: str | VideoRequest, **settings: Any) -> Iterator["np.ndarray[Any, np.dtype[np.uint8]]"]:
        """Frames of one video as they are decoded: uint8 arrays [F, H, W, 3], in order. Checks its input now."""
        return self._stream(*self.prepare(make_requests(prompt, settings)))

    def close(self) -> None:
        """Stops the workers and frees their memory. Requests under way are dropped."""
        if self._executor is not None and self._started:
            self._executor.stop(STOP_TIMEOUT_S)
        self._executor, self._started = None, False
        self._scheduler = RequestScheduler(self._placement)
        self._running.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- for drivers: command line, server ----------------------------------------------------------------------

    def prepare(self, requests: Sequence[VideoRequest]) -> list[VideoRequest]:
        """The requests with defaults and seeds filled in. Raises InvalidRequestError with every problem of all of
        them, or InsufficientMemoryError. Loads no weights."""
        complete = complete_requests(requests, self.adapter)
        problems = request_problems(complete, self.adapter) if complete else ["there is no prompt"]
        if problems:
            raise InvalidRequestError(problems)
        # Only now: finding the device imports torch, and wrong input should be answered before that.
        check_memory(
            complete,
            self.adapter,
            self.device,
            self.precision,
            tiling=self.settings.vae_tiling,
            is_loaded=self._started,
        )
        return [with_seed(request) for request in complete]

    def submit(self, request: VideoRequest) -> str:
        """Queues a prepared request and returns its id; `updates` does the work."""
        assert request.num_inference_steps is not None and request.seed is not None, "prepare the request first"
        request_id = next(self._ids)
        work = Work(num_steps=request.num_inference_steps, num_chunks=self.adapter.num_decode_chunks(request))
        self._scheduler.submit(request_id, request, work)
        self._running[request_id] = _Running(request=request, work=work)
        return request_id

    def cancel(self, request_id: str) -> None:
        """Stops the request within one step; its last update is then Cancelled. Any thread may call it."""
        self._to_cancel.append(request_id)

    def fetch(self) -> None:
        """Makes sure that the weights are on disk, downloads what a hub model lacks. `start` does it too."""
        if self._executor is None:
            fetch_weights(self.adapter)

    def start(self) -> None:
        """Loads the model now rather than at the first request."""
        if self._started:
            return
        self.fetch()
        self._executor = self._executor or self._make_executor()
        self._spans += self._executor.start(START_TIMEOUT_S)
        self._started = True

    def updates(self) -> Iterator[Update]:
        """Works until every submitted request is over, and tells about it on the way."""
        self.start()
        executor = self._executor
        assert executor is not None
        while True:
            while self._to_cancel:
                self._scheduler.cancel(self._to_cancel.popleft())
            yield from self._endings()
            for command in self._scheduler.next_commands():
                executor.send(command)
            if self._scheduler.is_idle:
                return
            for event in executor.receive(RECEIVE_TIMEOUT_S):
                yield from self._take(event)

    def timeline(self) -> Timeline:
        """What ran so far (the newest MAX_SPANS pieces of work), as spans on the run's clock."""
        return Timeline(
            spans=tuple(self._spans), metadata={"model": self.settings.model, "pipedit_version": __version__}
        )

    def metadata(self, request: VideoRequest) -> VideoMetadata:
        """What is written into the file: enough to generate the video again."""
        return VideoMetadata.of(
            request,
            model=self.settings.model,
            extra={
                "device": self.device,
                "dtype": dataclasses.asdict(self.precision),
                "vae_tiling": self.settings.vae_tiling,
            },
        )

    @property
    def device(self) -> str:
        return resolve_device(self.settings.device)

    @property
    def precision(self) -> Precision:
        """Data types by part: the family's choice for the device, or the one that was asked for, everywhere."""
        dtype = self.settings.dtype
        if dtype == "auto":
            return self.adapter.default_precision(self.device.partition(":")[0])
        return Precision(text_encoder=dtype, transformer=dtype, vae=dtype)

    # -- inside -------------------------------------------------------------------------------------------------

    def _collect(self, requests: Sequence[VideoRequest]) -> Iterator[Video]:
        ids = [self.submit(request) for request in requests]
        parts: dict[str, list[np.ndarray[Any, np.dtype[np.uint8]]]] = {request_id: [] for request_id in ids}
        ready: dict[str, Video] = {}
        try:
            for update in self.updates():
                _raise_if_over(update, ids)
                if isinstance(update, Frames) and update.request_id in parts:
                    parts[update.request_id].append(update.frames)
                elif isinstance(update, Finished) and update.request_id in parts:
                    ready[update.request_id] = self._video(update, parts.pop(update.request_id))
                while ids and ids[0] in ready:
                    yield ready.pop(ids.pop(0))
        finally:
            self._drop(ids)

    def _stream(self, request: VideoRequest) -> Iterator["np.ndarray[Any, np.dtype[np.uint8]]"]:
        request_id = self.submit(request)
        try:
            for update in self.updates():
                _raise_if_over(update, [request_id])
                if isinstance(update, Frames) and update.request_id == request_id:
                    yield update.frames
        finally:
            self._drop([request_id])

    def _drop(self, ids: Sequence[str]) -> None:
        """Cancels what the caller no longer waits for, so that nothing is left queued for the next call."""
        left = [request_id for request_id in ids if request_id in self._running]
        for request_id in left:
            self.cancel(request_id)
        if left and self._started:
            collections.deque(self.updates(), maxlen=0)

    def _video(self, update: Finished, parts: Sequence["np.ndarray[Any, np.dtype[np.uint8]]"]) -> Video:
        return Video(
            frames=np.concatenate(parts),
            request=update.request,
            metadata=self.metadata(update.request),
            seconds=update.seconds,
        )

    def _take(self, event: messages.Event) -> Iterator[Update]:
        self._spans += event.spans
        self._scheduler.receive(event)
        running = self._running.get(event.request_id)
        if running is None:
            return
        for span in event.spans:
            running.seconds[span.what] = running.seconds.get(span.what, 0.0) + span.duration_s
        match event:
            case messages.Encoded() if self._leads(event, Role.ENCODER):
                yield Progress(request_id=event.request_id, stage="encode", done=1, total=1)
            case messages.StepDone() if self._leads(event, Role.DENOISER):
                total = running.work.num_steps
                yield Progress(request_id=event.request_id, stage="denoise", done=event.step + 1, total=total)
            case messages.ChunkDecoded() if event.frames is not None:
                yield Frames(request_id=event.request_id, first=running.frames_out, frames=event.frames)
                running.frames_out += len(event.frames)
                total = running.work.num_chunks
                yield Progress(request_id=event.request_id, stage="decode", done=event.chunk + 1, total=total)

    def _leads(self, event: messages.Event, role: Role) -> bool:
        return event.rank == self._placement.ranks(role)[0]

    def _endings(self) -> Iterator[Update]:
        """Last updates of requests that ended since the last call."""
        for request_id, running in list(self._running.items()):
            job = self._scheduler.job(request_id)
            if not job.is_over:
                continue
            del self._running[request_id]
            self._scheduler.forget(request_id)
            if job.phase is Phase.DONE:
                yield Finished(request_id=request_id, request=running.request, seconds=running.seconds)
            elif job.phase is Phase.CANCELLED:
                yield Cancelled(request_id=request_id)
            else:
                assert job.failure is not None
                yield Failed(request_id=request_id, error=job.failure.error)

    def _make_executor(self) -> Executor:
        # Imported here: the worker needs torch, and wrong input should be refused before that is loaded.
        from pipedit.executor.in_process import InProcessExecutor
        from pipedit.worker.worker import Worker, WorkerSettings

        settings = WorkerSettings(
            device=self.device,
            precision=self.precision,
            vae_tiling=self.settings.vae_tiling,
            compile_layers=self.settings.compile_layers,
        )
        return InProcessExecutor(Worker(self.adapter, settings))


def _raise_if_over(update: Update, ids: Sequence[str]) -> None:
    if update.request_id in ids:
        if isinstance(update, Failed):
            raise update.error
        if isinstance(update, Cancelled):
            raise CancelledError(f"{update.request_id} was cancelled")
