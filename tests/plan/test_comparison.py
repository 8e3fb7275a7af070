"""Predicted against measured: the arithmetic of their difference."""

import dataclasses

import pytest

from pipedit.core.placement import Placement, Role
from pipedit.core.spans import Span
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.comparison import compare, groups_of, relative_error, summarize
from pipedit.plan.durations import FixedDurations
from pipedit.plan.jobs import Work
from pipedit.plan.pools import Pool, Service
from pipedit.plan.scheduler import Policy
from pipedit.plan.simulator import Arrival, simulate
from pipedit.plan.timeline import Timeline


def simulated(factor: float = 1.0, **durations: float) -> Timeline:
    """Three videos on two denoisers and a decoder, everything `factor` times as long."""
    seconds = {"encode_s": 1.0, "step_s": 2.0, "chunk_s": 1.0, "latents_s": 0.5, **durations}
    service = Service(
        work=Work(num_steps=4, num_chunks=3),
        durations=FixedDurations(**{name: value * factor for name, value in seconds.items()}),
    )
    placement = Placement.disaggregated(denoise=2, decode=1, encoder=Role.DECODER)
    pool = Pool(placement=placement, services={"a": service}, policy=Policy(aco=AcoMode.OFF))
    return Timeline(spans=simulate([pool], [Arrival(at_s=0, kind="a")] * 3, keep_spans=True).spans)


def test_a_run_is_like_itself() -> None:
    comparison = compare(simulated(), simulated())
    assert comparison.kinds == ("encode", "fetch", "step", "decode")
    assert [comparison.error(what) for what in comparison.kinds] == [0, 0, 0, 0]
    assert comparison.makespan_error == 0
    assert {group: comparison.idle_error(group) for group in comparison.groups} == {"denoise": 0, "decode": 0}


def test_everything_slower_by_a_quarter() -> None:
    comparison = compare(simulated(1.25), simulated())
    assert comparison.makespan_error == pytest.approx(0.25)
    assert [comparison.error(what) for what in comparison.kinds] == pytest.approx([0.25] * 4)
    assert comparison.idle_error("decode") == pytest.approx(0), "shares stay as they are"


def test_one_kind_of_work_was_guessed_wrong() -> None:
    comparison = compare(simulated(chunk_s=2.0), simulated())
    assert comparison.error("decode") == pytest.approx(1.0)
    assert comparison.error("step") == 0
    makespans = (1 + 3 * 8 + 3 * 2 + 0.5, 1 + 3 * 8 + 3 * 1 + 0.5)
    assert (comparison.predicted.makespan_s, comparison.measured.makespan_s) == makespans
    assert comparison.makespan_error == pytest.approx(makespans[0] / makespans[1] - 1)
    busy = [3 * (1 + 0.5 + 3 * chunk_s) for chunk_s in (2, 1)]
    expected = (1 - busy[0] / makespans[0]) - (1 - busy[1] / makespans[1])
    assert comparison.idle_error("decode") == pytest.approx(expected)


def test_steps_with_help_are_a_kind_of_their_own() -> None:
    step = Span(request_id="r", rank=0, role="denoiser", what="step", start_s=0.0, end_s=2.0, index=0)
    later = dataclasses.replace(step, start_s=2.0, end_s=3.0, index=1)
    help_ = dataclasses.replace(later, rank=1, role="decoder", what="help", end_s=2.5)
    kinds = summarize(Timeline(spans=(step, later, help_))).kinds
    assert {what: (kind.count, kind.each_s) for what, kind in kinds.items()} == {
        "step": (1, 2.0),
        "step with help": (1, 1.0),
        "help": (1, 0.5),
    }


def test_what_only_one_side_has_has_no_error() -> None:
    fetchless = Timeline(spans=tuple(span for span in simulated().spans if span.what != "fetch"))
    comparison = compare(fetchless, simulated())
    assert "fetch" in comparison.kinds
    assert comparison.error("fetch") is None
    assert comparison.as_json()["errors"]["fetch"] is None
    assert relative_error(1.0, 0.0) is None


def test_loading_and_writing_are_left_out() -> None:
    load = Span(request_id="", rank=0, role="denoiser", what="load", start_s=-100.0, end_s=0.0)
    write = Span(request_id="r", rank=-1, role="controller", what="write", start_s=50.0, end_s=99.0)
    measured = Timeline(spans=(load, *simulated().spans, write))
    assert compare(simulated(), measured).makespan_error == 0


def test_groups_are_told_from_what_ranks_do() -> None:
    assert groups_of(simulated()) == {"denoise": {0, 1}, "decode": {2}}
    decode = Span(request_id="r", rank=0, role="decoder", what="decode", start_s=0.0, end_s=2.0, index=0)
    assert groups_of(Timeline(spans=(*simulated().spans, decode))) == {"all": {0, 1, 2}}
