"""Several engines beside each other: how workers are divided, and what that promises."""

import pytest

from pipedit.plan.arrangements import Kind
from pipedit.plan.planner import make_plan
from pipedit.plan.replicas import best_replicas, divisions
from tests.plan.planned import GIB, rates, wan


@pytest.mark.parametrize(
    ("num_workers", "num_videos", "expected"),
    [
        (1, 9, []),
        (8, 1, []),
        (2, 9, [(2, 1)]),
        (8, 9, [(8, 1), (4, 2), (2, 3), (2, 4)]),
        (8, 3, [(3, 1), (3, 2), (2, 3), (2, 4)]),
    ],
)
def test_divisions(num_workers: int, num_videos: int, expected: list[tuple[int, int]]) -> None:
    assert divisions(num_workers, num_videos) == expected


def test_every_engine_has_its_share_of_the_videos() -> None:
    found = best_replicas(wan(count=9), 4, available_bytes=80 * GIB, durations_of=rates)
    assert found is not None
    share = -(-9 // found.engines)
    assert found.proposal.prediction.num_videos == share
    alone = make_plan(
        wan(count=share), found.proposal.arrangement.num_workers, available_bytes=80 * GIB, durations_of=rates
    )
    assert alone.best is not None
    assert found.makespan_s == alone.best.makespan_s
    assert not found.proposal.arrangement.kind.is_offloaded
    assert found.proposal.arrangement.kind in Kind


def test_none_where_nothing_fits() -> None:
    assert best_replicas(wan(), 4, available_bytes=GIB, durations_of=rates) is None
