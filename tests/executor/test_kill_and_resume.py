"""Real processes, killed with signal 9 at any time: `--resume` makes the frames of a run that nobody disturbed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

TIMEOUT_S = 120.0
VIDEO = (
    "a red ball moves right", "--strategy", "dualparal", "--num-workers", "2", "--block-size", "3", "--device", "cpu",
    "--num-frames", "81", "--num-inference-steps", "8", "--seed", "5",
)  # fmt: skip


def generate(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pipedit", "generate", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def end_of(process: "subprocess.Popen[str]") -> tuple[int, str]:
    try:
        _, said = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    return process.returncode, said


def newest(run: Path) -> int:
    """The newest snapshot that is complete; 0: there is none."""
    return max((int(path.parent.name) for path in run.glob("*/complete.json")), default=0)


def await_newer(run: Path, than: int, process: "subprocess.Popen[str]") -> None:
    await_that(lambda: newest(run) > than, process)


def await_that(is_so: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline_s, "it never came to that"
        assert process.poll() is None, f"it has ended: {end_of(process)}"
        time.sleep(0.005)


def kill(process: "subprocess.Popen[str]", victim: str) -> tuple[int, str]:
    """The controller, or the worker of that number; waits until nobody is left."""
    everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    workers = [one for one in everybody[1:] if "worker" in " ".join(one.cmdline())]
    target = everybody[0] if victim == "controller" else workers[int(victim)]
    os.kill(target.pid, signal.SIGKILL)
    code, said = end_of(process)
    _, left = psutil.wait_procs(everybody, timeout=15.0)
    assert not left, f"orphans: {left}"
    return code, said


@pytest.mark.slow
def test_a_run_of_many_lives(tmp_path: Path) -> None:
    run, whole, again = tmp_path / "run", tmp_path / "whole.npy", tmp_path / "again.npy"
    code, said = end_of(generate(*VIDEO, "-o", str(whole)))
    assert code == 0, said

    first = generate(*VIDEO, "-o", str(again), "--checkpoint", str(run), "--checkpoint-every", "1")
    await_that((run / "request.json").is_file, first)
    kill(first, "controller")  # while the model is loaded
    assert newest(run) == 0

    reached = 0
    for victim in ("0", "controller", "1"):
        life = generate("--resume", str(run))
        await_newer(run, reached, life)
        code, said = kill(life, victim)
        reached = newest(run)
        if victim != "controller":
            assert code == 1 and f"worker {victim} died" in said
            assert f"pipedit generate --resume {run}" in said
    assert not again.exists()

    code, said = end_of(generate("--resume", str(run)))
    assert code == 0, said
    assert f"going on after {reached} steps of blocks" in said
    assert np.array_equal(np.load(again), np.load(whole))
    assert len(np.load(again)) == 81
