"""The hand-over between ranks: one puts tensors on its shelf, others fetch them over a socket when they are ready.

No collective and no tag, so a request that ends in between leaves nothing behind. Knows no commands and no models.
"""

import contextlib
import dataclasses
import datetime
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from pipedit.core.errors import WorkerError
from pipedit.worker.greeting import NotAuthenticError, admit, introduce, keep_watched
from pipedit.worker.group import Rendezvous

CONDITIONING, LATENTS = "conditioning", "latents"  # kinds of what is handed over
FETCH_TIMEOUT_S = 60.0
_GREETING_S = 5.0
_SERVE_S = 20.0  # from the question to the last byte of the answer; well below FETCH_TIMEOUT_S, so that others wait
_LOOK_S = 1.0
_QUESTION_BYTES = 4096  # at most
_LENGTH = struct.Struct("!I")
_ANSWER = struct.Struct("!?Q")  # whether it is there, and how many bytes follow

Tensors = dict[str, torch.Tensor]


class Store(Protocol):
    """What is needed of torch.distributed's stores."""

    def set(self, key: str, value: str, /) -> None: ...

    def wait(self, keys: list[str], timeout: datetime.timedelta, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbours:
    """How the shelves of a run find each other: each writes its address into `store`. `host`: which address of this
    rank the others reach. `key`: who knows it belongs to the run."""

    store: Store
    host: str
    key: bytes = dataclasses.field(repr=False)


class Shelf:
    """Tensors by request and kind, in host memory (on CUDA: pinned) until they are dropped.

    Memory: one copy of each, and, while a rank fetches, its bytes once more. With `neighbours`, a thread of its own
    hands out to one rank after the other, whatever the worker is at; without, only this rank can fetch. `put`, `fetch`
    and the like are called by one thread.
    """

    def __init__(self, *, rank: int, device: str, neighbours: Neighbours | None = None) -> None:
        self._rank, self._device, self._neighbours = rank, torch.device(device), neighbours
        self._entries: dict[str, dict[str, Tensors]] = {}
        self._lock = threading.Lock()
        self._addresses: dict[int, tuple[str, int]] = {}
        self._counter = None if neighbours is None else _Counter(rank, neighbours, self._find)

    def put(self, request_id: str, kind: str, tensors: Tensors) -> None:
        """Keeps copies, so the tensors may be changed afterwards. Waits for the device."""
        is_cuda = self._device.type == "cuda"
        copies = {}
        for name, tensor in tensors.items():
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_cuda)
            copies[name].copy_(tensor, non_blocking=True)
        if is_cuda:
            torch.cuda.synchronize(self._device)
        with self._lock:
            self._entries.setdefault(request_id, {})[kind] = copies

    def fetch(self, rank: int, request_id: str, kind: str, timeout_s: float = FETCH_TIMEOUT_S) -> Tensors:
        """What `rank` has put there, on this rank's device; on the CPU, the very tensors where `rank` is this one.
        Raises WorkerError if they are not there, or do not come within about `timeout_s`."""
        doing = f"fetching {kind} from worker {rank}"
        try:
            found = self._find(request_id, kind) if rank == self._rank else self._ask(rank, request_id, kind, timeout_s)
        except (NotAuthenticError, OSError, RuntimeError, SafetensorError, ValueError) as error:
            # torch's stores raise RuntimeErrors.
            reason = f"they did not come within {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
            raise WorkerError(reason, rank=self._rank, doing=doing) from error
        if found is None:
            missing = f"worker {rank} has none for {request_id}: they were released, or never put there"
            raise WorkerError(missing, rank=self._rank, doing=doing)
        return {name: tensor.to(self._device) for name, tensor in found.items()}

    def drop(self, request_id: str) -> None:
        """Nothing of the request is kept any more. Legal at any time."""
        with self._lock:
            self._entries.pop(request_id, None)

    def drop_kind(self, request_id: str, kind: str) -> None:
        """This is not kept any more. Legal at any time."""
        with self._lock:
            self._entries.get(request_id, {}).pop(kind, None)

    @property
    def held_bytes(self) -> int:
        with self._lock:
            kinds = [tensors for entry in self._entries.values() for tensors in entry.values()]
        return sum(tensor.nbytes for tensors in kinds for tensor in tensors.values())

    def close(self) -> None:
        """Ends the thread and its sockets. Can be called twice."""
        if self._counter is not None:
            self._counter.close()

    def _find(self, request_id: str, kind: str) -> Tensors | None:
        with self._lock:
            return self._entries.get(request_id, {}).get(kind)

    def _ask(self, rank: int, request_id: str, kind: str, timeout_s: float) -> Tensors | None:
        deadline_s = time.monotonic() + timeout_s
        assert self._neighbours is not None, f"worker {self._rank} knows no worker {rank}"
        with socket.create_connection(self._address(rank, timeout_s), timeout=timeout_s) as end:
            keep_watched(end)
            introduce(end, self._neighbours.key, _left(deadline_s))
            question = json.dumps([request_id, kind]).encode()
            end.settimeout(_left(deadline_s))
            end.sendall(_LENGTH.pack(len(question)) + question)
            is_there, size = _ANSWER.unpack(_receive(end, _ANSWER.size, deadline_s))
            return load(bytes(_receive(end, size, deadline_s))) if is_there else None

    def _address(self, rank: int, timeout_s: float) -> tuple[str, int]:
        if rank not in self._addresses:
            assert self._neighbours is not None
            store, name = self._neighbours.store, _name_of(rank)
            store.wait([name], datetime.timedelta(seconds=timeout_s))
            host, port = json.loads(store.get(name))
            self._addresses[rank] = (str(host), int(port))
        return self._addresses[rank]


class _Counter(threading.Thread):
    """Hands out what is on a shelf to whoever knows the key, one after the other."""

    def __init__(self, rank: int, neighbours: Neighbours, find: Callable[[str, str], Tensors | None]) -> None:
        super().__init__(name=f"shelf of worker {rank}", daemon=True)
        self._key, self._find, self._is_over = neighbours.key, find, False
        self._caller: socket.socket | None = None
        family = socket.getaddrinfo(neighbours.host, None, type=socket.SOCK_STREAM)[0][0]
        self._door = socket.create_server((neighbours.host, 0), family=family, backlog=128)
        self._door.settimeout(_LOOK_S)
        self.start()
        neighbours.store.set(_name_of(rank), json.dumps([neighbours.host, self._door.getsockname()[1]]))

    def run(self) -> None:
        while not self._is_over:
            with contextlib.suppress(OSError):  # nobody came, or `close` has shut the door
                end, _ = self._door.accept()
                with end:
                    self._caller = end
                    # Whatever it is, the caller notices, and others still want to be served.
                    with contextlib.suppress(Exception):
                        self._serve(end)
                    self._caller = None

    def _serve(self, end: socket.socket) -> None:
        keep_watched(end)
        admit(end, self._key, _GREETING_S)
        deadline_s = time.monotonic() + _SERVE_S
        (size,) = _LENGTH.unpack(_receive(end, _LENGTH.size, deadline_s))
        if size > _QUESTION_BYTES:
            raise ValueError("too long a question")
        request_id, kind = json.loads(_receive(end, size, deadline_s))
        found = self._find(request_id, kind)
        answer = b"" if found is None else save(found)
        end.settimeout(_left(deadline_s))
        end.sendall(_ANSWER.pack(found is not None, len(answer)))
        end.sendall(answer)

    def close(self) -> None:
        self._is_over = True
        for each in (self._door, self._caller):
            if each is not None:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self.join(2 * _GREETING_S)
        self._door.close()


def reachable_address(rendezvous: Rendezvous) -> str:
    """Which address of this rank the others reach: the one that is known, or else the one on the way to the store."""
    if rendezvous.own_address is not None:
        return rendezvous.own_address
    family, kind, _, _, store = socket.getaddrinfo(rendezvous.host, rendezvous.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(store)  # sends nothing
        return str(probe.getsockname()[0])


def _name_of(rank: int) -> str:
    return f"shelf/{rank}"


def _receive(end: socket.socket, size: int, deadline_s: float) -> bytearray:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        end.settimeout(_left(deadline_s))
        count = end.recv_into(view[got:])
        if count == 0:
            raise ConnectionError("the connection was closed")
        got += count
    return data


def _left(deadline_s: float) -> float:
    """Seconds until then; never 0, which would mean something else."""
    return max(deadline_s - time.monotonic(), 0.001)
