"""What the ranks of `bench sequence-parallel` measure: attention on given tensors by every strategy, and stand-ins that
only compute or only exchange.

Shape legend: B batch, S latent tokens of all ranks, s those of this rank, N heads, n some of them, D head width.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pipedit.core.parallel import AUTO, ParallelConfig
from pipedit.core.shares import ranges, split_evenly
from pipedit.core.spans import Span
from pipedit.parallel.calls import Call, Kernel, Result
from pipedit.parallel.exchange import ExchangeShape
from pipedit.parallel.groups import channel_opener, default_store
from pipedit.parallel.kernels import attention
from pipedit.parallel.pipesp import PipeSP, Schedule
from pipedit.parallel.record import Record
from pipedit.parallel.runtime import CHUNK_CHOICES, ParallelRuntime
from pipedit.parallel.splits import chunk_heads
from pipedit.parallel.tuning import ROUNDS
from pipedit.parallel.workspace import Workspace

TUNING_CALLS = ROUNDS * (len(CHUNK_CHOICES) + 1)  # after so many attentions of one shape AUTO has decided
_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenCall:
    """An attention whose query, key and value [B, s, N, D] are there already."""

    given_query: torch.Tensor
    given_key: torch.Tensor
    given_value: torch.Tensor
    text_tokens: int = 0
    text_mask: torch.Tensor | None = None

    @property
    def batch(self) -> int:
        return self.given_query.shape[0]

    @property
    def local_tokens(self) -> int:
        return self.given_query.shape[1]

    @property
    def heads(self) -> int:
        return self.given_query.shape[2]

    @property
    def head_dim(self) -> int:
        return self.given_query.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.given_query.dtype

    def value(self, heads: slice) -> torch.Tensor:
        return self.given_value[:, :, heads]

    def key(self, heads: slice) -> torch.Tensor:
        return self.given_key[:, :, heads]

    def query(self, heads: slice) -> torch.Tensor:
        return self.given_query[:, :, heads]

    def text(self, heads: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise AssertionError("there is no text")


class AttentionBench:
    """One attention over `tokens` x `heads` x `head_dim` on this rank. Made on every rank at the same time: it opens
    channels. The tensors are random, the same on every rank."""

    def __init__(self, *, rank: int, world_size: int, tokens: int, heads: int, head_dim: int) -> None:
        self._rank, self._heads = rank, split_evenly(heads, world_size)
        self._tokens = split_evenly(tokens, world_size)
        generator = torch.Generator().manual_seed(0)
        whole = [torch.randn(1, tokens, heads, head_dim, generator=generator) for _ in range(3)]
        rows, mine = ranges(self._tokens)[rank], ranges(self._heads)[rank]
        query, key, value = (x[:, rows].contiguous() for x in whole)
        self._call = GivenCall(given_query=query, given_key=key, given_value=value)
        self._whole = [x.transpose(1, 2).contiguous() for x in whole]  # [1, N, S, D]
        self._share = [x[:, mine].contiguous() for x in self._whole]  # [1, n, S, D]
        self.reference = attention(*self._whole)[:, :, rows].transpose(1, 2).contiguous()
        self._result = torch.empty_like(self.reference)  # every variant fills it
        self._runtime = counting_runtime(rank, world_size)
        self._runtime.use(ParallelConfig(ulysses_degree=world_size, pipesp_chunks=AUTO))
        self._runtime.begin_forward(tokens)

    @property
    def most_chunks(self) -> int:
        return max(self._heads)

    # -- the whole work, in several ways ------------------------------------------------------------------------

    def one_process(self) -> torch.Tensor:
        """All heads and all tokens here."""
        whole = attention(*self._whole)
        rows = ranges(self._tokens)[self._rank]
        return self._result.copy_(whole[:, :, rows].transpose(1, 2))

    def strategy(self, schedule: Schedule, kernel: Kernel = attention) -> "Attention":
        """By this schedule, with buffers of its own."""
        shape = ExchangeShape(
            tokens=self._tokens,
            chunks=chunk_heads(self._heads, schedule.chunks),
            batch=1,
            head_dim=self._call.head_dim,
            text_tokens=0,
            dtype=self._call.dtype,
        )
        # All on the same connections: one that was idle for a while begins slowly.
        lines = dataclasses.replace(self._runtime.lines, workspace=Workspace(_CPU))
        strategy = PipeSP(lines, shape, schedule, kernel)

        def trace() -> list[Span]:
            record = Record(time.monotonic, rank=self._rank)
            self._collect(PipeSP(lines, shape, schedule, kernel, record=record).attend(self._call))
            return record.spans

        return Attention(
            run=lambda: self._collect(strategy.attend(self._call)),
            facts=lambda: {"buffer_bytes": lines.workspace.allocated_bytes},
            trace=trace,
        )

    def auto(self) -> "Attention":
        """As a model would use it: the number of chunks is found in the first calls."""
        return Attention(
            run=lambda: self._collect(self._runtime.attend(self._call)),
            facts=lambda: {"chosen_chunks": self._runtime.last_chunks},
        )

    def _collect(self, parts: Iterator[Result]) -> torch.Tensor:
        for part in parts:
            self._result[:, :, part.heads] = part.latents
        return self._result

    # -- parts of it ---------------------------------------------------------------------------------------------

    def compute(self) -> torch.Tensor:
        """This rank's heads over all tokens, which are all here: nothing is exchanged, nothing copied."""
        return attention(*self._share)

    def exchange(self) -> Callable[[], torch.Tensor]:
        """Plain Ulysses around a kernel that does nothing."""
        nothing = torch.zeros_like(self._share[0])
        return self.strategy(Schedule(chunks=1), lambda _query, _key, _value, _mask: nothing).run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """A way to run it, what there is to tell about it afterwards, and a run that tells what happened when."""

    run: Callable[[], torch.Tensor]
    facts: Callable[[], dict[str, Any]]
    trace: Callable[[], list[Span]] | None = None


class CountingRuntime(ParallelRuntime):
    """Tells in how many chunks the last attention ran."""

    last_chunks = 0

    def attend(self, call: Call) -> Iterator[Result]:
        chunks = 0
        for part in super().attend(call):
            chunks += 1
            yield part
        self.last_chunks = chunks


def counting_runtime(rank: int, world_size: int) -> CountingRuntime:
    """On the ranks of torch.distributed. Once in a process."""
    open_channel = channel_opener(default_store("bench"), rank=rank, device="cpu")
    return CountingRuntime(ranks=range(world_size), rank=rank, device="cpu", open_channel=open_channel)


class SilentParallel:
    """Only the computing: each rank's share of the tokens and of the heads as ever, but nothing is sent. What would
    have come from other ranks is made up, so that results mean nothing; `egress_bytes` is what the last forward would
    have sent, `attention_s` the time that each spent in attention."""

    def __init__(self, *, rank: int, world_size: int, clock: Callable[[], float]) -> None:
        self._rank, self._world_size, self._clock = rank, world_size, clock
        self._tokens: tuple[int, ...] = ()
        self._made_up: dict[tuple[int, ...], torch.Tensor] = {}
        self.egress_bytes = 0
        self.attention_s: list[float] = []

    def begin_forward(self, tokens: int) -> None:
        self._tokens = split_evenly(tokens, self._world_size)
        self.egress_bytes = 0
        self.attention_s.append(0.0)

    def shard(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        rows = ranges(self._tokens)[self._rank]
        return tensor.narrow(dim, rows.start, rows.stop - rows.start)

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        self.egress_bytes += (self._world_size - 1) * tensor.nbytes
        shape = list(tensor.shape)
        shape[dim] = sum(self._tokens)
        return self._take(shape)

    def attend(self, call: Call) -> Iterator[Result]:
        assert not call.text_tokens, "joint text is not measured"
        heads = split_evenly(call.heads, self._world_size)
        everything, tokens = slice(0, call.heads), sum(self._tokens)
        for project in (call.value, call.key, call.query):  # as a rank does for its own tokens
            project(everything)
        given = self._take([call.batch, heads[self._rank], tokens, call.head_dim])
        start = self._clock()
        attention(given, given, given)
        self.attention_s[-1] += self._clock() - start
        self.egress_bytes += egress_bytes(
            self._tokens, heads, self._rank, call.batch * call.head_dim * call.dtype.itemsize
        )
        latents = self._take([call.batch, call.local_tokens, call.heads, call.head_dim])
        yield Result(heads=everything, latents=latents)

    def _take(self, shape: Sequence[int]) -> torch.Tensor:
        """Made once, so that making it up costs no time."""
        key = tuple(shape)
        if key not in self._made_up:
            self._made_up[key] = torch.randn(key)
        return self._made_up[key]


def egress_bytes(tokens: Sequence[int], heads: Sequence[int], rank: int, row_bytes: int) -> int:
    """What a rank sends for one attention: query, key and value of its tokens for the others' heads, and the results of
    its heads for the others' tokens. `row_bytes`: one head of one token."""
    inputs = 3 * tokens[rank] * (sum(heads) - heads[rank])
    outputs = (sum(tokens) - tokens[rank]) * heads[rank]
    return (inputs + outputs) * row_bytes
