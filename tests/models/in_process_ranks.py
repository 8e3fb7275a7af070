"""Strategies of the simplest kind, to test what models do with them: one rank alone, or ranks that are threads."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pipedit.core.shares import ranges, split_evenly
from pipedit.models.adapter import one_after_the_other
from pipedit.models.sequence import AttentionCall

WAIT_S = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    heads: slice
    latents: torch.Tensor
    text: torch.Tensor | None = None


class Alone:
    """One rank that does everything, in so many runs of heads. Writes down the calls that it saw."""

    branches = staticmethod(one_after_the_other)

    def __init__(self, chunks: int = 1) -> None:
        self.chunks = chunks
        self.tokens = 0
        self.calls: list[AttentionCall] = []

    def begin_forward(self, tokens: int) -> None:
        self.tokens = tokens

    def shard(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        assert tensor.shape[dim] == self.tokens
        return tensor

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        assert tensor.shape[dim] == self.tokens
        return tensor

    def attend(self, call: AttentionCall) -> Iterator[Run]:
        self.calls.append(call)
        for heads in ranges(split_evenly(call.heads, self.chunks)):
            run = self.compute(call, heads)
            yield run
            run.latents.fill_(torch.nan)  # nobody may read it any more
            if run.text is not None:
                run.text.fill_(torch.nan)

    def compute(self, call: AttentionCall, heads: slice) -> Run:
        value, key, query = call.value(heads), call.key(heads), call.query(heads)
        key, value = self.everybodys(key), self.everybodys(value)
        latents = key.shape[1]
        if call.text_tokens:
            query, key, value = (
                torch.cat(pair, dim=1) for pair in zip((query, key, value), call.text(heads), strict=True)
            )
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        result = F.scaled_dot_product_attention(query, key, value, self.mask(call, latents)).transpose(1, 2).clone()
        mine, text = result[:, : call.local_tokens], result[:, call.local_tokens :]
        return Run(heads=heads, latents=mine, text=text if call.text_tokens else None)

    def everybodys(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def mask(self, call: AttentionCall, latents: int) -> torch.Tensor | None:
        if call.text_mask is None:
            return None
        return F.pad(call.text_mask, (latents, 0), value=True)[:, None, None]


class Board:
    """Where threads put tensors for each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._slots: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=WAIT_S)

    def exchange(self, rank: int, value: torch.Tensor) -> list[torch.Tensor]:
        self._slots[rank] = value
        self._barrier.wait()
        everything = list(self._slots)
        self._barrier.wait()
        return everything


class ThreadRank(Alone):
    """One of several ranks, each with some of the tokens: keys and values of all of them go to everybody."""

    def __init__(self, board: Board, rank: int, chunks: int = 1) -> None:
        super().__init__(chunks)
        self._board, self._rank = board, rank

    def shard(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        mine = ranges(split_evenly(tensor.shape[dim], self._board.size))[self._rank]
        assert tensor.shape[dim] == self.tokens
        return tensor.narrow(dim, mine.start, mine.stop - mine.start)

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat(self._board.exchange(self._rank, tensor), dim=dim)

    def everybodys(self, rows: torch.Tensor) -> torch.Tensor:
        return self.gather(rows, 1)


def run_threads(size: int, function: Callable[[Board, int], Any]) -> list[Any]:
    """`function(board, rank)` in so many threads; what they return, by rank."""
    board, results, errors = Board(size), [None] * size, []

    def work(rank: int) -> None:
        try:
            with torch.no_grad():
                results[rank] = function(board, rank)
        except Exception as error:  # noqa: BLE001 - raised below, in the thread of the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return results


class Doubling(nn.Linear):
    """A linear layer that is more than its weight, as with LoRA."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(rows) * 2
