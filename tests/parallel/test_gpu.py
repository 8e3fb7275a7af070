"""The strategies on one CUDA device, where members are threads with a stream each, and its attention kernels.

What runs on members runs on the CPU too, so that the stand-in for ranks is tested where there is no GPU. The transfers
between processes (NCCL) need two GPUs.
"""

import pytest
import torch

from pipedit.core.parallel import ParallelConfig
from pipedit.core.shares import ranges, split_evenly
from pipedit.parallel.channel import Channel
from pipedit.parallel.exchange import ExchangeShape
from pipedit.parallel.kernels import attention, attention_with_lse
from pipedit.parallel.pipesp import Lines, Overlap, PipeSP, Schedule
from pipedit.parallel.ring import RingAttention
from pipedit.parallel.runtime import ParallelRuntime
from pipedit.parallel.splits import chunk_heads
from pipedit.parallel.workspace import Workspace
from tests.parallel.cases import Case, GivenCall
from tests.parallel.stream_channel import Board, StreamChannel, run_members
from tests.parallel.test_kernels import difference, reference

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}


class Member:
    """One rank of `ring_degree` rings around groups of `ulysses_degree`, as ParallelRuntime would set it up."""

    def __init__(self, board: Board, index: int, config: ParallelConfig, device: torch.device) -> None:
        self._config, self._device, self._workspace = config, device, Workspace(device)
        self._ring_place, self._place = divmod(index, config.ulysses_degree)
        self._index, degree = index, config.ulysses_degree
        inward, outward = (
            StreamChannel(board, (name, self._ring_place), degree, self._place, device) for name in ("in", "out")
        )
        self._lines = Lines(inward=inward, outward=outward, workspace=self._workspace)
        self._ring = StreamChannel(board, ("ring", self._place), config.ring_degree, self._ring_place, device)

    def attend(self, case: Case, overlap: Overlap = Overlap.FULL) -> tuple[torch.Tensor, torch.Tensor]:
        """Own rows of the latents, and the text, on the CPU."""
        latents, text, mask = case.parts()
        tokens, degree = split_evenly(case.tokens, self._config.sequence_degree), self._config.ulysses_degree
        rows = ranges(tokens)[self._index]
        call = GivenCall(
            [part[:, rows].to(self._device) for part in latents],
            [part.to(self._device) for part in text],
            None if mask is None else mask.to(self._device),
        )
        schedule = Schedule(chunks=int(self._config.pipesp_chunks), overlap=overlap)
        first = self._ring_place * degree
        shape = ExchangeShape(
            tokens=tokens[first : first + degree],
            chunks=chunk_heads(split_evenly(case.heads, degree), schedule.chunks),
            batch=case.batch,
            head_dim=case.head_dim,
            text_tokens=case.text_tokens,
            dtype=call.dtype,
        )
        ring = RingAttention(
            self._ring, [sum(tokens[at : at + degree]) for at in range(0, len(tokens), degree)], self._workspace
        )
        alone = self._config.ring_degree == 1
        strategy = PipeSP(
            self._lines,
            shape,
            schedule,
            attention if alone else lambda q, k, v, mask: ring(q, k, v, text_tokens=case.text_tokens, mask=mask),
            splits_rows=alone,
        )
        results = [
            (each.latents.clone(), None if each.text is None else each.text.clone()) for each in strategy.attend(call)
        ]
        texts = [each for _, each in results if each is not None]
        return torch.cat([each for each, _ in results], 2).cpu(), (torch.cat(texts, 2) if texts else text[0]).cpu()


SPLITS = {
    "ulysses": ParallelConfig(ulysses_degree=2, pipesp_chunks=1),
    "two chunks": ParallelConfig(ulysses_degree=3, pipesp_chunks=2),
    "a head at a time": ParallelConfig(ulysses_degree=2, pipesp_chunks=99),
    "ring": ParallelConfig(ring_degree=3, pipesp_chunks=1),
    "ulysses and ring": ParallelConfig(ulysses_degree=2, ring_degree=2, pipesp_chunks=2),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("overlap", list(Overlap))
def test_members_equal_one_attention(device: str, name: str, overlap: Overlap) -> None:
    """Two calls with other numbers, one after the other on the same buffers: what is late in the first would show."""
    config, target = SPLITS[name], torch.device(device)
    sizes = {"tokens": 37, "heads": 7, "head_dim": 16, "batch": 2, "text_tokens": 5, "masked": True}
    dtypes = ["float32"] if device == "cpu" else list(TOLERANCE)
    cases = [Case(**sizes, seed=seed, dtype=dtype) for dtype in dtypes for seed in (1, 2)]  # type: ignore[arg-type]

    def member(board: Board, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        rank = Member(board, index, config, target)
        return [rank.attend(case, overlap) for case in cases]

    answers = run_members(config.sequence_degree, target, member)
    for number, case in enumerate(cases):
        latents, text = case.answer()
        got = torch.cat([answer[number][0] for answer in answers], dim=1)
        assert (got.float() - latents.float()).abs().max() < TOLERANCE[case.dtype], case
        for answer in answers:
            assert (answer[number][1].float() - text.float()).abs().max() < TOLERANCE[case.dtype], case


def test_a_member_that_does_not_wait_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the stand-in: without the wait for what arrives, the result is wrong."""
    monkeypatch.setattr("pipedit.parallel.exchange.Inward.wait", lambda *_: None)
    config, device, case = SPLITS["two chunks"], torch.device("cpu"), Case(tokens=37, heads=7, head_dim=16)
    answers = run_members(3, device, lambda board, index: Member(board, index, config, device).attend(case)[0])
    error = (torch.cat(answers, dim=1) - case.answer()[0]).abs().nan_to_num(torch.inf).max()
    assert error > 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnCuda:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize(("queries", "keys"), [(33, 45), (128, 64), (1, 1)])
    def test_log_sum_exp_and_output_are_right(self, dtype: torch.dtype, masked: bool, queries: int, keys: int) -> None:
        """Rows that are no multiple of 32, of which the kernel's log-sum-exp has more; strided views; a row of the
        batch without keys."""
        packed = torch.randn(2, max(queries, keys), 3, 4, 64, device="cuda", dtype=dtype)
        q, k, v = (packed[:, :rows, i].transpose(1, 2) for i, rows in enumerate((queries, keys, keys)))
        mask = None
        if masked:
            shown = torch.tensor([keys, 0], device="cuda").view(2, 1, 1, 1)
            mask = torch.arange(keys, device="cuda").view(1, 1, 1, keys) < shown
        out, lse = attention_with_lse(q, k, v, mask)
        expected, expected_lse = reference((q, k, v), mask)
        name = str(dtype).removeprefix("torch.")
        assert out.dtype == dtype and lse.dtype == torch.float32 and lse.shape == (2, 4, queries)
        assert difference(out, expected) < TOLERANCE[name]
        seen = expected_lse.isfinite()
        assert torch.equal(lse.isfinite(), seen) and difference(lse[seen], expected_lse[seen]) < TOLERANCE[name]

    def test_what_has_no_kernel_is_an_error(self) -> None:
        def ones(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.ones(1, 1, 4, width, device="cuda", dtype=dtype)

        for width, dtype, words in (
            (12, torch.bfloat16, "multiple of 8, not 12"),
            (6, torch.float32, "multiple of 4, not 6"),
            (8, torch.float64, "takes torch.float64"),
        ):
            with pytest.raises(ValueError, match=words):
                attention_with_lse(ones(width, dtype), ones(width, dtype), ones(width, dtype))

    def test_one_rank_alone_needs_no_group(self) -> None:
        case = Case(tokens=24, text_tokens=4)
        latents, text, _ = case.parts()
        runtime = ParallelRuntime(ranks=[0], rank=0, device="cuda", open_channel=lambda _name, _members: Channel())
        runtime.use(ParallelConfig())
        runtime.begin_forward(case.tokens)
        (result,) = runtime.attend(GivenCall([x.cuda() for x in latents], [x.cuda() for x in text], None))
        wanted, wanted_text = case.answer()
        assert result.text is not None
        assert torch.allclose(result.latents.cpu(), wanted, atol=1e-5)
        assert torch.allclose(result.text.cpu(), wanted_text, atol=1e-5)
