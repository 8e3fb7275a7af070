"""The Engine: takes requests, has them driven, hands out progress, frames and videos.

It owns what people see of a run. It does not know how a stage works, where ranks live, or in which order work is done.
"""

import collections
import contextlib
import dataclasses
import importlib.metadata
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pipedit.core.blocks import Prefix
from pipedit.core.errors import CancelledError, InvalidRequestError, PipeditError
from pipedit.core.parallel import AUTO, ParallelConfig
from pipedit.core.placement import Placement, Role
from pipedit.core.request import VideoRequest
from pipedit.core.version import __version__
from pipedit.engine.blocks import block_metadata, block_plan, output_frames, saving_problems, stage_cost_of
from pipedit.engine.driver import Driver
from pipedit.engine.fitting import check_memory, free_memory
from pipedit.engine.intake import complete_requests, make_requests, request_problems, with_seed
from pipedit.engine.placing import describe, placement_of, scheduler_of, settle
from pipedit.engine.saved_run import SavedRun
from pipedit.engine.settings import (
    DEFAULT_BLOCK_SIZE,
    DecodeMode,
    EngineSettings,
    open_adapter,
    setting_notes,
    workers_here,
)
from pipedit.engine.sharing import choose_sharing, help_notes
from pipedit.engine.updates import Cancelled, Failed, Finished, Frames, Update
from pipedit.engine.video import Video
from pipedit.executor.base import Executor
from pipedit.executor.choice import make_executor
from pipedit.executor.launched import Launch, find_launch, follow
from pipedit.media import VideoMetadata
from pipedit.models.adapter import Precision
from pipedit.models.fingerprint import fingerprint
from pipedit.models.registry import EMBEDDED, fetch_weights
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.jobs import Work
from pipedit.plan.timeline import Timeline
from pipedit.worker.device import resolve_device, worker_devices
from pipedit.worker.settings import WorkerSettings

START_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 10.0


class Engine:
    """Generates videos with one model. Weights load at the first request and stay until `close`.

    with pipedit.Engine(model="tiny") as engine:
        for video in engine.generate(["a red ball moves right", "a blue square grows"], num_frames=33):
            video.save(f"{video.request.seed}.mp4")

    The constructor reads the model's config files and raises InvalidRequestError, with every problem, for settings
    that cannot work here. Several workers share every video: how, is chosen for each request unless the degrees are
    given (they multiply to `num_workers`; `pipedit doctor --num-workers N` lists them).

    Under torchrun, `num_workers` is the number of its ranks, unless 1 is asked for. Every rank runs the same script:
    rank 0 is given the videos. On the others `start`, or the first iterator, serves rank 0 until that closes its
    engine; iterators then end without having yielded anything.

    One thread drives it; `cancel` may be called from another. Several iterators may be open at a time: the oldest
    request is worked on first, whoever waits.
    """

    def __init__(
        self,
        model: str | Path = EMBEDDED,
        *,
        num_workers: int | None = None,
        strategy: str | None = None,
        denoise_workers: int | None = None,
        decode_workers: int | None = None,
        encode_on: str | None = None,
        aco: str = AcoMode.AUTO,
        decode: str = DecodeMode.SPREAD,
        offload: bool = False,
        block_size: int = DEFAULT_BLOCK_SIZE,
        context: int | None = None,
        prefix: str = Prefix.CACHE,
        context_storage: str = "device",
        dualparal_compat: bool = False,
        hardware: str | Path | None = None,
        ulysses_degree: int | None = None,
        ring_degree: int | None = None,
        cfg_degree: int | None = None,
        pipesp_chunks: int | str = AUTO,
        device: str = "auto",
        dtype: str = "auto",
        vae_tiling: bool = False,
        compile_layers: bool = False,
        executor: Executor | None = None,
    ) -> None:
        settings = EngineSettings.of(
            model=str(model),
            num_workers=num_workers,
            strategy=strategy,
            denoise_workers=denoise_workers,
            decode_workers=decode_workers,
            encode_on=encode_on,
            aco=aco,
            decode=decode,
            offload=offload,
            block_size=block_size,
            context=context,
            prefix=prefix,
            context_storage=context_storage,
            dualparal_compat=dualparal_compat,
            hardware=None if hardware is None else str(hardware),
            ulysses_degree=ulysses_degree,
            ring_degree=ring_degree,
            cfg_degree=cfg_degree,
            pipesp_chunks=pipesp_chunks,
            device=device,
            dtype=dtype,
            vae_tiling=vae_tiling,
            compile_layers=compile_layers,
        )
        self._set_up(settings, executor)

    @classmethod
    def of(cls, settings: EngineSettings, executor: Executor | None = None) -> Self:
        """The engine of settings that somebody else has put together."""
        engine = cls.__new__(cls)
        engine._set_up(settings, executor)
        return engine

    def _set_up(self, settings: EngineSettings, executor: Executor | None) -> None:
        self.settings = settings
        self.adapter = open_adapter(self.settings)
        self._launch = _joined_launch(self.settings) if executor is None else None
        self._executor, self._closed = executor, False
        self._follows, self._has_followed = self._launch is not None and self._launch.rank > 0, False
        self._placement = Placement.colocated(self.settings.num_workers)
        self._driver = Driver(scheduler_of(self.settings, self._placement))
        self._is_placed, self.placing = False, ""
        self._ids = (f"request-{number}" for number in itertools.count(1))
        self._free_bytes: dict[str, int] | None = None  # before workers in other processes were loaded
        self._owned: set[str] = set()  # requests whose updates belong to an iterator of `generate` or `stream`

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
        """Stops the workers and frees their memory. Requests under way are dropped; the engine cannot be used again."""
        if self._executor is not None and self._driver.has_workers:
            self._executor.stop(STOP_TIMEOUT_S)
        self._driver.abandon()
        self._executor, self._closed = None, True

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
        problems = request_problems(complete, self.adapter, self.settings) if complete else ["there is no prompt"]
        if problems:
            raise InvalidRequestError(problems)
        if not self._follows:
            self._place(complete)
            self._check_memory(complete)  # only now: it may import torch, and wrong input should be answered before
        return [with_seed(request) for request in complete]

    def submit(self, request: VideoRequest, *, priority: int = 0, run: SavedRun | None = None) -> str:
        """Queues a prepared request and returns its id; `updates` does the work. Higher priorities go first, even
        between two steps of another request. `run`: claimed, of this request, to be saved on the way and to go on with;
        of its `frames` there will be no news."""
        assert request.num_inference_steps is not None and request.seed is not None, "prepare the request first"
        self._check_open()
        request_id, work = next(self._ids), self.work(request, priority=priority)
        if run is None:
            self._driver.submit(request_id, request, work)
        else:
            work = dataclasses.replace(work, saving=run.saving, resume=run.snapshot)
            self._driver.submit(request_id, request, work, recorder=run, first_frame=run.num_frames)
        return request_id

    @contextlib.contextmanager
    def claim(self, run: SavedRun) -> Iterator[None]:
        """Inside, `run` is saved by this engine alone (see SavedRun.claim). To be called before the model is loaded,
        and when its files are there. Raises InvalidRequestError where it cannot be saved, or gone on with here."""
        if problems := saving_problems(self.settings, self.adapter):
            raise InvalidRequestError(problems)
        with run.claim(self._made_with()):
            yield

    def _made_with(self) -> dict[str, str]:
        """Whatever the last bits of a video depend on besides request and settings."""
        packages = ("torch", "diffusers", "transformers")
        return {
            "pipedit": __version__,
            **{name: importlib.metadata.version(name) for name in packages},
            "device": self.device.partition(":")[0],
            "data types": ", ".join(f"{part} {name}" for part, name in dataclasses.asdict(self.precision).items()),
            "model files": fingerprint(self.adapter.checkpoint),
        }

    def work(self, request: VideoRequest, *, priority: int = 0) -> Work:
        """What the scheduler is told of a prepared request."""
        assert request.num_inference_steps is not None
        layout, guided = self.adapter.token_layout(request), self.adapter.uses_guidance(request)
        return Work(
            num_steps=request.num_inference_steps,
            num_chunks=self.adapter.num_decode_chunks(request, 1),
            num_chunks_spread=self.num_decode_chunks(request),
            parallel=self.sharing(request),
            heads=self.adapter.heads,
            shape=(layout.latent_tokens, layout.text_tokens, guided),
            priority=priority,
            blocks=block_plan(request, self.adapter, self.settings),
        )

    def cancel(self, request_id: str) -> None:
        """Stops the request within one step, or 0.1 s where steps are shorter; with dualparal within one pass over the
        blocks in flight. Its last update is then Cancelled. Any thread may call it."""
        self._driver.cancel(request_id)

    def fetch(self) -> None:
        """Makes sure that the weights are on disk, downloads what a hub model lacks. `start` does it too."""
        if self._executor is None:
            fetch_weights(self.adapter)

    def start(self) -> None:
        """Loads the model now rather than at the first request."""
        self._check_open()
        if self._launch is not None and self._follows:
            if not self._has_followed:
                self._has_followed = True
                follow(self._launch)
        elif not self._driver.has_workers:
            self._place(())
            self.fetch()
            self._executor = self._executor or self._make_executor()
            if self.settings.num_workers > 1:
                self._free_bytes = free_memory(self._devices)
            self._driver.start(self._executor, START_TIMEOUT_S)

    def updates(self) -> Iterator[Update]:
        """Works until every request that was submitted here is over, and tells about it on the way. Videos of
        `generate` and `stream` are worked on too, but their updates belong to those iterators."""
        self.start()
        while not self._follows:
            ids = self._driver.mentioned - self._owned
            if (update := self._driver.next_news(ids)) is not None:
                yield update
            elif ids:
                self._turn()
            else:
                self._driver.rest(self._executor)
                return

    def timeline(self) -> Timeline:
        """What ran so far (the newest pieces of work, if there are very many), as spans on the run's clock."""
        return Timeline(
            spans=tuple(self._driver.spans), metadata={"model": self.settings.model, "pipedit_version": __version__}
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
                "num_workers": self.settings.num_workers,
                "strategy": str(self.settings.strategy),
                "parallel": dataclasses.asdict(self.sharing(request)),
                **block_metadata(request, self.adapter, self.settings),
            },
        )

    @property
    def peak_bytes(self) -> dict[int, int]:
        """The most memory that each worker has held so far, by rank: on its device, or on the CPU in its process."""
        return dict(self._driver.peak_bytes)

    def roles(self, rank: int) -> tuple[Role, ...]:
        return self._placement.roles(rank)

    @property
    def division(self) -> str:
        """Who does what, in words; known once requests were prepared, or the engine was started."""
        assert self._is_placed, "prepare requests first"
        return describe(self.settings)

    def notes(self, requests: Sequence[VideoRequest]) -> list[str]:
        """What will work with these prepared requests, but may disappoint. Imports torch."""
        return [*setting_notes(self.settings), *help_notes(requests, self.adapter, self.settings)]

    def num_decode_chunks(self, request: VideoRequest) -> int:
        """How many pieces the frames of a prepared request come in, where all decoders share the work."""
        if (plan := block_plan(request, self.adapter, self.settings)) is not None:
            return plan.num_blocks or 0
        return self.adapter.num_decode_chunks(request, len(self._placement.decoders))

    def num_frames(self, request: VideoRequest) -> int:
        """How many frames the video of a prepared request has: as many as asked for, but for `dualparal_compat`."""
        assert request.num_frames is not None
        return output_frames(request, self.adapter, self.settings)

    def sharing(self, request: VideoRequest) -> ParallelConfig:
        """How the workers share a prepared request."""
        return choose_sharing(request, self.adapter, self.settings)

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

    def _place(self, requests: Sequence[VideoRequest]) -> None:
        """Settles who does what, once: what the settings leave open is chosen for these requests."""
        if self._is_placed:
            return
        free = free_memory(self._devices)
        available = min(free[device] // self._devices.count(device) for device in free)
        self.settings, self.placing = settle(
            self.settings, self.adapter, requests, self.precision, available_bytes=available
        )
        self._placement, self._is_placed = placement_of(self.settings), True
        self._driver = Driver(scheduler_of(self.settings, self._placement))

    def _collect(self, requests: Sequence[VideoRequest]) -> Iterator[Video]:
        if self._follows:
            self.start()
            return
        ids = [self.submit(request) for request in requests]
        parts: dict[str, list[np.ndarray[Any, np.dtype[np.uint8]]]] = {request_id: [] for request_id in ids}
        ready: dict[str, Video | Exception] = {}
        waiting = collections.deque(ids)
        with self._owning(ids):
            for update in self._updates_of(ids):
                match update:
                    case Frames():
                        parts[update.request_id].append(update.frames)
                    case Finished():
                        ready[update.request_id] = self._video(update, parts.pop(update.request_id))
                    case Failed() | Cancelled():
                        ready[update.request_id] = _error_of(update)
                while waiting and waiting[0] in ready:
                    result = ready.pop(waiting.popleft())
                    if isinstance(result, Exception):
                        raise result
                    yield result

    def _stream(self, request: VideoRequest) -> Iterator["np.ndarray[Any, np.dtype[np.uint8]]"]:
        if self._follows:
            self.start()
            return
        request_id = self.submit(request)
        with self._owning([request_id]):
            for update in self._updates_of([request_id]):
                match update:
                    case Frames():
                        yield update.frames
                    case Failed() | Cancelled():
                        raise _error_of(update)

    @contextlib.contextmanager
    def _owning(self, ids: Sequence[str]) -> Iterator[None]:
        """Inside, updates of these requests belong to the caller. On leaving, whatever of them is not over is
        cancelled, so that nothing is left queued when an iterator is abandoned or a request has failed."""
        self._owned.update(ids)
        try:
            yield
        finally:
            self._driver.drop(ids, self._executor)
            self._owned.difference_update(ids)

    def _updates_of(self, ids: Sequence[str]) -> Iterator[Update]:
        """Updates of these requests until all of them are over."""
        while True:
            if (update := self._driver.next_news(ids)) is not None:
                yield update
            elif any(self._driver.is_under_way(request_id) for request_id in ids):
                self._turn()
            else:
                return

    def _turn(self) -> None:
        self.start()  # the first ones, or fresh ones after a death
        self._driver.turn(self._executor)

    def _check_open(self) -> None:
        if self._closed:
            raise PipeditError("this engine is closed; make a new one")

    def _video(self, update: Finished, parts: Sequence["np.ndarray[Any, np.dtype[np.uint8]]"]) -> Video:
        return Video(
            frames=np.concatenate(parts),
            request=update.request,
            metadata=self.metadata(update.request),
            seconds=update.seconds,
        )

    def _make_executor(self) -> Executor:
        settings = WorkerSettings(
            device=self.device,
            precision=self.precision,
            vae_tiling=self.settings.vae_tiling,
            compile_layers=self.settings.compile_layers,
            offload=self.settings.offload,
            is_blockwise=self.settings.is_blockwise,
            context_storage=self.settings.context_storage,
        )
        return make_executor(self.adapter, settings, self._placement, self._launch)

    def _check_memory(self, requests: Sequence[VideoRequest]) -> None:
        check_memory(
            requests,
            self.adapter,
            self._devices,
            self.precision,
            placement=self._placement,
            sharing=self.sharing,
            free_bytes=self._free_bytes,
            tiling=self.settings.vae_tiling,
            offload=self.settings.offload,
            is_loaded=self._driver.has_workers and self._free_bytes is None,
            cost_of=stage_cost_of(self.adapter, self.precision, self.settings) if self.settings.is_blockwise else None,
        )

    @property
    def _devices(self) -> tuple[str, ...]:
        """Of the workers on this machine."""
        return worker_devices(self.settings.device, workers_here(self.settings))


def _joined_launch(settings: EngineSettings) -> Launch | None:
    """The launcher's ranks, if there are any and they are meant. Raises InvalidRequestError for another number."""
    wanted = settings.num_workers
    launch = find_launch() if wanted > 1 else None
    if launch is not None and wanted != launch.world_size:
        raise InvalidRequestError(
            [f"num_workers={wanted}, but the launcher started {launch.world_size} ranks; leave num_workers out"]
        )
    return launch


def _error_of(update: Failed | Cancelled) -> Exception:
    if isinstance(update, Failed):
        return update.error
    return CancelledError(f"{update.request_id} was cancelled")
