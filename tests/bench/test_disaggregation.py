"""The arithmetic of streams, bounds and predictions, on streams of known durations; no speed is judged."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from pipedit.bench import disaggregation
from pipedit.bench.disaggregation import COLOCATED, REFERENCE, DisaggregationBench
from pipedit.bench.pipeline_bound import StageTimes, spreads, workers_beside_each_other
from pipedit.bench.stream_prediction import predict, rounds_used
from pipedit.bench.streams import Stream, stream, streams_beside_each_other
from pipedit.cli.app import run as run_cli
from pipedit.cli.bench_tables import disaggregation_tables
from pipedit.core.errors import PipeditError
from pipedit.core.placement import Placement, Role
from pipedit.core.request import VideoRequest
from pipedit.engine.engine import Engine
from pipedit.executor.simulated import SimulatedExecutor
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.durations import FixedDurations
from pipedit.plan.jobs import Work
from pipedit.plan.pools import Pool, Service
from pipedit.plan.scheduler import Policy
from pipedit.plan.simulator import Arrival, simulate
from tests.tiny_pipelines import QUICK_SETTINGS

Folder = Callable[[str], Path]

SPLIT = Placement.disaggregated(denoise=1, decode=1, encoder=Role.DECODER)
WORK = Work(num_steps=4, num_chunks=3, heads=12, shape="a")
POLICY = Policy(aco=AcoMode.OFF)
TIMES = FixedDurations(encode_s=0.25, step_s=1.0, chunk_s=1.0, latents_s=0.5)
_numbers = itertools.count()


def simulated(
    durations: FixedDurations = TIMES,
    *,
    placement: Placement = SPLIT,
    policy: Policy = POLICY,
    prompts: int = 5,
    start_s: float = 0.0,
    factor: float = 1.0,
    round_trip_s: float = 0.0,
) -> Stream:
    """A stream as it would be measured where work takes exactly so long, `factor` times. No two streams have requests
    of the same id, as in one engine."""
    pool = Pool(placement=placement, services={"it": Service(work=WORK, durations=durations)}, policy=policy)
    arrivals = [Arrival(at_s=0.0, kind="it")] * prompts
    run = simulate([pool], arrivals, keep_spans=True, round_trip_s=round_trip_s)
    number = next(_numbers)
    return Stream(
        done_s=tuple(sorted(factor * life.done_s for life in run.lives)),
        spans=tuple(
            dataclasses.replace(
                span,
                request_id=f"{number} {span.request_id}",
                start_s=start_s + factor * span.start_s,
                end_s=start_s + factor * span.end_s,
            )
            for span in run.spans
        ),
    )


def one_worker(start_s: float = 0.0, factor: float = 1.0, prompts: int = 5) -> Stream:
    return simulated(placement=Placement.colocated(1), start_s=start_s, factor=factor, prompts=prompts)


# -- bounds ----------------------------------------------------------------------------------------------------------


def test_the_slower_group_sets_the_bound() -> None:
    times = StageTimes.alone(one_worker())
    assert times == StageTimes(encode=0.25, step=4.0, decode=3.0)
    assert times.bound_s(denoise_workers=1, decode_workers=1) == 4.0
    assert times.bound_s(denoise_workers=2, decode_workers=1) == 3.25, "decoders encode, too"
    assert times.bound_s(denoise_workers=2, decode_workers=2) == 2.0


def test_a_pipeline_reaches_its_bound() -> None:
    """What the figure is for: nothing is lost where commands follow each other at once."""
    instant = dataclasses.replace(TIMES, latents_s=0.0)
    assert StageTimes.alone(one_worker()).bound_s(denoise_workers=1, decode_workers=1) == simulated(instant).interval_s


def test_loaded_times_are_those_of_requests_with_company_all_the_time() -> None:
    """Here a request takes 7.25 s. The first one of each stream, or its last one, is alone for a while."""
    early, late = one_worker(), one_worker(start_s=3.5, factor=2.0)
    mixed = StageTimes.beside_each_other([early, late])
    assert mixed.step == pytest.approx((4 * 4.0 + 2 * 8.0) / 6), "4 requests of the early one, 2 of the late one"
    assert mixed.step / mixed.decode == pytest.approx(4 / 3)
    with pytest.raises(PipeditError, match="more prompts"):
        StageTimes.beside_each_other([early, one_worker(start_s=100.0)])


@pytest.mark.parametrize("prompts", [2, 3, 10])
def test_streams_half_a_request_apart_meet(prompts: int) -> None:
    together = [one_worker(prompts=prompts), one_worker(prompts=prompts, start_s=7.25 / 2)]
    assert StageTimes.beside_each_other(together) == StageTimes.alone(one_worker())


def test_stage_times_of_rounds_have_a_spread() -> None:
    rounds = [StageTimes(encode=1.0, step=step, decode=2.0) for step in (3.0, 7.0, 4.0)]
    assert spreads(rounds)["step"] == {"min": 3.0, "median": 4.0, "max": 7.0}


def test_the_busier_group_hardly_waits() -> None:
    """Filling and draining left out, for either group."""
    stream = simulated()
    shares = stream.busy_share(SPLIT)
    assert shares["denoise"] == pytest.approx(1.0)
    assert shares["decode"] == pytest.approx(3.0 / 4, abs=0.07), "fetching is not work of its own, encoding is"
    slower = simulated(dataclasses.replace(TIMES, chunk_s=2.0))
    assert slower.busy_share(SPLIT)["decode"] == pytest.approx(6.0 / 6.5, abs=0.02), "it waits for what it fetches"


def test_streams_beside_each_other_are_driven_at_the_same_time(tiny_folder: Folder) -> None:
    engines = [Engine(tiny_folder("wan"), device="cpu", executor=SimulatedExecutor()) for _ in range(3)]
    requests = [VideoRequest(prompt="x", seed=seed, **QUICK_SETTINGS["wan"]) for seed in range(2)]
    streams = streams_beside_each_other(engines, requests, stagger_s=0.01)
    assert [len(one.videos) for one in streams] == [2, 2, 2]
    again = streams_beside_each_other(engines, requests)
    assert not {s.request_id for s in again[0].spans} & {s.request_id for s in streams[0].spans}, "only its own spans"


# -- predictions -----------------------------------------------------------------------------------------------------


def predicted_error(*rounds: Stream, policy: Policy = POLICY) -> float:
    return predict(SPLIT, policy, WORK, rounds).error


def test_rounds_that_are_alike_predict_each_other() -> None:
    assert predicted_error(simulated(), simulated()) == pytest.approx(0.0)
    quick = dataclasses.replace(TIMES, step_s=0.01, chunk_s=0.01)
    rounds = [simulated(quick, round_trip_s=0.002) for _ in range(3)]
    assert predicted_error(*rounds) == pytest.approx(0.0, abs=1e-6), "commands hold several steps here"


def test_help_that_was_settled_before_is_settled_in_the_prediction() -> None:
    """The same engine's streams come one after the other."""
    helped = dataclasses.replace(TIMES, helped_step_s=0.5)
    policy = Policy(aco=AcoMode.ON)
    rounds = [simulated(helped, policy=policy) for _ in range(2)]
    assert predicted_error(*rounds, policy=policy) == pytest.approx(0.0)
    assert abs(predicted_error(*rounds)) > 0.05, "without help it would take longer"


def test_the_odd_rounds_predict_the_even_ones() -> None:
    quicker, slower = simulated(), simulated(factor=1.25)
    assert predicted_error(quicker, slower) == pytest.approx(1 / 1.25 - 1)
    assert predicted_error(slower, quicker) == pytest.approx(0.25)
    assert predicted_error(quicker, slower, quicker) == pytest.approx(1 / 1.25 - 1), "the third one says how long"
    middle = simulated(factor=1.1)
    found = predict(SPLIT, POLICY, WORK, [quicker, slower, quicker, middle])
    assert found.measured_makespan_s == pytest.approx((slower.makespan_s + middle.makespan_s) / 2)
    assert found.makespan_s == pytest.approx(quicker.makespan_s)


def test_the_document_says_which_rounds_are_which() -> None:
    assert rounds_used(2) == {"durations_from_rounds": [1], "compared_with_rounds": [2]}
    assert rounds_used(5) == {"durations_from_rounds": [1, 3, 5], "compared_with_rounds": [2, 4]}
    with pytest.raises(AssertionError):
        DisaggregationBench(model="tiny", settings={}, steps={"one": 1}, rounds=1)


def test_one_round_is_refused_because_nothing_could_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["bench", "disaggregation", "--rounds", "1"]) == 2
    assert "--rounds" in capsys.readouterr().err


# -- from end to end -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_beside_each_other_are_processes(tiny_folder: Folder) -> None:
    requests = [VideoRequest(prompt="x", seed=seed, **QUICK_SETTINGS["wan"]) for seed in range(2)]
    with workers_beside_each_other(str(tiny_folder("wan")), 2, device="cpu", dtype="float32") as engines:
        alone = stream(engines[0], requests)
        streams = streams_beside_each_other(engines, requests, stagger_s=alone.interval_s / 2)
    first, second = (min(span.start_s for span in one.spans) for one in streams)
    assert abs(second - first) < alone.makespan_s, "their clocks are one"
    assert all((a == b).all() for a, b in zip(streams[0].videos, streams[1].videos, strict=True))


@pytest.mark.slow
def test_every_figure_is_there(tiny_folder: Folder) -> None:
    settings = {name: value for name, value in QUICK_SETTINGS["wan"].items() if name != "num_inference_steps"}
    bench = DisaggregationBench(
        model=str(tiny_folder("wan")),
        settings=settings,
        steps={"few": 2},
        prompts=10,
        rounds=2,
        only=("disaggregated",),
    )
    result = json.loads(json.dumps(disaggregation.run(bench)))
    assert result["prediction"] == rounds_used(2)
    mix = result["mixes"]["few"]
    assert set(mix["variants"]) == {REFERENCE, COLOCATED, "disaggregated"}
    for stages in (mix["one_worker_stage_s"], mix["loaded_stage_s"]):
        assert set(stages) == {"encode", "step", "decode"}
        assert all(0 < figures["min"] <= figures["median"] <= figures["max"] for figures in stages.values())
    assert mix["bound_interval_s"] > 0 and mix["loaded_bound_interval_s"] > 0
    for name, figures in mix["variants"].items():
        assert figures["largest_difference"] <= 1, name
        assert figures["share_of_loaded_bound"]["median"] > 0, name
        shares = figures["busy_share"].values()
        assert figures["busiest_group_busy_share"]["max"] == max(share["max"] for share in shares), name
        assert figures["predicted"]["measured_makespan_s"] > 0, name
    (table,) = disaggregation_tables(result)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(table)
    assert "loaded" in shown.get() and "odd" in shown.get()
