"""How many heads of a chunk each rank takes. Pure arithmetic."""

from collections.abc import Sequence

from pipedit.core.shares import split_evenly


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
