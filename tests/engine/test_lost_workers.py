"""Workers that die: which request fails, which begin again, and that nobody sees a frame twice. No model computes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipedit import Engine, VideoRequest, WorkerDiedError
from pipedit.core import messages
from pipedit.core.messages import Command
from pipedit.core.spans import Span
from pipedit.engine.updates import Failed, Finished, Frames, Restarted
from pipedit.executor.simulated import SimulatedExecutor

SMALL: dict[str, Any] = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 3}


class Mortal(SimulatedExecutor):
    """`victim` dies, and all others with it, when it is given a `fatal` command; as often as `deaths` says."""

    def __init__(self, *, victim: int, fatal: Callable[[Command], bool], deaths: int = 1) -> None:
        super().__init__(failing=self._may_die, step_s=1.0)  # so long that each step is a command
        self._victim, self._fatal, self._deaths, self.starts = victim, fatal, deaths, 0

    def start(self, timeout_s: float) -> Sequence[Span]:
        self.starts += 1
        return super().start(timeout_s)

    def _may_die(self, command: Command) -> None:
        if self._deaths and self._victim in command.ranks and self._fatal(command):
            self._deaths -= 1
            raise WorkerDiedError("killed by signal 9", rank=self._victim, doing="working")


@pytest.fixture
def engine_of(tiny_folder: Callable[[str], Path]) -> Callable[[Mortal], Engine]:
    return lambda executor: Engine(
        tiny_folder("wan"), device="cpu", denoise_workers=1, decode_workers=1, encode_on="decode", executor=executor
    )


def is_chunk(number: int, request_id: str) -> Callable[[Command], bool]:
    return lambda c: isinstance(c, messages.Decode) and c.chunk == number and c.request_id == request_id


def is_step(number: int, request_id: str) -> Callable[[Command], bool]:
    return lambda c: isinstance(c, messages.Denoise) and c.step == number and c.request_id == request_id


def endings(engine: Engine, count: int) -> tuple[dict[str, object], dict[str, list[Frames]]]:
    requests = engine.prepare([VideoRequest(prompt=str(n), **SMALL) for n in range(count)])
    for request in requests:
        engine.submit(request)
    ends: dict[str, object] = {}
    frames: dict[str, list[Frames]] = {}
    for update in engine.updates():
        match update:
            case Frames():
                frames.setdefault(update.request_id, []).append(update)
            case Finished() | Failed():
                ends[update.request_id] = update
    return ends, frames


def test_only_the_request_of_the_dead_worker_fails(engine_of: Callable[[Mortal], Engine]) -> None:
    executor = Mortal(victim=1, fatal=is_chunk(1, "request-1"))
    with engine_of(executor) as engine:
        ends, frames = endings(engine, 3)
    assert isinstance(ends["request-1"], Failed)
    assert isinstance(ends["request-2"], Finished)
    assert isinstance(ends["request-3"], Finished)
    assert executor.starts == 2
    assert sum(len(part.frames) for part in frames["request-2"]) == 9


def test_a_request_begins_again_once_and_then_fails(engine_of: Callable[[Mortal], Engine]) -> None:
    # The decoder dies at the first request's chunks while the denoiser is at the second one: that begins again, and
    # then its own workers die.
    executor = Mortal(victim=1, fatal=lambda c: isinstance(c, messages.Decode) and c.chunk == 0, deaths=2)
    with engine_of(executor) as engine:
        ends, _ = endings(engine, 3)
    assert [type(ends[f"request-{n}"]) for n in (1, 2, 3)] == [Failed, Failed, Finished]
    assert executor.starts == 3


def test_frames_that_were_handed_out_come_only_once(engine_of: Callable[[Mortal], Engine]) -> None:
    # Rank 0 dies in a step of the second request while rank 1 has decoded a part of the first one.
    executor = Mortal(victim=0, fatal=is_step(1, "request-2"))
    with engine_of(executor) as engine:
        requests = engine.prepare([VideoRequest(prompt=str(n), **SMALL) for n in range(2)])
        for request in requests:
            engine.submit(request)
        updates = [update for update in engine.updates() if update.request_id == "request-1"]
    assert sum(isinstance(update, Restarted) for update in updates) == 1
    restart = next(i for i, update in enumerate(updates) if isinstance(update, Restarted))
    assert any(isinstance(update, Frames) for update in updates[:restart])
    parts = [update for update in updates if isinstance(update, Frames)]
    assert [part.first for part in parts] == list(np.cumsum([0, *(len(part.frames) for part in parts[:-1])]))
    assert sum(len(part.frames) for part in parts) == 9
    assert isinstance(updates[-1], Finished)


def test_a_higher_priority_goes_between_two_steps(engine_of: Callable[[Mortal], Engine]) -> None:
    executor = Mortal(victim=0, fatal=lambda _: False)
    with engine_of(executor) as engine:
        low, high = engine.prepare([VideoRequest(prompt=name, **SMALL) for name in ("low", "high")])
        first = engine.submit(low)
        second = ""
        for update in engine.updates():
            if not second and getattr(update, "stage", "") == "denoise":
                second = engine.submit(high, priority=1)
    steps = [c.request_id for c in executor.sent if isinstance(c, messages.Denoise)]
    assert steps[0] == first
    assert steps.index(second) < len(steps) - 1 - steps[::-1].index(first), steps
