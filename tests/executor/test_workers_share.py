"""Two real workers on a tiny model: the same video as in this process, many times over, and nothing stuck for ever."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import pipedit
from pipedit.core import messages
from pipedit.core.errors import InvalidRequestError, WorkerDiedError
from pipedit.core.parallel import ParallelConfig
from pipedit.core.units import MIB
from pipedit.engine.engine import Engine
from pipedit.engine.updates import Failed, Finished
from pipedit.executor.local_processes import LocalProcessExecutor
from pipedit.plan.jobs import Work
from tests import tiny_pipelines
from tests.executor.stand_ins import (
    START_S,
    STEP_1,
    await_that,
    begin,
    is_alive,
    open_files,
    run_parent,
    stuck_executor,
)

QUICK = tiny_pipelines.QUICK_SETTINGS["wan"]


@pytest.fixture(scope="module")
def shared(tiny_folder: Callable[[str], Path]) -> Iterator[Engine]:
    """An engine with two workers, which every test may use."""
    with Engine(tiny_folder("wan"), device="cpu", num_workers=2) as engine:
        engine.start()
        yield engine


def pids_of(engine: Engine) -> tuple[int, ...]:
    executor = engine._executor
    assert isinstance(executor, LocalProcessExecutor)
    return executor.pids


def test_two_workers_make_the_video_of_one(shared: Engine, tiny_folder: Callable[[str], Path]) -> None:
    prompts = ["a red ball", "a blue square"]
    with Engine(tiny_folder("wan"), device="cpu", num_workers=1) as alone:
        expected = [video.frames.astype(int) for video in alone.generate(prompts, seed=2, **QUICK)]
    videos = list(shared.generate(prompts, seed=2, **QUICK))
    for video, frames in zip(videos, expected, strict=True):
        assert np.abs(video.frames - frames).max() <= 1
    assert np.abs(expected[0] - expected[1]).max() > 1, "the comparison could not fail"
    assert set(videos[0].seconds) == {"encode", "step", "decode"}
    assert {(span.rank, span.what) for span in shared.timeline().spans} >= {(0, "step"), (1, "step"), (1, "load")}


def test_a_failed_step_costs_its_request_and_the_next_one_is_right(shared: Engine) -> None:
    (before,) = shared.generate("a red ball", seed=2, **QUICK)
    (request,) = shared.prepare([before.request])
    too_many = Work(num_steps=3, num_chunks=1, parallel=ParallelConfig(ulysses_degree=4))
    shared._driver.submit("wrong", request, too_many)
    endings = [update for update in shared.updates() if isinstance(update, Failed | Finished)]
    assert len(endings) == 1
    assert isinstance(endings[0], Failed)
    assert isinstance(endings[0].error, InvalidRequestError)
    assert "there are 2" in endings[0].error.problems[0]
    pids = pids_of(shared)
    (after,) = shared.generate("a red ball", seed=2, **QUICK)
    assert np.array_equal(before.frames, after.frames)
    assert pids_of(shared) == pids


def test_twenty_requests_leave_memory_and_files_as_they_were(shared: Engine) -> None:
    def in_use() -> tuple[list[int], list[int]]:
        workers = [psutil.Process(pid) for pid in pids_of(shared)]
        return [open_files(), *(w.num_fds() for w in workers)], [w.memory_info().rss for w in workers]

    small: dict[str, Any] = {**QUICK, "num_inference_steps": 1, "num_frames": 5}
    list(shared.generate(["warm-up"] * 5, **small))
    growth = []
    for _ in range(3):  # a leak grows in every round, an allocator's pools do not
        files, memory = in_use()
        list(shared.generate(["again"] * 20, **small))
        files_after, memory_after = in_use()
        assert files_after == files
        growth.append(max(after - before for before, after in zip(memory, memory_after, strict=True)))
        if growth[-1] < 4 * MIB:
            return
    pytest.fail(f"every round of 20 requests took more memory: {growth} bytes")


def test_a_killed_worker_fails_the_request_and_the_next_one_works(shared: Engine) -> None:
    many_steps = {**QUICK, "num_inference_steps": 500}
    (request,) = shared.prepare([pipedit.VideoRequest(prompt="long", seed=1, **many_steps)])
    shared.submit(request)
    updates = shared.updates()
    while getattr(next(updates), "stage", "") != "denoise":
        pass
    pids, start_s = pids_of(shared), time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    failed = [update for update in updates if hasattr(update, "error")]
    assert time.monotonic() - start_s < 5.0
    assert len(failed) == 1
    assert isinstance(failed[0].error, WorkerDiedError)
    assert (failed[0].error.rank, failed[0].error.doing) == (1, "denoising")
    assert failed[0].error.last_span is not None
    assert not any(map(is_alive, pids))
    (video,) = shared.generate("again", seed=1, **QUICK)
    assert video.frames.shape[0] == QUICK["num_frames"]


# -- ranks that wait for each other inside torch --------------------------------------------------------------------


def test_a_rank_that_waits_in_torch_is_stopped_when_the_other_has_failed() -> None:
    executor = stuck_executor()
    executor.start(START_S)
    pids = executor.pids
    begin(executor, "")
    executor.send(STEP_1)
    events: list[messages.Event] = []
    while not events:
        events += executor.receive(5.0)
    assert isinstance(events[0], messages.CommandFailed)
    with pytest.raises(WorkerDiedError, match=r"worker 1 .*no answer within 1 s"):
        executor.receive(5.0)
    assert not any(map(is_alive, pids))


def test_a_rank_that_waits_in_torch_does_not_outlive_its_parent(tmp_path: Path) -> None:
    parent, pids = run_parent(tmp_path, "0 hang", "stuck_executor")
    with parent:
        time.sleep(0.5)  # for the workers to get into their wait
        assert all(map(is_alive, pids))
        parent.kill()
        parent.wait(10.0)
    assert await_that(lambda: not any(map(is_alive, pids)), 5.0)
