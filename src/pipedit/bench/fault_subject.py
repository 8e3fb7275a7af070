"""What `bench faults` does harm to: an engine over worker processes, its requests, and what is right about both.

Knows how to tell that a batch of requests ended as it should; not what was done to it.
"""

import dataclasses
import gc
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil

from pipedit.bench.striking import StrikingExecutor
from pipedit.core.errors import WorkerDiedError
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.engine.engine import Engine
from pipedit.engine.placing import placement_of
from pipedit.engine.settings import EngineSettings, open_adapter
from pipedit.engine.updates import Cancelled, Failed, Finished, Frames, Progress, Restarted, Update
from pipedit.executor.local_processes import WORKER_PROGRAM
from pipedit.models.adapter import Precision
from pipedit.worker.settings import WorkerSettings

BATCH_LIMIT_S = 120.0  # a batch that takes longer hangs; it takes a few seconds
LEVELS = 1  # of 255, by which videos may differ: heads are dealt out differently from run to run
_FLOAT32 = Precision(text_encoder="float32", transformer="float32", vae="float32")
_SPLIT_2_1 = {"denoise_workers": 2, "decode_workers": 1, "ulysses_degree": 2}

# Every placement and every way of helping, by what is said of them.
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "2 denoise, 1 decodes, encodes and helps": {**_SPLIT_2_1, "encode_on": "decode", "aco": "on"},
    "1 denoises, 2 decode, encode and may help": {
        "denoise_workers": 1, "decode_workers": 2, "encode_on": "decode", "aco": "auto",
    },
    "2 denoise and encode, 1 decodes": {
        "denoise_workers": 2, "decode_workers": 1, "cfg_degree": 2, "encode_on": "denoise", "aco": "off",
    },
    "2 do everything": {"num_workers": 2, "strategy": "colocated"},
    "2 do everything, but 1 decodes": {"num_workers": 2, "strategy": "colocated", "decode": "serial"},
}  # fmt: skip

REQUESTS = tuple(
    VideoRequest(prompt=prompt, seed=seed, num_frames=frames, height=height, width=width, num_inference_steps=steps)
    for seed, (prompt, frames, height, width, steps) in enumerate(
        [
            ("a red circle moves right", 9, 32, 48, 4),
            ("a blue square grows", 13, 32, 32, 3),
            ("a green triangle moves up", 9, 48, 32, 6),
            ("a yellow circle shrinks", 9, 32, 48, 5),
        ]
    )
)

Video = np.ndarray[Any, np.dtype[np.uint8]]


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """What became of a batch. `raised`: by the engine itself, while workers started."""

    requests: dict[str, int]  # id -> number in REQUESTS
    parts: dict[str, list[Video]] = dataclasses.field(default_factory=dict)
    endings: dict[str, Update] = dataclasses.field(default_factory=dict)
    stages: dict[str, str] = dataclasses.field(default_factory=dict)  # the last of which there was progress
    restarts: Counter[str] = dataclasses.field(default_factory=Counter)
    raised: list[WorkerDiedError] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def note(self, update: Update) -> None:
        match update:
            case Frames():
                self.parts.setdefault(update.request_id, []).append(update.frames)
            case Progress():
                self.stages[update.request_id] = update.stage
            case Restarted():
                self.restarts[update.request_id] += 1
            case Finished() | Failed() | Cancelled():
                self.endings[update.request_id] = update

    def ended(self, kind: type[Update]) -> set[str]:
        return {request_id for request_id, update in self.endings.items() if isinstance(update, kind)}

    def video(self, request_id: str) -> Video:
        return np.concatenate(self.parts[request_id])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What this process uses; `processes` it has started."""

    processes: int
    files: int
    threads: int
    memory_bytes: int

    @classmethod
    def now(cls) -> "Resources":
        gc.collect()
        me = psutil.Process()
        return cls(
            processes=len(me.children()),
            files=me.num_fds(),
            threads=threading.active_count(),
            memory_bytes=me.memory_info().rss,
        )

    def problems(self, before: "Resources") -> Iterator[str]:
        """Of which there is more than before. Memory is judged over many rounds."""
        for name in ("processes", "files", "threads"):
            was, is_now = getattr(before, name), getattr(self, name)
            if is_now > was:
                yield f"{was} {name} before, {is_now} after"


class Subject:
    """An engine of one layout, whose workers can be killed. `videos`: those of REQUESTS, undisturbed; `warm_up` makes
    them."""

    def __init__(self, model: str, layout: Mapping[str, Any], program: Sequence[str] = WORKER_PROGRAM) -> None:
        """`layout`: engine settings, as in LAYOUTS. `program`: see LocalProcessExecutor."""
        settings = EngineSettings.of(model=model, device="cpu", dtype="float32", **layout)
        self.placement: Placement = placement_of(settings)
        self.helps = settings.aco == "on"  # else it is up to measured times
        self.executor = StrikingExecutor(
            model=open_adapter(settings).checkpoint.name,
            settings=WorkerSettings(device="cpu", precision=_FLOAT32),
            placement=self.placement,
            program=program,
        )
        self.engine = Engine.of(settings, self.executor)
        self.requests = self.engine.prepare(REQUESTS)
        self.videos: tuple[Video, ...] = ()
        self.start_s = self.batch_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.executor.disarm()
        self.engine.close()

    def warm_up(self) -> Outcome:
        """Starts the workers and runs the requests twice, undisturbed: how long that takes, and what videos result."""
        start_s = time.monotonic()
        self.engine.start()
        self.start_s = time.monotonic() - start_s
        self.run(range(len(REQUESTS)))
        outcome = self.run(range(len(REQUESTS)))
        self.batch_s = outcome.seconds
        self.videos = tuple(outcome.video(request_id) for request_id in outcome.requests)
        return outcome

    def submit(self, numbers: Sequence[int], priorities: Sequence[int] = ()) -> Outcome:
        """Hands in requests by their numbers in REQUESTS, for `finish`."""
        levels = priorities or [0] * len(numbers)
        ids = {
            self.engine.submit(self.requests[number], priority=level): number
            for number, level in zip(numbers, levels, strict=True)
        }
        return Outcome(requests=ids)

    def finish(self, outcome: Outcome) -> Outcome:
        """Works until all are over. Raises TimeoutError where that takes too long."""
        start_s = time.monotonic()
        self.executor.deadline_s = start_s + BATCH_LIMIT_S
        while True:
            try:
                for update in self.engine.updates():
                    outcome.note(update)
            except WorkerDiedError as error:  # while they started; what was submitted still waits
                outcome.raised.append(error)
                continue
            outcome.seconds = time.monotonic() - start_s
            return outcome

    def run(self, numbers: Sequence[int]) -> Outcome:
        return self.finish(self.submit(numbers))

    def difference(self, outcome: Outcome, request_id: str) -> float:
        """Of a finished video from the undisturbed one, in grey levels; infinite if frames are missing."""
        ours, theirs = outcome.video(request_id), self.videos[outcome.requests[request_id]]
        return difference(ours, theirs)

    def typical_s(self, what: str) -> float:
        """How long a piece of work of this kind takes, as far as there was any."""
        durations = [span.duration_s for span in self.engine.timeline().spans if span.what == what]
        return statistics.median(durations) if durations else 0.0

    def worker_memory(self) -> list[int]:
        return [psutil.Process(pid).memory_info().rss for pid in self.executor.pids]


def difference(ours: Video, theirs: Video) -> float:
    """In grey levels; infinite for other sizes."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours.astype(np.int16) - theirs).max())
