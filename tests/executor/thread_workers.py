"""Real workers as threads of this process: everything is as it is in processes of their own (links, serve loop, store,
gloo, shelves), but they start in a moment, and a test can look into them."""

import contextlib
import dataclasses
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from pipedit.core import messages
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.core.spans import Span
from pipedit.engine.engine import Engine
from pipedit.executor.links import Link, LinkedExecutor
from pipedit.executor.local_processes import LOOPBACK
from pipedit.models.adapter import ModelAdapter
from pipedit.worker.block_worker import BlockWorker
from pipedit.worker.greeting import KEY_BYTES
from pipedit.worker.group import Rendezvous
from pipedit.worker.service import WorkerSpec, build_worker, serve
from pipedit.worker.settings import WorkerSettings
from pipedit.worker.worker import Worker

_LOADING = threading.Lock()  # loading is not made for several threads
_END_S = 10.0


class ThreadExecutor(LinkedExecutor):
    """`workers` by rank. `latents`: what each decoder began to decode, by the prompt and its rank."""

    def __init__(self, *, model: str, settings: WorkerSettings, placement: Placement) -> None:
        super().__init__()
        self._model, self._settings, self._placement = model, settings, placement
        self.workers: dict[int, Worker] = {}
        self.latents: dict[tuple[str, int], torch.Tensor] = {}

    def _open_links(self, deadline_s: float) -> None:
        world_size = len(self._placement.world)
        store, key = socket.create_server((LOOPBACK, 0), backlog=world_size), secrets.token_bytes(KEY_BYTES)
        port = store.getsockname()[1]
        for rank in self._placement.world:
            rendezvous = Rendezvous(
                host=LOOPBACK,
                port=port,
                world_size=world_size,
                own_address=None,  # else this process's environment would be changed
                timeout_s=max(deadline_s - time.monotonic(), 1.0),
                listening=store.detach() if rank == 0 and world_size > 1 else None,  # torch closes it
            )
            spec = WorkerSpec(
                model=self._model,
                settings=self._settings,
                rank=rank,
                placement=self._placement,
                rendezvous=rendezvous if world_size > 1 else None,
                key=key,
            )
            self._links.append(_ThreadLink(rank, self))
            self._links[-1].send(spec)
        store.close()

    def build(self, spec: WorkerSpec) -> "_Watched":
        worker = build_worker(spec)
        assert isinstance(worker, (Worker, BlockWorker))
        self.workers[spec.rank] = worker  # type: ignore[assignment] # nobody looks into both kinds
        return _Watched(worker, spec.rank, self.latents)


class _ThreadLink(Link):
    def __init__(self, rank: int, executor: ThreadExecutor) -> None:
        ours, theirs = socket.socketpair()
        super().__init__(rank, ours)
        self._server = threading.Thread(target=self._serve, args=(theirs, executor), name=f"rank {rank}")
        self._server.start()

    def _serve(self, end: socket.socket, executor: ThreadExecutor) -> None:
        with end, Connection(os.dup(end.fileno())) as link, contextlib.suppress(EOFError, OSError):
            serve(link, executor.build)

    def close(self) -> None:
        super().close()
        self._server.join(_END_S)
        assert not self._server.is_alive(), f"rank {self.rank} is stuck"


class _Watched:
    """A worker, and the clean latents that it is given."""

    def __init__(self, worker: Worker | BlockWorker, rank: int, latents: dict[tuple[str, int], torch.Tensor]) -> None:
        self._worker, self._rank, self._latents = worker, rank, latents

    def load(self) -> tuple[Span, ...]:
        with _LOADING:
            spans = self._worker.load()
        if isinstance(self._worker, Worker) and self._worker._stages._decode is not None:
            keep_latents(self._worker, self._latents, self._rank)
        return spans

    def handle(self, command: messages.Command) -> messages.Event:
        return self._worker.handle(command)

    def recover(self) -> None:
        self._worker.recover()

    def close(self) -> None:
        self._worker.close()


def keep_latents(worker: Worker, latents: dict[tuple[str, int], torch.Tensor], rank: int = 0) -> None:
    """From now on."""
    stage: Any = worker._stages.decode
    begin = stage.begin

    def keeping(request: VideoRequest, clean: torch.Tensor, group: Any = None) -> Any:
        latents[request.prompt, rank] = clean.clone()
        return begin(request, clean, group)

    stage.begin = keeping


def _make_executor(
    adapter: ModelAdapter, settings: WorkerSettings, placement: Placement, _launch: object
) -> ThreadExecutor:
    return ThreadExecutor(model=adapter.checkpoint.name, settings=settings, placement=placement)


@contextlib.contextmanager
def threaded(folder: Path, **settings: Any) -> Iterator[tuple[Engine, ThreadExecutor]]:
    """An engine that has started its workers as threads."""
    with Engine(folder, device="cpu", **settings) as engine:
        with pytest.MonkeyPatch.context() as patch:  # no longer than it takes: other engines have processes
            patch.setattr("pipedit.engine.engine.make_executor", _make_executor)
            engine.start()
        executor = engine._executor
        assert isinstance(executor, ThreadExecutor)
        yield engine, executor


def held_roles(worker: Worker) -> set[str]:
    """The roles whose weights a worker has."""
    stages = worker._stages
    held = {"encoder": stages._text, "denoiser": stages._denoise, "decoder": stages._decode}
    return {role for role, stage in held.items() if stage is not None}


def parameter_bytes(worker: Worker) -> int:
    stages = (worker._stages._text, worker._stages._denoise, worker._stages._decode)
    modules = [module for stage in stages if stage is not None for module in stage.modules]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leftovers:
    """What workers keep of requests."""

    held: int
    shelved_bytes: int

    @classmethod
    def of(cls, executor: ThreadExecutor) -> "Leftovers":
        workers = executor.workers.values()
        return cls(
            held=sum(len(worker._held) for worker in workers),
            shelved_bytes=sum(worker._shelf.held_bytes for worker in workers),
        )
