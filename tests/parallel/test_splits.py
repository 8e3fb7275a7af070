"""Shares of tokens and heads, and the mesh, for all small sizes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipedit.core.parallel import ParallelConfig, mesh_position
from pipedit.core.shares import ranges, split_evenly
from pipedit.parallel.splits import chunk_heads


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_shares_are_complete_and_differ_by_at_most_one(total: int, parts: int) -> None:
    shares = split_evenly(total, parts)
    assert sum(shares) == total and len(shares) == parts
    assert max(shares) - min(shares) <= 1
    assert [s.stop - s.start for s in ranges(shares)] == list(shares)


@pytest.mark.parametrize(
    ("heads", "ranks", "shares"), [(12, 8, (2, 2, 2, 2, 1, 1, 1, 1)), (24, 7, (4, 4, 4) + (3,) * 4)]
)
def test_heads_need_not_divide(heads: int, ranks: int, shares: tuple[int, ...]) -> None:
    assert split_evenly(heads, ranks) == shares


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any), st.integers(1, 20))
def test_chunks_hold_every_head_once(heads: list[int], chunks: int) -> None:
    dealt = chunk_heads(heads, chunks)
    assert len(dealt) == min(chunks, max(heads))
    assert [sum(chunk[rank] for chunk in dealt) for rank in range(len(heads))] == heads
    assert all(any(chunk) for chunk in dealt)


@pytest.mark.parametrize("degrees", list(itertools.product((1, 2), (1, 2, 3), (1, 2, 4))))
def test_every_rank_has_one_place_and_its_groups_agree(degrees: tuple[int, int, int]) -> None:
    config = ParallelConfig(cfg_degree=degrees[0], ring_degree=degrees[1], ulysses_degree=degrees[2])
    places = [mesh_position(config, index) for index in range(config.world_size)]
    assert len({(p.cfg, p.ring, p.ulysses) for p in places}) == config.world_size
    for index, place in enumerate(places):
        for name in ("cfg_group", "sequence_group", "ring_group", "ulysses_group"):
            group = getattr(place, name)
            assert index in group
            assert all(getattr(places[member], name) == group for member in group)
        assert len(place.ulysses_group) == degrees[2] and len(place.ring_group) == degrees[1]
        assert set(place.ring_group) & set(place.ulysses_group) == {index}
