"""Attention in parts equals attention at once, against a direct computation in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipedit.parallel.kernels import attention, attention_with_lse, merge

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# relative to the largest value: a few roundings of the dtype
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)


def make_qkv(
    *, queries: int, keys: int, batch: int = 2, heads: int = 3, width: int = 16, dtype: torch.dtype = torch.float32
) -> Qkv:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = [(batch, heads, rows, width) for rows in (queries, keys, keys)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return 2 * q, k, v  # wider scores than a fresh model's, so that the weights of the parts differ


def reference(qkv: Qkv, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (x.double() for x in qkv)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def difference(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    scale = expected.abs().max().item() if expected.numel() else 1.0
    return (value.double() - expected).abs().max().item() / scale if expected.numel() else 0.0


def merge_all(qkv: Qkv, bounds: list[int], mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the parts of the keys between consecutive bounds, merged."""
    q, k, v = qkv
    total = torch.zeros(q.shape)
    lse = torch.full(q.shape[:-1], -torch.inf)
    for start, end in itertools.pairwise(bounds):
        part_mask = None if mask is None else mask[..., start:end]
        merge(total, lse, *attention_with_lse(q, k[:, :, start:end], v[:, :, start:end], part_mask))
    return total, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [12, 64])
def test_log_sum_exp_and_output_are_right(dtype: torch.dtype, masked: bool, width: int) -> None:
    qkv = make_qkv(queries=33, keys=45, width=width, dtype=dtype)
    mask = torch.arange(45).view(1, 1, 1, 45) < torch.tensor([45, 17]).view(2, 1, 1, 1) if masked else None
    out, lse = attention_with_lse(*qkv, mask)
    expected, expected_lse = reference(qkv, mask)
    assert out.dtype == dtype and lse.dtype == torch.float32 and lse.shape == (2, 3, 33)
    assert difference(out, expected) < TOLERANCE[dtype]
    assert difference(lse, expected_lse) < (1e-6 if dtype == torch.float32 else 1e-4)
    assert torch.equal(attention(*qkv, mask), out), "both entries run the same kernel on CPU"


@pytest.mark.parametrize("layout", ["[S, B, 3, n, D]", "[3, S, B, 1, n, D]", "[B, S, n, D]"])
def test_strided_views_are_read_in_place(layout: str) -> None:
    q, k, v = make_qkv(queries=40, keys=40)
    rows = torch.stack([x.permute(2, 0, 1, 3) for x in (q, k, v)])  # [3, S, B, n, D]
    if layout == "[S, B, 3, n, D]":
        stored = rows.permute(1, 2, 0, 3, 4).contiguous()
        views = [stored[:, :, part].permute(1, 2, 0, 3) for part in range(3)]
    elif layout == "[3, S, B, 1, n, D]":
        stored = rows.unsqueeze(3).contiguous()
        views = [stored[part, :, :, 0].permute(1, 2, 0, 3) for part in range(3)]
    else:
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in views)
    out, lse = attention_with_lse(views[0], views[1], views[2])
    straight, straight_lse = attention_with_lse(q, k, v)
    assert torch.equal(out, straight) and torch.equal(lse, straight_lse)


def test_a_strided_last_dimension_is_refused() -> None:
    """The CPU kernel would read wrong numbers without a word."""
    q, k, v = make_qkv(queries=8, keys=8)
    strided = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(AssertionError, match="contiguous"):
        attention_with_lse(strided, k, v)


@settings(deadline=None, max_examples=60)
@given(cuts=st.lists(st.integers(0, 37), max_size=5), dtype=st.sampled_from(DTYPES), shown=st.integers(0, 37))
def test_any_partition_of_the_keys_merges_to_the_whole(cuts: list[int], dtype: torch.dtype, shown: int) -> None:
    """Parts may be empty, also all of them together where a mask hides every key of one batch row."""
    qkv = make_qkv(queries=9, keys=37, dtype=dtype)
    mask = torch.arange(37).view(1, 1, 1, 37) < torch.tensor([37, shown]).view(2, 1, 1, 1)
    for each in (None, mask):
        total, lse = merge_all(qkv, [0, *sorted(cuts), 37], each)
        expected, expected_lse = reference(qkv, each)
        assert difference(total, expected) < TOLERANCE[dtype]
        seen = expected_lse.isfinite()
        assert torch.equal(lse.isfinite(), seen) and difference(lse[seen], expected_lse[seen]) < 1e-4


def test_merging_without_the_weights_is_wrong() -> None:
    """Negative control: the mean of two parts is far from the whole, and so are weights by the number of keys."""
    q, k, v = qkv = make_qkv(queries=9, keys=36)
    first, _ = attention_with_lse(q, k[:, :, :12], v[:, :, :12])
    second, _ = attention_with_lse(q, k[:, :, 12:], v[:, :, 12:])
    expected, _ = reference(qkv)
    assert difference((first + second) / 2, expected) > 0.05
    assert difference(first / 3 + second * 2 / 3, expected) > 0.05
    assert difference(merge_all(qkv, [0, 12, 36])[0], expected) < 1e-6


def test_the_order_of_many_parts_does_not_matter_in_half_precision() -> None:
    """Sums are kept in float32: 32 parts are as near as 2."""
    qkv = make_qkv(queries=9, keys=64, dtype=torch.bfloat16)
    expected, _ = reference(qkv)
    assert difference(merge_all(qkv, list(range(0, 65, 2)))[0], expected) < TOLERANCE[torch.bfloat16]


def test_merging_scores_far_apart_neither_overflows_nor_loses_anything() -> None:
    part, zero = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2)
    for far in (1e4, -1e4):
        total, lse = torch.full((1, 1, 2, 4), 3.0), torch.zeros(1, 1, 2)
        merge(total, lse, part, zero + far)
        assert total.unique().tolist() == [1.0 if far > 0 else 3.0] and lse.unique().tolist() == [max(far, 0.0)]


def test_a_part_without_numbers_stays_visible() -> None:
    """Overflow inside a model must reach the check for non-finite values, not be weighed away."""
    total, lse = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1)
    merge(total, lse, torch.full((1, 1, 1, 4), torch.nan), torch.full((1, 1, 1), torch.nan))
    assert total.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys"), [(1, 2, 5, 0), (1, 2, 0, 5), (1, 0, 5, 5), (1, 2, 0, 0)]
)
def test_empty_sides_give_zero_and_minus_infinity(batch: int, heads: int, queries: int, keys: int) -> None:
    qkv = make_qkv(queries=queries, keys=keys, batch=batch, heads=heads)
    out, lse = attention_with_lse(*qkv)
    assert out.shape == qkv[0].shape and not out.any()
    assert lse.shape == qkv[0].shape[:-1] and bool((lse == -torch.inf).all())
    assert torch.equal(attention(*qkv), out)


def test_a_device_without_kernel_is_an_error() -> None:
    q, k, v = (x.to("meta") for x in make_qkv(queries=4, keys=4))
    with pytest.raises(ValueError, match="no attention kernel on meta"):
        attention_with_lse(q, k, v)


def test_the_kernel_on_cpu_is_diffusers_own() -> None:
    qkv = make_qkv(queries=20, keys=20)
    assert torch.equal(attention(*qkv), F.scaled_dot_product_attention(*qkv))
