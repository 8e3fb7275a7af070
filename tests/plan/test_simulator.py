"""The simulator: the scheduler on virtual time, against arithmetic on paper."""

import dataclasses
import itertools
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Placement, Role
from pipedit.core.spans import Span
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.durations import FixedDurations
from pipedit.plan.jobs import Work
from pipedit.plan.outcome import Outcome, quantile, summarize
from pipedit.plan.pools import Pool, Service, seconds_each
from pipedit.plan.router import Router
from pipedit.plan.scheduler import Policy
from pipedit.plan.simulator import Arrival, SimulatedRun, simulate

SPLIT = Placement.disaggregated(denoise=2, decode=1, encoder=Role.DECODER)
NO_SPREAD = Policy(aco=AcoMode.OFF, spread_decode=False)


def pool(
    placement: Placement, durations: FixedDurations, policy: Policy | None = None, *, count: int = 1, **work: Any
) -> Pool:
    sharing = ParallelConfig(ulysses_degree=len(placement.denoisers))
    plan = Work(**{"num_steps": 4, "num_chunks": 3, "parallel": sharing, "heads": 12, "shape": "a", **work})
    services = {"video": Service(work=plan, durations=durations)}
    return Pool(placement=placement, services=services, policy=policy or NO_SPREAD, count=count)


def burst(count: int, at_s: float = 0.0) -> list[Arrival]:
    return [Arrival(at_s=at_s, kind="video") for _ in range(count)]


def makespan_s(run: SimulatedRun) -> float:
    return summarize(run).makespan_s


# -- against arithmetic on paper ----------------------------------------------------------------------------------


def test_one_group_does_everything_in_turn() -> None:
    durations = FixedDurations(encode_s=1, step_s=2, chunk_s=3)
    run = simulate([pool(Placement.colocated(2), durations)], burst(5))
    assert makespan_s(run) == 5 * (1 + 4 * 2 + 3 * 3)
    assert [life.done_s for life in run.lives] == [18, 36, 54, 72, 90]


@pytest.mark.parametrize("prompts", [1, 2, 7])
def test_fill_then_the_slower_group_then_drain(prompts: int) -> None:
    """Denoisers are slower: encode, P times denoise, decode."""
    durations = FixedDurations(encode_s=1, step_s=2, chunk_s=1, conditioning_s=0.25, latents_s=0.5)
    run = simulate([pool(SPLIT, durations)], burst(prompts))
    assert makespan_s(run) == 1 + prompts * (0.25 + 4 * 2) + (0.5 + 3 * 1)


@pytest.mark.parametrize("prompts", [1, 2, 7])
def test_decoders_may_be_the_slower_group(prompts: int) -> None:
    durations = FixedDurations(encode_s=1, step_s=1, chunk_s=4, latents_s=0.5)
    placement = Placement.disaggregated(denoise=2, decode=1, encoder=Role.DENOISER)
    run = simulate([pool(placement, durations)], burst(prompts))
    assert makespan_s(run) == 1 + 4 * 1 + prompts * (0.5 + 3 * 4)


def test_two_decoders_take_turns() -> None:
    durations = FixedDurations(step_s=1, chunk_s=2)
    placement = Placement.disaggregated(denoise=2, decode=2, encoder=Role.DENOISER)
    run = simulate([pool(placement, durations)], burst(9))
    assert makespan_s(run) == 9 * 4 + 3 * 2, "6 s of decoding on two decoders hide below 4 s of denoising"


def test_a_video_that_is_alone_is_decoded_by_all() -> None:
    durations = FixedDurations(step_s=1, chunk_s=2, spread_chunk_s=1.25)
    placement = Placement.disaggregated(denoise=2, decode=2, encoder=Role.DENOISER)
    spreading = Policy(aco=AcoMode.OFF, spread_decode=True)
    assert makespan_s(simulate([pool(placement, durations, spreading)], burst(1))) == 4 + 3 * 1.25
    assert makespan_s(simulate([pool(placement, durations, NO_SPREAD)], burst(1))) == 4 + 3 * 2


def test_work_of_a_request_on_the_way_costs_a_round_trip_each() -> None:
    durations = FixedDurations(encode_s=1, step_s=2, chunk_s=3)
    run = simulate([pool(Placement.colocated(1), durations)], burst(1), round_trip_s=0.5)
    assert makespan_s(run) == (1 + 0.5) + 4 * (2 + 0.5) + 3 * (3 + 0.5) - 0.5, (
        "the last frame is there before its answer"
    )


# -- Aco ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("helped_step_s", "gains"), [(1.5, True), (2.5, False)])
def test_help_is_taken_where_it_pays(helped_step_s: float, gains: bool) -> None:
    durations = FixedDurations(step_s=2, chunk_s=1, helped_step_s=helped_step_s)
    took = {
        mode: makespan_s(
            simulate(
                [pool(SPLIT, durations, Policy(aco=mode, spread_decode=False), num_steps=40, num_chunks=2)], burst(10)
            )
        )
        for mode in AcoMode
    }
    tries_s = 2 * 3 * abs(2 - helped_step_s)  # both ways to deal the heads are tried three times
    assert (took[AcoMode.ON] < took[AcoMode.OFF]) == gains
    assert took[AcoMode.AUTO] <= min(took.values()) + tries_s


def test_helpers_are_busy_while_they_help() -> None:
    durations = FixedDurations(step_s=2, chunk_s=1)
    run = simulate([pool(SPLIT, durations, Policy(aco=AcoMode.ON))], burst(1), keep_spans=True)
    helping = [span for span in run.spans if span.what == "help"]
    assert [(span.rank, span.role, span.index) for span in helping] == [(2, "decoder", index) for index in range(4)]
    assert {(use.group, use.what): use.rank_seconds for use in run.uses if use.rank_seconds} == {
        ("denoise", "step"): 2 * 4 * 2,
        ("decode", "help"): 4 * 2,
        ("decode", "decode"): 3 * 1,
    }


# -- what must always hold ----------------------------------------------------------------------------------------

PLACEMENTS = [
    Placement.colocated(1),
    Placement.colocated(3),
    Placement.serial_decode(2),
    SPLIT,
    Placement.disaggregated(denoise=1, decode=2, encoder=Role.DENOISER),
    Placement.disaggregated(denoise=2, decode=2, encoder=Role.DECODER),
]
seconds = st.sampled_from([0.0, 0.1, 0.3, 1.0, 3.7])
runs = st.fixed_dictionaries(
    {
        "placement": st.sampled_from(PLACEMENTS),
        "durations": st.builds(
            FixedDurations,
            encode_s=seconds, step_s=seconds, chunk_s=seconds, helped_step_s=seconds, spread_chunk_s=seconds,
            conditioning_s=seconds, latents_s=seconds,
        ),
        "policy": st.builds(
            Policy, aco=st.sampled_from(AcoMode), spread_decode=st.booleans(), grain=st.sampled_from([0, 1, 3])
        ),
        "count": st.integers(1, 3),
        "num_steps": st.integers(1, 6),
        "num_chunks": st.integers(1, 4),
    }
)  # fmt: skip
arrivals = st.lists(
    st.builds(Arrival, at_s=seconds, kind=st.just("video"), priority=st.integers(0, 1)), min_size=1, max_size=8
)


@settings(max_examples=150, deadline=None)
@given(runs, arrivals, seconds)
def test_nothing_is_lost_and_no_rank_does_two_things(run: dict[str, Any], coming: list[Arrival], trip_s: float) -> None:
    replicas = pool(**run)
    result = simulate([replicas], coming, keep_spans=True, round_trip_s=trip_s)
    assert len(result.lives) == len(coming)
    for life in result.lives:
        assert life.arrival.at_s <= life.begun_s <= life.done_s
    by_rank: dict[int, list[Span]] = defaultdict(list)
    units: dict[tuple[str, str], list[int | None]] = defaultdict(list)
    for span in result.spans:
        by_rank[span.rank].append(span)
        units[span.request_id, span.what].append(span.index)
    assert max(by_rank) < replicas.num_ranks
    for spans in by_rank.values():
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(sorted(spans, key=lambda s: s.start_s)))
    for number in range(1, len(coming) + 1):
        steps = units[f"request-{number}", "step"]
        assert set(steps) == set(range(run["num_steps"]))
        assert len(steps) == run["num_steps"] * len(run["placement"].denoisers)
        assert set(units[f"request-{number}", "decode"]) == set(range(run["num_chunks"]))


@settings(max_examples=100, deadline=None)
@given(runs, arrivals)
def test_figures_with_and_without_spans_agree(run: dict[str, Any], coming: list[Arrival]) -> None:
    with_spans = simulate([pool(**run)], coming, keep_spans=True)
    without = simulate([pool(**run)], coming)
    assert dataclasses.replace(with_spans, spans=()) == without, "the same run twice"
    total: dict[str, float] = defaultdict(float)
    for span in with_spans.spans:
        total[span.what] += span.duration_s
    for use in with_spans.uses:
        total[use.what] -= use.rank_seconds
    assert all(abs(left_s) < 1e-6 for left_s in total.values()), total


def test_coarse_commands_take_as_long_as_fine_ones() -> None:
    durations = FixedDurations(encode_s=1, step_s=2, chunk_s=1, conditioning_s=0.25, latents_s=0.5)
    fine, coarse = (
        simulate([pool(SPLIT, durations, dataclasses.replace(NO_SPREAD, grain=grain))], burst(6)) for grain in (1, 0)
    )
    assert makespan_s(fine) == makespan_s(coarse)
    assert [life.done_s for life in fine.lives] == [life.done_s for life in coarse.lives]


# -- many replicas ------------------------------------------------------------------------------------------------


def test_replicas_share_a_burst_evenly() -> None:
    durations = FixedDurations(encode_s=1, step_s=2, chunk_s=3)
    run = simulate([pool(Placement.colocated(2), durations, count=4)], burst(12), keep_spans=True)
    assert makespan_s(run) == 3 * 18
    assert sorted(life.replica for life in run.lives) == sorted(list(range(4)) * 3)
    assert {span.rank for span in run.spans} == set(range(8))


def test_the_router_knows_what_is_done() -> None:
    router = Router([2, 1], [{"short": 1.0, "long": 5.0}, {"long": 2.0}])
    assert router.route("long") == (2, 1), "where it is done soonest"
    assert router.route("short") == (0, 0)
    assert router.route("short") == (1, 0)
    assert router.route("long") == (2, 1)
    assert router.route("long") == (0, 0), "5 s after 1 s, or 2 s after 4 s: the first one"
    router.finish(2, "long")
    assert router.route("long") == (2, 1)


def test_time_between_requests_is_that_of_the_slower_group() -> None:
    durations = FixedDurations(encode_s=1, step_s=2, chunk_s=3)
    work = Work(num_steps=4, num_chunks=3)
    for placement, expected_s in ((Placement.colocated(2), 18), (SPLIT, 10), (PLACEMENTS[4], 9), (PLACEMENTS[5], 8)):
        assert seconds_each(placement, Service(work=work, durations=durations)) == expected_s


def test_each_kind_goes_where_it_is_served() -> None:
    a, b = (pool(Placement.colocated(1), FixedDurations()) for _ in range(2))
    b = dataclasses.replace(b, services={"other": b.services["video"]})
    run = simulate([a, b], [Arrival(at_s=0, kind="other"), Arrival(at_s=1, kind="video")])
    assert [life.replica for life in run.lives] == [1, 0]


# -- figures ------------------------------------------------------------------------------------------------------


def outcome_of(count: int = 10) -> Outcome:
    durations = FixedDurations(encode_s=1, step_s=2, chunk_s=1, latents_s=0.5)
    return summarize(simulate([pool(SPLIT, durations)], burst(count, at_s=100.0)), price_per_hour=36.0)


def test_the_outcome_of_a_run() -> None:
    outcome = outcome_of(10)
    assert outcome.makespan_s == 1 + 10 * 8 + 3.5
    assert outcome.first_video_s == 1 + 8 + 3.5
    assert outcome.throughput_per_s == 10 / 84.5
    assert outcome.latency.p50_s == 1 + 5 * 8 + 3.5
    assert outcome.latency.p99_s == outcome.latency.max_s == 84.5
    assert outcome.hand_over_s == 10 * 0.5
    assert outcome.peak_queue == 10
    assert outcome.cost_per_video == pytest.approx(36 / 3600 * 3 * 84.5 / 10)
    decode = outcome.groups["decode"]
    assert decode.busy_s == {"encode": 10, "fetch": 5, "decode": 30}
    assert decode.idle_share == pytest.approx(1 - 45 / 84.5)
    assert outcome.utilisation == pytest.approx((45 + 2 * 80) / (3 * 84.5))


def test_an_outcome_is_a_document() -> None:
    document = outcome_of().as_json()
    assert document["groups"]["denoise"]["ranks"] == 2
    assert document["groups"]["denoise"]["idle_share"] == pytest.approx(1 - 80 / 84.5)
    assert document["latency"]["p90_s"] == 1 + 9 * 8 + 3.5


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_quantiles_are_values_that_occur(values: list[float], share: float) -> None:
    value = quantile(sorted(values), share)
    assert sum(other <= value for other in values) >= share * len(values) - 1e-9
    assert sum(other < value for other in values) < share * len(values)
