"""Shares of a whole: nothing has to divide anything, shares differ by at most one. Pure arithmetic."""

import itertools
from collections.abc import Sequence


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """Shares of `total` that differ by at most one, larger ones first; zeros where there is too little for all."""
    assert total >= 0 and parts >= 1, (total, parts)
    least, extra = divmod(total, parts)
    return tuple(least + (part < extra) for part in range(parts))


def ranges(shares: Sequence[int], start: int = 0) -> tuple[slice, ...]:
    """Consecutive slices with these lengths, from `start` on."""
    ends = list(itertools.accumulate(shares, initial=start))
    return tuple(slice(a, b) for a, b in itertools.pairwise(ends))
