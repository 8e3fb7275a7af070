"""Executors over fake workers, commands for them, and what is left of processes."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from pipedit.core import messages
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.executor.links import LinkedExecutor
from pipedit.executor.local_processes import LocalProcessExecutor
from pipedit.models.adapter import Precision
from pipedit.worker.settings import WorkerSettings

FAKE_WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
STUCK_WORKER = (sys.executable, str(Path(__file__).with_name("stuck_worker.py")))
FLOAT32 = Precision(text_encoder="float32", transformer="float32", vae="float32")
SETTINGS = WorkerSettings(device="cpu", precision=FLOAT32)
BOTH = (0, 1)
START_S = 30.0  # far more than it takes, because other work may share the processor


def fake_executor(start: str = "", *, num_workers: int = 2, grace_s: float = 1.0) -> LocalProcessExecutor:
    """`start` says who does what instead of loading, see fake_worker.py."""
    return LocalProcessExecutor(
        model=start,
        settings=SETTINGS,
        placement=Placement.colocated(num_workers),
        program=FAKE_WORKER,
        grace_s=grace_s,
    )


def stuck_executor() -> LocalProcessExecutor:
    return LocalProcessExecutor(
        model="", settings=SETTINGS, placement=Placement.colocated(2), program=STUCK_WORKER, grace_s=1.0
    )


@contextlib.contextmanager
def started(executor: LocalProcessExecutor) -> Iterator[LocalProcessExecutor]:
    executor.start(START_S)
    try:
        yield executor
    finally:
        executor.stop(5.0)


def call(executor: LinkedExecutor, command: messages.Command) -> list[messages.Event]:
    """Sends the command and waits for what every rank says to it."""
    executor.send(command)
    events: list[messages.Event] = []
    deadline_s = time.monotonic() + START_S
    while len(events) < len(command.ranks):
        assert time.monotonic() < deadline_s, f"only {events} after {START_S} s"
        events += executor.receive(1.0)
    return events


def begin(executor: LinkedExecutor, prompt: str, ranks: Sequence[int] = BOTH) -> None:
    """Up to before step 1, in which the fake workers do what the prompt says."""
    request = VideoRequest(prompt=prompt)
    call(executor, messages.Encode(request_id="a", ranks=tuple(ranks), request=request))
    call(executor, messages.Denoise(request_id="a", ranks=tuple(ranks), request=request, step=0))


ANY = VideoRequest(prompt="")  # what the fake workers do was said when they encoded
STEP_1 = messages.Denoise(request_id="a", ranks=BOTH, request=ANY, step=1)


def is_alive(pid: int) -> bool:
    """Zombies, which only wait for a parent to ask after them, do not count."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def await_that(condition: Callable[[], bool], within_s: float) -> bool:
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


PARENT = """
import sys
import time
from tests.executor.stand_ins import START_S, STEP_1, begin, {maker}
executor = {maker}()  # no __main__ guard, and never stopped
executor.start(START_S)
begin(executor, sys.argv[1])
executor.send(STEP_1)
print(*executor.pids, flush=True)
if sys.argv[1]:
    time.sleep(60)
"""


def run_parent(tmp_path: Path, prompt: str, maker: str = "fake_executor") -> tuple["subprocess.Popen[str]", list[int]]:
    """A process that starts workers by one of the functions in stand_ins, and the ids of these."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(maker=maker))
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, script, prompt],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert parent.stdout is not None
    return parent, [int(pid) for pid in parent.stdout.readline().split()]
