"""What `--strategy auto` takes: the plain way unless memory or a prediction speaks for another, and it says why."""

import dataclasses
from typing import Any

import pytest

from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.arrangements import Arrangement, Asked, Kind
from pipedit.plan.choice import MARGIN, Choice, choose_placement, decoders_by_rule
from pipedit.plan.planned_video import PlannedVideo
from tests.plan.planned import GIB, Rates, hunyuan, rates, slow_decode, wan

DISAGGREGATED = frozenset([Kind.DISAGGREGATED])


def choose(videos: list[PlannedVideo], num_workers: int, *, gib: float = 80, **more: Any) -> Choice:
    return choose_placement(videos, num_workers, available_bytes=int(gib * GIB), **more)


def decoding_bound(arrangement: Arrangement, video: PlannedVideo) -> Rates:
    """A decode that ranks hardly share: what disjoint groups are for."""
    return Spreadless(arrangement=arrangement, video=video, decode_factor=4.0)


class Spreadless(Rates):
    """Several decoders take as long as one."""

    def pieces(self, command: Any) -> Any:
        found = list(super().pieces(command))
        ranks = len(command.ranks)
        return [dataclasses.replace(p, seconds=p.seconds * ranks) if p.what == "decode" else p for p in found]


@pytest.mark.parametrize(
    ("videos", "num_workers", "more", "said"),
    [
        (wan(count=1), 8, {"durations_of": decoding_bound}, "one video"),
        (wan(count=9), 1, {"durations_of": decoding_bound}, "one worker"),
        (wan(count=9), 8, {}, "nothing is known of this hardware"),
    ],
)
def test_there_is_nothing_to_compare(videos: list[PlannedVideo], num_workers: int, more: Any, said: str) -> None:
    choice = choose(videos, num_workers, **more)
    assert choice.arrangement.kind is Kind.COLOCATED
    assert said in choice.reason
    assert choice.arrangement.num_workers == num_workers


def test_disjoint_groups_are_taken_where_they_are_predicted_to_win() -> None:
    choice = choose(wan(count=9), 8, durations_of=decoding_bound)
    assert choice.arrangement.kind is Kind.DISAGGREGATED
    assert choice.proposal is not None
    assert "predicted" in choice.reason
    assert "9 videos" in choice.reason
    assert choose(wan(count=9), 8, durations_of=rates).arrangement.kind is Kind.COLOCATED


def test_a_small_gain_does_not_leave_the_plain_way() -> None:
    found = choose(wan(count=9), 8, durations_of=slow_decode)
    assert found.proposal is not None
    fastest = choose(wan(count=9), 8, durations_of=slow_decode, asked=Asked(kinds=DISAGGREGATED)).proposal
    assert fastest is not None
    assert found.proposal.makespan_s <= fastest.makespan_s * (1 + MARGIN)


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("durations_of", [None, slow_decode])
def test_what_does_not_fit_is_not_taken_and_told(count: int, durations_of: Any) -> None:
    choice = choose(hunyuan(count=count), 8, gib=48, durations_of=durations_of)
    assert choice.fits
    assert choice.arrangement.kind is not Kind.COLOCATED
    if durations_of is None:
        assert "48.0 GiB are there" in choice.reason
        assert choice.arrangement.kind is Kind.DISAGGREGATED
        assert choice.arrangement.aco is AcoMode.AUTO


def test_offloading_only_where_it_is_allowed() -> None:
    resident = frozenset([Kind.COLOCATED, Kind.DISAGGREGATED])
    assert choose(wan(), 1, gib=14).arrangement.kind is Kind.OFFLOADED
    refused = choose(wan(), 1, gib=14, asked=Asked(kinds=resident))
    assert not refused.fits
    assert refused.arrangement.kind is Kind.COLOCATED
    assert "14.0 GiB are there" in refused.reason


def test_what_was_asked_for_is_kept() -> None:
    asked = Asked(kinds=DISAGGREGATED, denoise_workers=5)
    for durations_of in (None, rates):
        choice = choose(wan(), 8, asked=asked, durations_of=durations_of)
        assert len(choice.arrangement.placement.denoisers) == 5
        assert len(choice.arrangement.placement.decoders) == 3


def test_the_papers_rule() -> None:
    assert decoders_by_rule(hunyuan(), 8) == 1
    assert decoders_by_rule(hunyuan(num_inference_steps=1), 8) == 2
    choice = choose(wan(), 8, asked=Asked(kinds=DISAGGREGATED))
    assert len(choice.arrangement.placement.decoders) == decoders_by_rule(wan(), 8) == 1


def test_the_reason_is_one_sentence_about_the_arrangement() -> None:
    for videos, workers, gib in ((wan(), 8, 80), (hunyuan(), 8, 48), (wan(count=1), 2, 80)):
        choice = choose(videos, workers, gib=gib, durations_of=slow_decode)
        assert choice.reason.startswith(choice.arrangement.describe())
        assert "\n" not in choice.reason
