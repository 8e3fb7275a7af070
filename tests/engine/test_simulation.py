"""From workload and cluster to a simulation, and that the simulator does what the engine's own driver does."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from pipedit.core import messages
from pipedit.core.errors import InsufficientMemoryError, InvalidRequestError
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Placement, Role
from pipedit.core.request import VideoRequest
from pipedit.core.spans import Span
from pipedit.engine.driver import Driver
from pipedit.engine.settings import EngineSettings
from pipedit.engine.simulation import Scenario, kinds_of, prepare
from pipedit.executor.simulated import SimulatedExecutor
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.arrangements import Kind
from pipedit.plan.cluster_file import ClusterFile, ReplicaSpec, read_cluster_file
from pipedit.plan.durations import FixedDurations
from pipedit.plan.jobs import Work
from pipedit.plan.outcome import summarize
from pipedit.plan.pools import Pool, Service
from pipedit.plan.scheduler import Policy, RequestScheduler
from pipedit.plan.simulator import Arrival, simulate
from pipedit.plan.workload import Stream, read_workload

WAN, HUNYUAN = "wan2.1-t2v-1.3b", "hunyuanvideo"
SMALL = VideoRequest(prompt="", width=480, height=352, num_frames=33, num_inference_steps=5)
EIGHT = ClusterFile(device="a6000", num_devices=8, devices_per_node=8)


def stream(model: str = WAN, count: int = 4, **settings: Any) -> Stream:
    return Stream(model=model, request=dataclasses.replace(SMALL, **settings), count=count, source="mix.csv:2")


def problems_of(streams: list[Stream], cluster_file: ClusterFile) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        prepare(streams, cluster_file)
    return list(caught.value.problems)


# -- the simulator and the driver ---------------------------------------------------------------------------------

DURATIONS = FixedDurations(encode_s=0.375, step_s=1.0625, chunk_s=1.8125, helped_step_s=0.9375, spread_chunk_s=1.0)
PLACEMENTS = [
    Placement.colocated(2),
    Placement.serial_decode(2),
    Placement.disaggregated(denoise=2, decode=1, encoder=Role.DECODER),
    Placement.disaggregated(denoise=2, decode=2, encoder=Role.DENOISER),
]


def seconds_each(command: messages.Command) -> float:
    """Of a command, or of one step or chunk of it."""
    units = max(getattr(command, "num_steps", 1), getattr(command, "num_chunks", 1))
    return sum(piece.seconds for piece in DURATIONS.pieces(command)) / units


def driven(placement: Placement, policy: Policy, work: Work, requests: int) -> set[Span]:
    """What the engine's driver records on an executor that takes so long for each command."""
    driver, executor = Driver(RequestScheduler(placement, policy)), SimulatedExecutor(step_s=seconds_each)
    for number in range(1, requests + 1):
        driver.submit(f"request-{number}", SMALL, work)
    driver.start(executor, 1.0)
    while driver.mentioned:
        driver.turn(executor)
        while driver.next_news(driver.mentioned) is not None:
            pass
    return set(driver.spans)


@pytest.mark.parametrize("least_command_s", [0.05, 3.0], ids=["each step a command", "several steps a command"])
@pytest.mark.parametrize("aco", list(AcoMode))
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_simulator_does_what_the_driver_does(placement: Placement, aco: AcoMode, least_command_s: float) -> None:
    """Ranks answer one after the other there, and together here."""
    sharing = ParallelConfig(ulysses_degree=len(placement.denoisers))
    work = Work(num_steps=9, num_chunks=3, parallel=sharing, heads=12, shape="a")
    policy = Policy(aco=aco, least_command_s=least_command_s)
    pool = Pool(placement=placement, services={"a": Service(work=work, durations=DURATIONS)}, policy=policy)
    run = simulate([pool], [Arrival(at_s=0.0, kind="a")] * 5, keep_spans=True)
    assert set(run.spans) == driven(placement, policy, work, requests=5)


# -- what is prepared ---------------------------------------------------------------------------------------------


def test_one_model_has_the_whole_cluster() -> None:
    scenario = prepare([stream(count=3), stream(count=2, num_frames=17)], dataclasses.replace(EIGHT, num_devices=35))
    (engines,) = scenario.engines
    assert (engines.pool.count, engines.arrangement.num_workers) == (4, 8), "3 of 35 devices are left over"
    assert len(engines.pool.services) == 2
    assert {arrival.kind for arrival in scenario.arrivals} == set(engines.pool.services)
    outcome = summarize(simulate(scenario.pools, scenario.arrivals), num_devices=35)
    assert outcome.requests == 5
    assert outcome.num_devices == 35


def test_settings_are_laid_down_and_the_rest_is_planned() -> None:
    given = {"denoise_workers": 6, "decode_workers": 2, "encode_on": "denoise", "aco": "off"}
    scenario = prepare([stream()], EIGHT, given)
    expected = Placement.disaggregated(denoise=6, decode=2, encoder=Role.DENOISER)
    assert scenario.engines[0].arrangement.placement == expected
    assert scenario.engines[0].pool.policy.aco is AcoMode.OFF


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, set(Kind)),
        ({"strategy": "colocated"}, {Kind.COLOCATED}),
        ({"strategy": "colocated", "decode": "serial"}, {Kind.SERIAL}),
        ({"strategy": "colocated", "offload": True}, {Kind.OFFLOADED}),
        ({"strategy": "colocated", "offload": True, "decode": "serial"}, {Kind.OFFLOADED_SERIAL}),
        ({"denoise_workers": 7, "decode_workers": 1}, {Kind.DISAGGREGATED}),
    ],
)
def test_what_settings_mean_to_the_planner(settings: dict[str, Any], kinds: set[Kind]) -> None:
    assert kinds_of(EngineSettings.of(num_workers=8, **settings)) == kinds


def test_each_model_has_its_replicas() -> None:
    replicas = (
        ReplicaSpec(model="Wan2.1-T2V-1.3B", count=1, settings={"num_workers": 2, "strategy": "colocated"}),
        ReplicaSpec(model=HUNYUAN, settings={"num_workers": 3, "denoise_workers": 2}),
    )
    scenario = prepare([stream(), stream(HUNYUAN)], dataclasses.replace(EIGHT, replicas=replicas))
    assert [(engines.model, engines.pool.count) for engines in scenario.engines] == [(WAN, 1), (HUNYUAN, 2)]
    run = simulate(scenario.pools, scenario.arrivals)
    assert {life.replica for life in run.lives[:4]} == {0}
    assert {life.replica for life in run.lives[4:]} == {1, 2}


def test_very_many_requests_are_simulated_in_large_pieces() -> None:
    def grain_of(count: int, **settings: Any) -> int:
        return prepare([stream(count=count)], EIGHT, settings).grain

    assert grain_of(10) == 1
    assert grain_of(50_000, strategy="colocated") == 0
    assert grain_of(50_000, denoise_workers=7, decode_workers=1, aco="on") == 2, "helpers must be let go to decode"
    assert prepare([stream()], EIGHT, grain=3).grain == 3


def test_all_problems_of_requests_and_replicas_come_together() -> None:
    replicas = (ReplicaSpec(settings={"strategy": "both"}), ReplicaSpec(model=WAN, settings={"num_workers": 9}))
    cluster_file = dataclasses.replace(EIGHT, device="a6001", replicas=replicas)
    found = problems_of([stream(width=481), stream("wan2.1-t2v-1.3c")], cluster_file)
    assert len(found) == 5, found
    assert found[0].startswith("mix.csv:2: width=481 is not a multiple of 16")
    assert "did you mean wan2.1-t2v-1.3b?" in found[1]
    assert "did you mean a6000?" in found[2]
    assert "replicas[1]: the workload has several models" in found[3]
    assert found[4] == "replicas[2]: each needs 9 devices, and the cluster has 8"


@pytest.mark.parametrize(
    ("replicas", "problem"),
    [
        ([{"model": HUNYUAN}], f"no replicas serve {WAN}"),
        ([{"strategy": "colocated", "encode_on": "decode"}], "encode_on needs strategy disaggregated"),
        ([{"num_workers": 4, "count": 3}], "the replicas need 12 devices, and the cluster has 8"),
        ([{"num_workers": 6, "count": 1}, {"num_workers": 4}], "replicas[2]: each needs 4 devices, and 2 are left"),
        ([{"num_workers": 4, "cfg_degree": 3}], "cfg_degree=3"),
    ],
)
def test_replicas_that_cannot_be(replicas: list[dict[str, Any]], problem: str) -> None:
    specs = []
    for given in replicas:
        rest = dict(given)
        specs.append(ReplicaSpec(model=rest.pop("model", None), count=rest.pop("count", None), settings=rest))
    found = problems_of([stream()], dataclasses.replace(EIGHT, replicas=tuple(specs)))
    assert len(found) == 1, found
    assert problem in found[0]


def test_what_does_not_fit_is_refused_with_figures() -> None:
    large = stream(HUNYUAN, width=1024, height=576, num_frames=129)
    with pytest.raises(InsufficientMemoryError, match=r"need about .* GiB"):
        prepare([large], EIGHT, {"strategy": "colocated"})


# -- the examples -------------------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parents[2] / "benchmarks" / "simulate"


def example(workload: str, cluster: str) -> Scenario:
    return prepare(read_workload(EXAMPLES / workload), read_cluster_file(EXAMPLES / cluster))


def test_small_examples_run() -> None:
    for workload, cluster in (("ten_prompts.csv", "eight_a6000.json"), ("mixed_day.csv", "mixed_day.json")):
        scenario = example(workload, cluster)
        outcome = summarize(simulate(scenario.pools, scenario.arrivals), price_per_hour=scenario.price_per_hour)
        assert json.dumps(outcome.as_json())
        assert 0 < outcome.utilisation <= 1


@pytest.mark.slow
def test_a_hundred_thousand_requests_on_a_thousand_devices_take_less_than_a_minute() -> None:
    start_s = time.perf_counter()
    scenario = example("hundred_thousand.jsonl", "thousand_l40.json")
    outcome = summarize(simulate(scenario.pools, scenario.arrivals))
    assert outcome.requests == 100_000
    assert outcome.num_devices == 1024
    assert time.perf_counter() - start_s < 60
