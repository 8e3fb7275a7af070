"""Ranks that a launcher has started (torchrun, or whatever sets the same variables), on one machine or several.

Rank 0 is the controller: it runs the engine, and starts worker 0 as a child process, so that the engine can act
whatever that worker is at. Every other rank serves (`follow`) until rank 0 stops it. The launcher's store tells them
where rank 0 listens and hands out the key of this run.
"""

import contextlib
import dataclasses
import datetime
import ipaddress
import json
import math
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from pipedit.core.errors import InvalidRequestError, PipeditError, WorkerError
from pipedit.core.placement import Placement
from pipedit.executor.links import GRACE_S, Link, LinkedExecutor
from pipedit.executor.local_processes import LOOPBACK, WORKER_PROGRAM, ProcessLink, worker_environment
from pipedit.worker.greeting import KEY_BYTES, NotAuthenticError, admit, introduce, keep_watched
from pipedit.worker.group import Rendezvous
from pipedit.worker.process import HangUpWatch, end_abandoned
from pipedit.worker.service import STARTING, AskClock, Build, WorkerSpec, build_worker, serve
from pipedit.worker.settings import WorkerSettings

JOIN_TIMEOUT_S = 3600.0  # rank 0 may have to download a model before it asks for workers
_GREETING_S = 5.0
_LOOK_S = 0.2
_CLOCK_QUESTIONS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher says. `address` is that of rank 0's machine; `local_*` count on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str

    @property
    def is_one_machine(self) -> bool:
        return self.local_world_size == self.world_size

    @property
    def meeting_address(self) -> str:
        """Where the other ranks reach rank 0. On one machine nobody else shall."""
        return LOOPBACK if self.is_one_machine else self.address


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """None unless a launcher has started several ranks of this program. Raises InvalidRequestError for variables that
    make no sense."""
    if any(not environment.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None
    try:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_world_size = int(environment.get("LOCAL_WORLD_SIZE", world_size))
        local_rank = int(environment.get("LOCAL_RANK", rank))
    except ValueError as error:
        raise InvalidRequestError([f"RANK, WORLD_SIZE and the like must be whole numbers: {error}"]) from None
    if not 0 <= rank < world_size:
        raise InvalidRequestError([f"the launcher says RANK={rank}, but WORLD_SIZE={world_size}"])
    if world_size == 1:
        return None
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        address=environment["MASTER_ADDR"],
    )


# -- rank 0 -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hello:
    """A rank introduces itself. `gpu` is the index of its CUDA device, should it be asked to use one."""

    rank: int
    gpu: int


class FollowerLink(Link):
    """A rank in a process that the launcher has started. `here` and `there` are the addresses of both ends."""

    def __init__(self, end: socket.socket, hello: Hello) -> None:
        super().__init__(hello.rank, end)
        self.gpu = hello.gpu
        self.here, self.there = end.getsockname()[0], end.getpeername()[0]

    def compare_clocks(self) -> None:
        """Sets `clock_offset_s`, from the question that was answered fastest. Before `begin`."""
        answers = []
        for _ in range(_CLOCK_QUESTIONS):
            asked_s = time.perf_counter()
            self.connection.send(AskClock())
            if not self.connection.poll(_GREETING_S):
                raise TimeoutError
            shown_s, back_s = self.connection.recv().now_s, time.perf_counter()
            answers.append((back_s - asked_s, (asked_s + back_s) / 2 - shown_s))
        _, self.clock_offset_s = min(answers)


class LaunchedExecutor(LinkedExecutor):
    """For rank 0, while the other ranks call `follow`. It cannot be started again after a WorkerDiedError: only the
    launcher could start the other ranks anew."""

    _patience_with_busy_s = math.inf  # a rank that is ended counts as a failure of the whole job

    def __init__(
        self,
        *,
        launch: Launch,
        model: str,
        settings: WorkerSettings,
        placement: Placement,
        program: Sequence[str] = WORKER_PROGRAM,
        grace_s: float = GRACE_S,
    ) -> None:
        super().__init__(grace_s=grace_s)
        assert launch.rank == 0 and len(placement.world) == launch.world_size, (launch, placement)
        self._launch, self._program = launch, tuple(program)
        self._model, self._settings, self._placement = model, settings, placement
        self._was_started = False
        self._store: Any = None
        self._key = secrets.token_bytes(KEY_BYTES)

    def _open_links(self, deadline_s: float) -> None:
        if self._was_started:
            raise PipeditError("workers that a launcher has started cannot be started again; run the whole job again")
        self._was_started = True
        self._store = _launchers_store(deadline_s - time.monotonic())
        launch = self._launch
        host = LOOPBACK if launch.is_one_machine else ""
        family = socket.getaddrinfo(launch.meeting_address, None, type=socket.SOCK_STREAM)[0][0]
        with (
            socket.create_server((host, 0), family=family, backlog=launch.world_size) as store,
            socket.create_server((host, 0), family=family, backlog=launch.world_size) as door,
        ):
            environment = worker_environment(launch.local_world_size)
            self._links.append(ProcessLink(0, program=self._program, environment=environment, files=[store.fileno()]))
            followers = self._let_in(door, deadline_s)
            self._links += followers
            for link in self._links:
                link.send(self._spec(link, followers, store, deadline_s))

    def _let_in(self, door: socket.socket, deadline_s: float) -> list[FollowerLink]:
        """Announces the door, and waits until every other rank has come in."""
        address, port = self._launch.meeting_address, door.getsockname()[1]
        announcement = {"host": address, "port": port, "key": self._key.hex()}
        self._store.set(_next_announcement(self._store, 0), json.dumps(announcement))
        came: dict[int, FollowerLink] = {}
        with contextlib.ExitStack() as unless_all_came:
            while len(came) < self._launch.world_size - 1:
                door.settimeout(max(deadline_s - time.monotonic(), 0.001))
                try:
                    end, _ = door.accept()
                except TimeoutError:
                    raise _not_joined([r for r in range(1, self._launch.world_size) if r not in came]) from None
                if (link := _greet(end, self._key, is_far=not self._launch.is_one_machine)) is not None:
                    unless_all_came.callback(link.close)
                    if link.rank in came or not 0 < link.rank < self._launch.world_size:
                        raise _not_expected(link.rank, self._launch.world_size)
                    came[link.rank] = link
            unless_all_came.pop_all()
        return [came[rank] for rank in sorted(came)]

    def _spec(
        self, link: Link, followers: Sequence[FollowerLink], store: socket.socket, deadline_s: float
    ) -> WorkerSpec:
        """Addresses are those over which the ranks have met: they are known to work."""
        ours = min((follower.here for follower in followers), key=_is_loopback)
        if isinstance(link, FollowerLink):
            host, own, gpu = link.here, link.there, link.gpu
            if _is_loopback(own):  # on this machine, which others reach by another address, if there are any
                own = ours
        else:
            host = own = ours
            gpu = _gpu_of(self._launch)
        is_cuda = self._settings.device.startswith("cuda")
        knows_own = self._launch.is_one_machine or not _is_loopback(own)
        return WorkerSpec(
            model=self._model,
            settings=dataclasses.replace(self._settings, device=f"cuda:{gpu}") if is_cuda else self._settings,
            rank=link.rank,
            placement=self._placement,
            rendezvous=Rendezvous(
                host=host,
                port=store.getsockname()[1],
                world_size=self._launch.world_size,
                own_address=own if knows_own else None,
                timeout_s=max(deadline_s - time.monotonic(), 1.0),
                listening=store.fileno() if link.rank == 0 else None,
            ),
            key=self._key,
        )


def _greet(end: socket.socket, key: bytes, *, is_far: bool) -> FollowerLink | None:
    """The link to whoever has called, or None for a stranger."""
    try:
        keep_watched(end)
        admit(end, key, _GREETING_S)
        with Connection(os.dup(end.fileno())) as connection:
            if not connection.poll(_GREETING_S):
                raise TimeoutError
            hello = connection.recv()
        link = FollowerLink(end, hello)
        if is_far:  # on one machine all processes share a clock
            link.compare_clocks()
    except (NotAuthenticError, EOFError, OSError):
        end.close()
        return None
    return link


def _not_expected(rank: int, world_size: int) -> WorkerError:
    """For a caller who knows the key of this run, but whose rank is here already, or is none of the others'."""
    if 0 < rank < world_size:
        problem = f"two processes have joined with RANK={rank}"
    else:
        problem = f"a process has joined with RANK={rank}, which is not one of 1 to {world_size - 1}"
    return WorkerError(
        f"{problem}; the launcher must give each of the {world_size} processes a RANK of its own",
        rank=rank,
        doing=STARTING,
    )


def _not_joined(ranks: Sequence[int]) -> WorkerError:
    named = "rank" if len(ranks) == 1 else "ranks"
    return WorkerError(
        f"{named} {', '.join(map(str, ranks))} did not join; every rank of the launcher must run the same program, "
        "and use the engine in it",
        rank=ranks[0],
        doing=STARTING,
    )


# -- the other ranks ----------------------------------------------------------------------------------------------


def follow(launch: Launch, *, build: Build = build_worker, timeout_s: float = JOIN_TIMEOUT_S) -> None:
    """Serves as worker `launch.rank` until rank 0 has done its work. Raises PipeditError where that never begins. If
    rank 0 goes away without a word, this process ends with exit code 3, in whatever it is."""
    end = _find_controller(launch, time.monotonic() + timeout_s)
    watch = HangUpWatch(end.fileno())
    with contextlib.closing(end), Connection(os.dup(end.fileno())) as link, _ignoring_interrupts():
        hello = Hello(rank=launch.rank, gpu=_gpu_of(launch))
        watch.start()
        try:
            link.send(hello)
            has_started = serve(link, build)
        except (EOFError, ConnectionError):
            end_abandoned()
        finally:
            watch.end()
    if not has_started:
        raise PipeditError(f"worker {launch.rank} could not start; rank 0 says why")


def _find_controller(launch: Launch, deadline_s: float) -> socket.socket:
    store = _launchers_store(deadline_s - time.monotonic())
    name = _next_announcement(store, launch.rank)
    while not store.check([name]):  # by looking, because a wait inside torch would hold up signals
        if time.monotonic() >= deadline_s:
            raise PipeditError(f"rank {launch.rank} waited in vain for rank 0 to begin")
        time.sleep(_LOOK_S)
    said = json.loads(store.get(name))
    try:
        end = socket.create_connection((said["host"], said["port"]), timeout=_GREETING_S)
        keep_watched(end)
        introduce(end, bytes.fromhex(said["key"]), _GREETING_S)
    except (NotAuthenticError, OSError) as error:
        where = f"{said['host']} port {said['port']}"
        raise PipeditError(f"rank {launch.rank} cannot reach rank 0 at {where}: {error}") from error
    return end


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Ctrl-C goes to every process of a terminal. Rank 0 decides what it means."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# -- both ---------------------------------------------------------------------------------------------------------


# By address and port, for as long as the process lives: where the launcher keeps no store of its own, rank 0's is in
# its process, and one that is opened anew for a second engine would be missed by ranks that still reach the first.
_stores: dict[tuple[str, str], Any] = {}


def _launchers_store(timeout_s: float) -> Any:
    """The store that every rank of the launcher reaches, under names of our own. Imports torch."""
    import torch.distributed as dist

    place = (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    if place not in _stores:
        timeout = datetime.timedelta(seconds=max(timeout_s, 1.0))
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))  # type: ignore[attr-defined]
        _stores[place] = dist.PrefixStore("pipedit", store)  # type: ignore[attr-defined]
    return _stores[place]


def _next_announcement(store: Any, rank: int) -> str:
    """The name under which rank 0 announces itself. Every rank uses its engines in the same order, so each counts its
    own."""
    return f"controller/{store.add(f'engines/{rank}', 1)}"


def _gpu_of(launch: Launch) -> int:
    """Each rank its own, unless the launcher lets every rank see only one."""
    import torch

    return launch.local_rank if torch.cuda.device_count() > 1 else 0


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
