"""What spans of a run tell of durations and of the time between commands."""

import dataclasses

import pytest

from pipedit.core.placement import Placement
from pipedit.core.spans import Span
from pipedit.plan.durations import FixedDurations
from pipedit.plan.jobs import Work
from pipedit.plan.measured_durations import MeasuredDurations, gap_s
from pipedit.plan.pools import Pool, Service
from pipedit.plan.scheduler import Policy
from pipedit.plan.simulator import Arrival, simulate

ROUND_TRIP_S = 0.25


def spans_of(step_s: float, num_steps: int = 8, least_command_s: float = 1.0) -> tuple[Span, ...]:
    service = Service(
        work=Work(num_steps=num_steps, num_chunks=3),
        durations=FixedDurations(encode_s=0.5, step_s=step_s, chunk_s=0.125),
    )
    pool = Pool(
        placement=Placement.colocated(2), services={"a": service}, policy=Policy(least_command_s=least_command_s)
    )
    arrivals = [Arrival(at_s=0, kind="a")] * 3
    return simulate([pool], arrivals, keep_spans=True, round_trip_s=ROUND_TRIP_S).spans


@pytest.mark.parametrize("step_s", [0.125, 0.5, 2.0])
def test_the_way_of_an_answer_is_seen_where_commands_hold_several_steps(step_s: float) -> None:
    assert gap_s(spans_of(step_s)) == pytest.approx(ROUND_TRIP_S)


def test_without_a_second_step_no_gap_is_known() -> None:
    assert gap_s(spans_of(0.5, num_steps=1)) == 0.0
    assert gap_s(()) == 0.0


def test_a_run_tells_what_its_work_took() -> None:
    measured = MeasuredDurations.of(spans_of(0.5))
    assert measured.encode_s == pytest.approx(0.5)
    assert measured.steps == pytest.approx(dict.fromkeys(range(8), 0.5))
    assert measured.chunks == pytest.approx(dict.fromkeys(range(3), 0.125))
    assert (measured.helped_s, measured.conditioning_s, measured.latents_s) == (None, 0.0, 0.0)


def test_what_disturbs_one_of_them_counts_for_the_sum() -> None:
    """One of three requests had to wait for half a second in each chunk: a prediction must not forget it."""
    spans = spans_of(0.5)
    disturbed = tuple(
        dataclasses.replace(span, end_s=span.end_s + 0.5)
        if span.what == "decode" and span.request_id == "request-2"
        else span
        for span in spans
    )
    total = sum(span.duration_s for span in disturbed if span.what == "decode" and span.rank == 0)
    assert 3 * sum(MeasuredDurations.of(disturbed).chunks.values()) == pytest.approx(total)


def test_the_slowest_rank_of_a_step_counts() -> None:
    slow = tuple(
        dataclasses.replace(span, end_s=span.end_s + 1.0) if span.rank == 1 else span for span in spans_of(0.5)
    )
    assert MeasuredDurations.of(slow).steps == pytest.approx(dict.fromkeys(range(8), 1.5))
