"""Runs a function on several gloo ranks, each a process of its own, and hands back what each returned."""

import contextlib
import datetime
import itertools
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipedit.parallel.groups import OpenChannel, channel_opener, default_store
from pipedit.parallel.runtime import ParallelRuntime

_jobs = 0  # the number of the job that this rank does
_openers = itertools.count()  # within the job


def fresh_opener(rank: int, timeout_s: float = 60.0) -> OpenChannel:
    """Opens channels where nobody has before. Ranks that are to meet have called it equally often in this job."""
    store = default_store(f"{_jobs}/{next(_openers)}")
    return channel_opener(store, rank=rank, device="cpu", timeout=datetime.timedelta(seconds=timeout_s))


def make_runtime(rank: int, world_size: int, **options: Any) -> ParallelRuntime:
    """One of ranks 0 .. world_size - 1, or a helper of theirs."""
    open_channel = fresh_opener(rank)
    return ParallelRuntime(ranks=range(world_size), rank=rank, device="cpu", open_channel=open_channel, **options)


class Ranks:
    """`world_size` processes that stay, because starting one takes seconds; `run` may be called many times."""

    def __init__(self, world_size: int, folder: Path) -> None:
        context = mp.get_context("spawn")
        self.world_size = world_size
        self._jobs = [context.Queue() for _ in range(world_size)]
        self._results = context.Queue()
        self._number = 0  # of the job; answers to one that failed may come late
        self._processes = [
            context.Process(
                target=_serve,
                args=(rank, world_size, str(folder / "store"), self._jobs[rank], self._results),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """`function(rank, world_size, *args)` on every rank; what they return, by rank. Raises RuntimeError with the
        traceback of the first rank that failed. `function` must be importable."""
        self._number += 1
        for jobs in self._jobs:
            jobs.put((self._number, function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) < self.world_size:
            try:
                number, rank, value, error = self._results.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                missing = sorted(set(range(self.world_size)) - results.keys())
                raise RuntimeError(f"ranks {missing} gave no answer within {timeout_s} s") from None
            if number != self._number:
                continue
            if error is not None:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
            results[rank] = value
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()  # they hold nothing that wants a farewell, and a polite one takes seconds
        for process in self._processes:
            process.join(5.0)


@contextlib.contextmanager
def ranks(world_size: int) -> Iterator[Ranks]:
    with tempfile.TemporaryDirectory() as folder:
        group = Ranks(world_size, Path(folder))
        try:
            yield group
        finally:
            group.close()


def _serve(rank: int, world_size: int, store: str, jobs: Any, results: Any) -> None:
    global _jobs, _openers
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    while True:
        number, function, args = jobs.get()
        _jobs, _openers = number, itertools.count()
        try:
            results.put((number, rank, function(rank, world_size, *args), None))
        except BaseException:  # noqa: BLE001 - the test process raises it again
            results.put((number, rank, None, traceback.format_exc()))
