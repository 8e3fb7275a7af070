"""Who owns how many tokens and heads: nothing has to divide anything, shares differ by at most one. Pure arithmetic."""

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


def chunk_heads(heads: Sequence[int], chunks: int) -> tuple[tuple[int, ...], ...]:
    """Deals each rank's heads out to at most `chunks` chunks: [chunk][rank] -> heads. Chunks in which nobody has a
    head are left out, so there are never more chunks than the largest share.

    Chunk c takes a run of consecutive heads of the model, and in it the ranks take theirs in order: a chunk's
    projection is then one slice of a weight, and the order of heads comes out right by itself (PipeDiT, section 3.1,
    has to restore it with a permutation).
    """
    assert chunks >= 1 and any(heads), (heads, chunks)
    chunks = min(chunks, max(heads))
    dealt = [split_evenly(own, chunks) for own in heads]
    return tuple(tuple(own[chunk] for own in dealt) for chunk in range(chunks))
