"""Ranks that a launcher has started: they find each other, serve, and end together."""

import collections
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipedit.core.errors import InvalidRequestError, WorkerError
from pipedit.core.placement import Placement
from pipedit.engine.engine import Engine
from pipedit.executor.launched import Hello, Launch, LaunchedExecutor, find_launch
from pipedit.worker.greeting import NotAuthenticError, admit, introduce
from pipedit.worker.group import Rendezvous, interface_of, join_group
from tests import tiny_pipelines
from tests.executor.stand_ins import SETTINGS, await_that, is_alive

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
VARIABLES = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29500",
}
QUICK = tiny_pipelines.QUICK_SETTINGS["wan"]

# -- what the launcher says -----------------------------------------------------------------------------------------


def test_a_launch_is_read_from_its_variables() -> None:
    launch = find_launch(VARIABLES)
    assert launch == Launch(rank=1, world_size=4, local_rank=1, local_world_size=2, address="node-a")
    assert (launch.is_one_machine, launch.meeting_address) == (False, "node-a")
    one_machine = find_launch(VARIABLES | {"LOCAL_WORLD_SIZE": "4"})
    assert one_machine is not None
    assert one_machine.meeting_address == "127.0.0.1", "nobody outside shall reach it"


@pytest.mark.parametrize(
    "variables", [{}, VARIABLES | {"MASTER_PORT": ""}, VARIABLES | {"WORLD_SIZE": "1", "RANK": "0"}]
)
def test_one_rank_or_none_is_no_launch(variables: Mapping[str, str]) -> None:
    assert find_launch(variables) is None


@pytest.mark.parametrize("wrong", [{"RANK": "x"}, {"RANK": "4"}, {"RANK": "-1"}])
def test_variables_that_make_no_sense_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match="RANK"):
        find_launch(VARIABLES | wrong)


def test_another_number_of_workers_than_the_launcher_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequestError, match="num_workers=3, but the launcher started 4 ranks"):
        Engine(device="cpu", num_workers=3)
    with Engine(device="cpu", num_workers=1) as engine:  # in this process, whatever the launcher did
        assert engine.settings.num_workers == 1


# -- how they find each other ---------------------------------------------------------------------------------------


def greet(key_here: bytes, key_there: bytes) -> list[str]:
    """What goes wrong on both ends."""
    problems = []
    here, there = socket.socketpair()

    def caller() -> None:
        try:
            introduce(there, key_there, 2.0)
        except NotAuthenticError:
            problems.append("caller")

    with here, there:
        thread = threading.Thread(target=caller)
        thread.start()
        try:
            admit(here, key_here, 1.0)
        except NotAuthenticError:
            problems.append("called")
        here.shutdown(socket.SHUT_RDWR)
        thread.join(5.0)
    return problems


def test_only_who_knows_the_key_is_let_in() -> None:
    key = secrets.token_bytes(32)
    assert greet(key, key) == []
    assert sorted(greet(key, secrets.token_bytes(32))) == ["called", "caller"]


def test_a_caller_who_says_nothing_is_not_waited_for() -> None:
    here, there = socket.socketpair()
    with here, there:
        start_s = time.monotonic()
        with pytest.raises(NotAuthenticError):
            admit(here, b"key", 0.2)
        assert time.monotonic() - start_s < 2.0


def test_interfaces_are_found_by_their_address() -> None:
    name = interface_of("127.0.0.1")
    assert name is not None
    assert name in {name for _, name in socket.if_nameindex()}
    assert interface_of("::ffff:127.0.0.1") == name
    assert interface_of("192.0.2.1") is None


NAMELESS = """
from tests.executor.stand_ins import START_S, stuck_executor
executor = stuck_executor()
executor.start(START_S)
executor.stop(5.0)
"""


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs a host name of its own")
def test_workers_meet_where_the_name_of_the_machine_means_nothing() -> None:
    command = 'hostname no-such-machine.invalid && exec "$@"'
    done = subprocess.run(
        ["unshare", "--uts", "sh", "-c", command, "sh", sys.executable, "-c", NAMELESS],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "unshare failed" in done.stderr:
        pytest.skip("not allowed to make a name space")
    assert done.returncode == 0, done.stderr


class StandInStore:
    """What the ranks of a launcher tell each other, in this process."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._counts: collections.Counter[str] = collections.Counter()
        self.was_set = threading.Event()

    def add(self, name: str, amount: int) -> int:
        self._counts[name] += amount
        return self._counts[name]

    def set(self, name: str, value: str) -> None:
        self._values[name] = value
        self.was_set.set()

    @property
    def announcement(self) -> dict[str, Any]:
        assert self.was_set.wait(5.0)
        found: dict[str, Any] = json.loads(*self._values.values())
        return found


def call_in(store: StandInStore, ranks: Sequence[int], ends: list[socket.socket]) -> None:
    """Comes to the door once for each rank."""
    said = store.announcement
    for rank in ranks:
        ends.append(end := socket.create_connection((said["host"], said["port"]), timeout=5.0))
        introduce(end, bytes.fromhex(said["key"]), 5.0)
        with Connection(os.dup(end.fileno())) as connection:
            connection.send(Hello(rank=rank, gpu=0))


def let_in(*ranks: int) -> list[int]:
    """The ranks that rank 0 of three has let in, when these have called."""
    launch = Launch(rank=0, world_size=3, local_rank=0, local_world_size=3, address="127.0.0.1")
    executor = LaunchedExecutor(launch=launch, model="", settings=SETTINGS, placement=Placement.colocated(3))
    executor._store = StandInStore()
    ends: list[socket.socket] = []
    caller = threading.Thread(target=call_in, args=(executor._store, ranks, ends))
    try:
        with socket.create_server(("127.0.0.1", 0)) as door:
            caller.start()
            links = executor._let_in(door, time.monotonic() + 5.0)
            for link in links:
                link.close()
        return [link.rank for link in links]
    finally:
        caller.join(10.0)
        for end in ends:
            end.close()


def test_every_rank_is_let_in_once() -> None:
    assert let_in(2, 1) == [1, 2]
    with pytest.raises(WorkerError, match="two processes have joined with RANK=1; the launcher must"):
        let_in(1, 1)
    for rank in (0, 3):
        with pytest.raises(WorkerError, match=f"RANK={rank}, which is not one of 1 to 2"):
            let_in(rank)


GONE_BEFORE_HELLO = """
import socket
from pipedit.executor import launched

here, there = socket.socketpair()
there.close()
launched._find_controller = lambda launch, deadline_s: here
launched._gpu_of = lambda launch: 0
launched.HangUpWatch.start = lambda watch: None  # so late that it has noticed nothing yet
launched.HangUpWatch.end = lambda watch: None
launched.follow(launched.Launch(rank=1, world_size=2, local_rank=1, local_world_size=2, address="127.0.0.1"))
"""


def test_a_rank_whose_controller_is_gone_before_it_has_said_hello_ends_as_any_other() -> None:
    done = subprocess.run([sys.executable, "-c", GONE_BEFORE_HELLO], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False), done.stderr


def test_an_interface_that_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    with socket.create_server(("127.0.0.1", 0)) as store:
        rendezvous = Rendezvous(
            host="127.0.0.1",
            port=store.getsockname()[1],
            world_size=1,
            own_address="127.0.0.1",
            timeout_s=10.0,
            listening=store.detach(),  # torch closes it
        )
        with pytest.raises(RuntimeError, match="no-such-interface"):
            join_group(rendezvous, device="cpu")


# -- with workers that need no model --------------------------------------------------------------------------------

LAUNCHED = """
import sys
from pipedit.core.errors import WorkerDiedError
from pipedit.core.placement import Placement
from pipedit.executor.launched import LaunchedExecutor, find_launch, follow
from tests.executor.fake_worker import FakeWorker
from tests.executor.stand_ins import FAKE_WORKER, SETTINGS, START_S, STEP_1, begin, call

launch = find_launch()
for prompt in sys.argv[1:]:  # an executor for each, one after the other
    if launch.rank > 0:
        follow(launch, build=FakeWorker)
        print("served", flush=True)
        continue
    executor = LaunchedExecutor(
        launch=launch, model="", settings=SETTINGS, placement=Placement.colocated(2), program=FAKE_WORKER
    )
    executor.start(START_S)
    begin(executor, prompt)
    print(executor._links[0].pid, executor._links[1].clock_offset_s, flush=True)
    try:
        call(executor, STEP_1)
    except WorkerDiedError as error:
        print("worker", error.rank, "died", flush=True)
    executor.stop(5.0)
"""


@contextlib.contextmanager
def launched(tmp_path: Path, *prompts: str, **variables: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """Two ranks of LAUNCHED, as a launcher would start them."""
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), **variables}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, script, *prompts],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate(timeout=10.0)


def next_line(process: "subprocess.Popen[str]") -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def test_ranks_serve_one_engine_after_the_other_and_a_rank_that_dies_is_named_at_rank_0(tmp_path: Path) -> None:
    with launched(tmp_path, "fine", "1 hang") as (first, second):
        assert len(next_line(first)) == 2
        assert next_line(second) == ["served"]
        assert len(next_line(first)) == 2
        second.kill()
        start_s = time.monotonic()
        assert next_line(first) == ["worker", "1", "died"]
        assert first.wait(5.0) == 0
        assert time.monotonic() - start_s < 5.0


def test_ranks_on_several_machines_serve_and_all_end_with_rank_0(tmp_path: Path) -> None:
    with launched(tmp_path, "fine", "1 hang", LOCAL_WORLD_SIZE="1") as (first, second):
        _, offset_s = next_line(first)
        assert abs(float(offset_s)) < 0.05, "in truth they share a clock"
        assert next_line(second) == ["served"]
        pid = int(next_line(first)[0])
        assert is_alive(pid)
        first.kill()
        assert second.wait(5.0) == 3
        assert await_that(lambda: not is_alive(pid), 5.0)


# -- the real thing -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(tiny_folder: Callable[[str], Path]) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    with Engine(tiny_folder("wan"), device="cpu", num_workers=1) as engine:
        (video,) = engine.generate("a red ball", seed=2, **QUICK)
    return video.frames.astype(int)


SCRIPT = """
import runpy
import sys
import numpy as np
import pipedit

with pipedit.Engine(sys.argv[1], device="cpu") as engine:
    settings = dict(height=32, width=48, num_frames=9, num_inference_steps=3, max_sequence_length=32)
    videos = list(engine.generate("a red ball", seed=2, guidance_scale=5.0, **settings))
    assert engine.settings.num_workers == 2
for video in videos:
    np.save("script.npy", video.frames)
print(len(videos), flush=True)

sys.argv = ["pipedit", *sys.argv[2:]]
runpy.run_module("pipedit", run_name="__main__")
"""


def test_a_script_and_the_command_line_under_torchrun(
    tiny_folder: Callable[[str], Path], tmp_path: Path, expected: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]"
) -> None:
    """Both in one go, because torchrun takes long to start; so the command line is the second engine of its ranks."""
    (tmp_path / "script.py").write_text(SCRIPT)
    model = str(tiny_folder("wan"))
    flags = [part for name, value in QUICK.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run(
        [
            *TORCHRUN, "script.py", model,
            "generate", "a red ball", "--seed", "2", "-m", model, "--device", "cpu", "-o", "command.npy", *flags,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["0", "1", "command.npy"], "rank 1 only serves"
    for name in ("script.npy", "command.npy"):
        assert np.abs(np.load(tmp_path / name) - expected).max() <= 1
