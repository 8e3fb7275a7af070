"""Workloads of long videos on a simulated cluster: stages of layers, with the engine's own block scheduler."""

import dataclasses
import itertools
from typing import Any

import pytest

from pipedit.core.errors import InsufficientMemoryError, InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.engine.placing import placement_of
from pipedit.engine.settings import EngineSettings
from pipedit.engine.simulation import prepare
from pipedit.plan.block_arrangement import BlockArrangement
from pipedit.plan.cluster_file import ClusterFile, ReplicaSpec
from pipedit.plan.outcome import summarize
from pipedit.plan.simulator import simulate
from pipedit.plan.workload import Stream

WAN = "wan2.1-t2v-1.3b"
LONG = VideoRequest(prompt="", width=480, height=352, num_frames=161, num_inference_steps=5)
EIGHT = ClusterFile(device="rtx4090", num_devices=8, devices_per_node=8)


def stream(count: int = 2, **settings: Any) -> Stream:
    return Stream(model=WAN, request=dataclasses.replace(LONG, **settings), count=count, source="mix.csv:2")


@pytest.mark.parametrize(
    "given", [{"num_workers": 4}, {"num_workers": 4, "decode_workers": 1}, {"encode_on": "decode"}]
)
def test_who_does_what_is_as_in_the_engine(given: dict[str, Any]) -> None:
    scenario = prepare([stream()], EIGHT, {"strategy": "dualparal", **given})
    settings = EngineSettings.of(strategy="dualparal", **{"num_workers": 8, **given})
    (engines,) = scenario.engines
    assert engines.pool.placement == engines.arrangement.placement == placement_of(settings)
    assert engines.pool.count == 8 // settings.num_workers


def test_videos_of_a_pipeline_follow_each_other() -> None:
    scenario = prepare([stream(3), stream(1, num_frames=81)], EIGHT, {"strategy": "dualparal", "block_size": 4})
    run = simulate(scenario.pools, scenario.arrivals, keep_spans=True)
    outcome = summarize(run)
    assert outcome.requests == 4
    lives = sorted(run.lives, key=lambda life: life.begun_s)
    assert all(after.begun_s >= before.done_s for before, after in itertools.pairwise(lives))
    assert {span.block for span in run.spans if span.what == "decode"} == set(range(11))
    assert all(life.begun_s < life.first_frames_s < life.done_s for life in lives)


def test_a_cluster_file_may_ask_for_it() -> None:
    settings = {"strategy": "dualparal", "num_workers": 4, "context": 1, "prefix": "rerun", "context_storage": "device"}
    scenario = prepare([stream()], dataclasses.replace(EIGHT, replicas=(ReplicaSpec(settings=settings),)))
    (engines,) = scenario.engines
    assert isinstance(engines.arrangement, BlockArrangement)
    assert (engines.arrangement.plan.context_latents, engines.arrangement.plan.prefix) == (1, "rerun")
    assert engines.pool.count == 2


def test_memory_is_checked() -> None:
    too_long = stream(width=1280, height=720, num_frames=1025, num_inference_steps=50)
    with pytest.raises(
        InsufficientMemoryError, match=r"layers on 8 stages, the last one decodes: a worker needs about"
    ):
        prepare([too_long], EIGHT, {"strategy": "dualparal"})


def test_more_stages_than_layers() -> None:
    many = dataclasses.replace(EIGHT, num_devices=40, devices_per_node=40)
    with pytest.raises(InvalidRequestError) as caught:
        prepare([stream()], many, {"strategy": "dualparal", "num_workers": 40})
    assert caught.value.problems == ("replicas: 40 stages cannot share 30 layers",)


@pytest.mark.parametrize("given", [{"block_size": 4}, {"context": 0}, {"prefix": "rerun"}, {"dualparal_compat": True}])
def test_what_means_nothing_elsewhere_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        prepare([stream()], EIGHT, {"strategy": "colocated", **given})
    assert caught.value.problems == (f"replicas: {next(iter(given))} needs strategy dualparal",)


def test_auto_never_takes_it() -> None:
    scenario = prepare([stream(1, num_frames=1025, num_inference_steps=2)], EIGHT)
    assert not isinstance(scenario.engines[0].arrangement, BlockArrangement)
