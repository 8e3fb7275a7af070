"""Attention calls with given tensors, the trivial answer, and functions that ranks run."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipedit.core.errors import InvalidRequestError, PipeditError
from pipedit.core.parallel import ParallelConfig
from pipedit.core.shares import ranges
from pipedit.core.spans import Span
from pipedit.models.sequence import AttentionCall
from pipedit.parallel.exchange import KEY, QUERY, VALUE, ExchangeShape, Inward, Outward
from pipedit.parallel.pipesp import Overlap
from pipedit.parallel.record import Record
from pipedit.parallel.runtime import ParallelRuntime
from pipedit.parallel.splits import chunk_heads
from pipedit.parallel.workspace import Workspace
from tests.parallel.ranks import fresh_opener, make_runtime


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one attention; everything is drawn from the seed, so each rank makes the same tensors."""

    tokens: int
    heads: int = 4
    head_dim: int = 8
    batch: int = 1
    text_tokens: int = 0
    masked: bool = False
    dtype: str = "float32"
    seed: int = 0

    def parts(self) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]:
        """q, k, v of the latents [B, S, N, D], those of the text, and the text's mask."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(rows: int) -> torch.Tensor:
            return torch.randn(self.batch, rows, self.heads, self.head_dim, generator=generator).to(
                getattr(torch, self.dtype)
            )

        latents, text = [draw(self.tokens) for _ in range(3)], [draw(self.text_tokens) for _ in range(3)]
        mask = None
        if self.masked:
            lengths = torch.tensor([1 + (3 * i) % self.text_tokens for i in range(self.batch)])
            mask = torch.arange(self.text_tokens)[None] < lengths[:, None]
        return latents, text, mask

    def answer(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B, S, N, D] and text [B, T, N, D] by one plain attention."""
        latents, text, mask = self.parts()
        query, key, value = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(latents, text, strict=True))
        keys = None
        if mask is not None:
            keys = torch.cat([mask.new_ones(self.batch, self.tokens), mask], 1)[:, None, None]
        result = F.scaled_dot_product_attention(query, key, value, keys).transpose(1, 2)
        return result[:, : self.tokens], result[:, self.tokens :]


class GivenCall(AttentionCall):
    """A call whose q, k, v are there already: `latents` are this rank's rows."""

    def __init__(
        self, latents: Sequence[torch.Tensor], text: Sequence[torch.Tensor], mask: torch.Tensor | None
    ) -> None:
        self._latents, self._text = latents, text
        self.batch, self.local_tokens, self.heads, self.head_dim = latents[0].shape
        self.dtype, self.text_tokens, self.text_mask = latents[0].dtype, text[0].shape[1], mask

    def query(self, heads: slice) -> torch.Tensor:
        return self._latents[0][:, :, heads]

    def key(self, heads: slice) -> torch.Tensor:
        return self._latents[1][:, :, heads]

    def value(self, heads: slice) -> torch.Tensor:
        return self._latents[2][:, :, heads]

    def text(self, heads: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = (part[:, :, heads] for part in self._text)
        return query, key, value


def run_case(runtime: ParallelRuntime, case: Case) -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    """The whole result on every rank: latents [B, S, N, D], text [B, T, N, D], and the runs of heads that came."""
    latents, text, mask = case.parts()
    runtime.begin_forward(case.tokens)
    call = GivenCall([runtime.shard(part, 1) for part in latents], text, mask)
    own = torch.full((case.batch, call.local_tokens, case.heads, case.head_dim), torch.nan).to(call.dtype)
    own_text = torch.full_like(text[0], torch.nan)
    runs = []
    for result in runtime.attend(call):
        runs.append(result.heads)
        own[:, :, result.heads] = result.latents
        if result.text is not None:
            own_text[:, :, result.heads] = result.text
    return runtime.gather(own, 1), own_text, runs


def run_cases(
    rank: int, world_size: int, jobs: Sequence[tuple[ParallelConfig, Case]], overlap: str = "full"
) -> list[dict[str, Any]]:
    """Each case under its config, with one runtime; differences to the answer and what the buffers hold."""
    runtime = make_runtime(rank, world_size, overlap=Overlap(overlap))
    reports = []
    for config, case in jobs:
        runtime.use(config)
        latents, text, runs = run_case(runtime, case)
        wanted, wanted_text = case.answer()
        reports.append(
            {
                "difference": difference(latents, wanted),
                "text_difference": difference(text, wanted_text),
                "runs": [(run.start, run.stop) for run in runs],
                "bytes": runtime.workspace_bytes,
            }
        )
    runtime.close()
    return reports


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; nan where something was never written."""
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def run_wrong_order(rank: int, world_size: int) -> float:
    """How far off the result is if heads return in the ranks' order (head j of rank i at i * h + j) though chunks deal
    them out in runs."""
    runtime = make_runtime(rank, world_size)
    runtime.use(ParallelConfig(ulysses_degree=world_size, pipesp_chunks=2))
    case = Case(tokens=16, heads=4 * world_size)
    latents, _, _ = run_case(runtime, case)
    wrong = latents.unflatten(2, (2, world_size, -1)).transpose(2, 3).flatten(2, 4)
    return difference(wrong, case.answer()[0])


def run_exchanges(rank: int, world_size: int, splits: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[float]:
    """In and out again through the bare exchange; differences to what each rank should hold."""
    open_channel = fresh_opener(rank)
    channels = [open_channel(name, range(world_size)) for name in ("in", "out")]
    workspace, differences = Workspace(torch.device("cpu")), []
    for tokens, heads in splits:
        shape = ExchangeShape(
            tokens=tokens, chunks=chunk_heads(heads, 2), batch=2, head_dim=4, text_tokens=0, dtype=torch.float32
        )
        case = Case(tokens=sum(tokens), heads=sum(heads), head_dim=4, batch=2)
        parts = [part[:, ranges(tokens)[rank]] for part in case.parts()[0]]
        for chunk, run in enumerate(shape.runs):
            inward = Inward(channels[0], shape, chunk, workspace, 0)
            query, key, value = (part[:, :, run] for part in parts)
            inward.send_all((query, key, value))
            outward = Outward(channels[1], shape, chunk, workspace, 0)
            for part in (QUERY, KEY, VALUE):
                inward.wait(part)
                wanted = case.parts()[0][part][:, :, inward.own_run].transpose(1, 2)
                differences.append(difference(inward.view(part), wanted))
            for member, rows in enumerate(shape.rows):
                outward.put(inward.view(VALUE)[:, :, rows], member)
            outward.post()
            inward.finish()
            differences.append(difference(outward.wait()[0], parts[VALUE][:, :, run]))
    return differences


def run_recorded(rank: int, world_size: int, case: Case, chunks: int) -> list[Span]:
    """The spans of one attention."""
    runtime = make_runtime(rank, world_size)
    runtime.use(ParallelConfig(ulysses_degree=world_size, pipesp_chunks=chunks))
    runtime.record = Record(time.perf_counter, rank=rank)
    run_case(runtime, case)
    return runtime.record.spans


def run_measured(rank: int, world_size: int, config: ParallelConfig, cases: Sequence[Case]) -> dict[str, Any]:
    """Cases one after the other under a config that measures chunks; differences to the answers, chunks of the last
    case, and what the buffers hold after it, with what they hold where that number of chunks was given."""
    runtime = make_runtime(rank, world_size)
    runtime.use(config)
    differences = []
    for case in cases:
        latents, _, runs = run_case(runtime, case)
        differences.append(difference(latents, case.answer()[0]))
    measured_bytes = runtime.workspace_bytes
    runtime.close()
    given = make_runtime(rank, world_size)
    given.use(dataclasses.replace(config, pipesp_chunks=len(runs)))
    run_case(given, case)
    given_bytes = given.workspace_bytes
    given.close()
    return {"differences": differences, "chunks": len(runs), "bytes": measured_bytes, "given_bytes": given_bytes}


def run_after_failure(rank: int, world_size: int) -> dict[str, Any]:
    """One rank gives up in the midst of a measured attention; after `reset` all go on."""
    runtime = make_runtime(rank, world_size)
    config, case = ParallelConfig(ulysses_degree=world_size), Case(tokens=16)
    runtime.use(config)
    run_case(runtime, case)
    latents, text, _ = case.parts()
    call = GivenCall([runtime.shard(part, 1) for part in latents], text, None)
    results = runtime.attend(call)
    if rank == 0:
        next(results)
        del results
    else:
        list(results)
    dist.barrier()  # so that the others have got what this rank had sent
    runtime.reset()
    left_bytes = runtime.workspace_bytes
    runtime.use(config, epoch=1)
    differences = [difference(run_case(runtime, case)[0], case.answer()[0]) for _ in range(10)]
    runtime.close()
    return {"left_bytes": left_bytes, "differences": differences}


def run_branches(rank: int, world_size: int) -> dict[str, Any]:
    """Two predictions on a mesh with a CFG axis; how many this rank computed, and what came out."""
    runtime = make_runtime(rank, world_size)
    computed: list[int] = []

    def predict(branch: int) -> torch.Tensor:
        computed.append(branch)
        return torch.arange(6.0).reshape(2, 3) * (branch + 1)

    def both() -> list[torch.Tensor]:
        return runtime.branches([functools.partial(predict, 0), functools.partial(predict, 1)])

    before = both()
    runtime.use(ParallelConfig(cfg_degree=2, ulysses_degree=world_size // 2))
    computed.clear()
    after = both()
    return {
        "computed": computed.copy(),
        "equal": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "alone": len(runtime.branches([functools.partial(predict, 0)])),
    }


def run_misuse(rank: int, world_size: int) -> list[str]:
    """Sentences of what is refused."""
    runtime, sentences = make_runtime(rank, world_size), []
    try:
        runtime.use(ParallelConfig(ulysses_degree=world_size + 1))
    except InvalidRequestError as error:
        sentences.append(str(error))
    runtime.use(ParallelConfig(ulysses_degree=world_size))
    try:
        runtime.begin_forward(world_size - 1)
    except InvalidRequestError as error:
        sentences.append(str(error))
    runtime.close()
    return sentences


def run_two_attentions(rank: int, world_size: int) -> dict[str, Any]:
    """A second attention before the first one has given all results; then both, one after the other."""
    runtime, case = make_runtime(rank, world_size), Case(tokens=16)
    runtime.use(ParallelConfig(ulysses_degree=world_size, pipesp_chunks=2))
    runtime.begin_forward(case.tokens)
    latents, text, _ = case.parts()
    call = GivenCall([runtime.shard(part, 1) for part in latents], text, None)
    first, sentence = runtime.attend(call), ""
    next(first)
    try:
        next(runtime.attend(call))
    except PipeditError as error:
        sentence = str(error)
    left = len(list(first))
    after = difference(run_case(runtime, case)[0], case.answer()[0])
    runtime.close()
    return {"sentence": sentence, "left": left, "difference": after}
