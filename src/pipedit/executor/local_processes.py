"""Workers as processes on this machine, one for each rank. Knows how they are started and how they ended."""

import collections
import contextlib
import dataclasses
import os
import secrets
import signal
import site
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipedit.core.errors import WorkerError
from pipedit.core.placement import Placement
from pipedit.executor.links import GRACE_S, Link, LinkedExecutor
from pipedit.worker.device import worker_devices
from pipedit.worker.greeting import KEY_BYTES
from pipedit.worker.group import Rendezvous
from pipedit.worker.machine import usable_cores
from pipedit.worker.service import STARTING, WorkerSpec
from pipedit.worker.settings import WorkerSettings

LOOPBACK = "127.0.0.1"
# A program of its own rather than a fork or multiprocessing's spawn: scripts without a __main__ guard work, and nothing
# of the caller's state (threads, CUDA contexts) comes along. -P: the current folder is no place to import from.
WORKER_PROGRAM = (sys.executable, "-P", "-m", "pipedit.worker")
_KEPT_LINES = 20
_LINE_BYTES = 65536


class LocalProcessExecutor(LinkedExecutor):
    """Starts a process for each rank of `placement`, which meet by torch.distributed's store: they exchange tensors by
    gloo on the CPU, by NCCL on CUDA.

    On the CPU the workers share the cores that this process may use, unless OMP_NUM_THREADS is set already. With CUDA
    each gets the device of its rank. After a WorkerDiedError, `start` makes fresh processes.

    Workers never outlive this process, however it ends: each watches its link in a thread of its own. What they write
    to stdout or stderr goes to this process's stderr.
    """

    def __init__(
        self,
        *,
        model: str,
        settings: WorkerSettings,
        placement: Placement,
        program: Sequence[str] = WORKER_PROGRAM,
        grace_s: float = GRACE_S,
    ) -> None:
        """`program` starts one worker; tests bring one without a model. `grace_s`: see pipedit.executor.links."""
        super().__init__(grace_s=grace_s)
        assert placement.world == tuple(range(len(placement.world))), placement
        self._model, self._settings, self._placement, self._program = model, settings, placement, tuple(program)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the workers that were started, by rank."""
        return tuple(link.pid for link in self._links if isinstance(link, ProcessLink))

    def _open_links(self, deadline_s: float) -> None:
        world_size = len(self._placement.world)
        devices = worker_devices(self._settings.device, world_size)
        environment, key = worker_environment(world_size), secrets.token_bytes(KEY_BYTES)
        with socket.create_server((LOOPBACK, 0), backlog=world_size) as store:
            for rank in self._placement.world:
                files = (store.fileno(),) if rank == 0 else ()
                self._links.append(ProcessLink(rank, program=self._program, environment=environment, files=files))
            for link in self._links:
                rendezvous = Rendezvous(
                    host=LOOPBACK,
                    port=store.getsockname()[1],
                    world_size=world_size,
                    own_address=LOOPBACK,
                    timeout_s=max(deadline_s - time.monotonic(), 1.0),
                    listening=store.fileno() if link.rank == 0 else None,
                )
                spec = WorkerSpec(
                    model=self._model,
                    settings=dataclasses.replace(self._settings, device=devices[link.rank]),
                    rank=link.rank,
                    placement=self._placement,
                    rendezvous=rendezvous if world_size > 1 else None,
                    key=key,
                )
                link.send(spec)


class ProcessLink(Link):
    """A rank in a child process."""

    def __init__(
        self, rank: int, *, program: Sequence[str], environment: Mapping[str, str], files: Sequence[int] = ()
    ) -> None:
        """`files`: numbers of open files that the child inherits. Raises WorkerError if it cannot be started."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*program, "--link", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,  # our stdout carries data, so nothing of theirs may go there
                    env=environment,
                    pass_fds=(theirs.fileno(), *files),
                )
            except OSError as error:
                ours.close()
                raise WorkerError(f"no process could be started: {error}", rank=rank, doing=STARTING) from error
        super().__init__(rank, ours)
        self._lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        self._echo = threading.Thread(target=self._pass_on_output, name=f"output of worker {rank}", daemon=True)
        self._echo.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _pass_on_output(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        while line := pipe.readline(_LINE_BYTES):
            text = line.decode(errors="replace")
            self._lines.append(text.rstrip())
            if sys.stderr is not None:
                with contextlib.suppress(OSError, ValueError):  # closed, or its reader is
                    sys.stderr.write(text)
                    sys.stderr.flush()
        pipe.close()

    def close(self) -> None:
        super().close()
        self._echo.join(1.0)  # a grandchild may keep the pipe open; then the thread stays with it

    @property
    def has_ended(self) -> bool:
        return self.gone is not None or self._process.poll() is not None

    @property
    def ending(self) -> str:
        if self.gone is not None and self.gone.reason:
            return self.gone.reason
        try:
            code = self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            return "its connection was closed, though its process still ran"
        if code >= 0:
            return f"exit code {code}"
        if code == -signal.SIGKILL:
            return "SIGKILL, which is also how the system ends processes when memory runs out"
        return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"

    @property
    def output(self) -> tuple[str, ...]:
        self._echo.join(0.5)  # what it wrote last may still be on its way
        return tuple(self._lines)

    def wait(self, timeout_s: float) -> bool:
        try:
            self._process.wait(max(timeout_s, 0.0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def worker_environment(workers_here: int) -> dict[str, str]:
    """Our own, with each worker's share of the cores, and with a place to import pipedit from where that is not among
    the installed packages."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(usable_cores() // workers_here, 1)))
    environment.setdefault("PYTHONFAULTHANDLER", "1")  # a crash says where
    home = str(Path(__file__).resolve().parents[2])
    if home not in (*site.getsitepackages(), site.getusersitepackages()):
        paths = [home, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment
