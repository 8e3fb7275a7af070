"""Videos block by block, on one stage, against the algorithm in plain words (block_reference.py)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from pipedit.core.blocks import Storage
from pipedit.parallel.stage_links import StageLinks
from tests.tiny_pipelines import KINDS
from tests.worker.block_reference import Mistake, Model, Video
from tests.worker.pipelines_of_stages import (
    FLOAT32,
    WAYS,
    Attached,
    Job,
    Pipelines,
    Way,
    denoise,
    on_one_stage,
    same_bits,
)

Open = Callable[[str], Pipelines]
TOLERANCE = 1e-5  # of the largest latent; measured: 8e-7 at most


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> Callable[[str], Model]:
    return functools.cache(lambda kind: Model(tiny_folder(kind), kind))


def reference(
    model: Model, way: Way, job: Job, mistake: Mistake | None = None, *, norm_of_reader: bool | None = None
) -> list[torch.Tensor]:
    """Keys are normed by who reads them, as in the released code, where that is the same as who made them."""
    by_reader = len(model.experts) == 1 if norm_of_reader is None else norm_of_reader
    video = Video(
        model,
        job.request,
        job.texts,
        job.noise,
        context=way.context,
        rerun=way.rerun,
        norm_of_reader=by_reader,
        mistake=mistake,
    )
    return video.make()


def difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest, in units of the largest latent."""
    largest = max(float(x.abs().max()) for x in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_blocks_follow_the_rules(kind: str, way: str, opened: Open, model: Callable[[str], Model]) -> None:
    pipelines, chosen = opened(kind), WAYS[way]
    job = pipelines.job(chosen)
    ours = on_one_stage(pipelines, job)
    assert tuple(x.shape[2] for x in ours) == chosen.sizes
    assert {x.dtype for x in ours} == {torch.float32}
    assert difference(ours, reference(model(kind), chosen, job)) <= TOLERANCE


@pytest.mark.parametrize("way", ["cache", "rerun"])
@pytest.mark.parametrize("kind", ["wan22", "wan_ti2v"])
def test_so_do_two_experts_and_timesteps_of_tokens(
    kind: str, way: str, opened: Open, model: Callable[[str], Model]
) -> None:
    pipelines, chosen = opened(kind), WAYS[way]
    job = pipelines.job(chosen)
    assert difference(on_one_stage(pipelines, job), reference(model(kind), chosen, job)) <= TOLERANCE


@pytest.mark.parametrize("way", ["cache", "rerun"])
def test_keys_are_normed_by_the_expert_that_made_them(way: str, opened: Open, model: Callable[[str], Model]) -> None:
    """At the boundary a block reads keys of its successor that come from the other expert. The released code norms
    them afresh, with the weights of the expert that reads them: that gives other latents, though not by far."""
    pipelines, chosen = opened("wan22"), WAYS[way]
    job = pipelines.job(chosen)
    ours, released = on_one_stage(pipelines, job), reference(model("wan22"), chosen, job, norm_of_reader=True)
    assert 1e-3 < difference(ours, released) < 1e-2
    state = pipelines.of_depth(1)[0].stage.begin(job.request, dict(job.texts))
    assert [state.expert(step) for step in range(job.plan.num_steps)] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_without_guidance_there_is_one_branch(kind: str, opened: Open, model: Callable[[str], Model]) -> None:
    pipelines, way = opened(kind), WAYS["cache"]
    job = pipelines.job(way, guided=False)
    ours = on_one_stage(pipelines, job)
    assert difference(ours, reference(model(kind), way, job)) <= TOLERANCE
    assert difference(ours, on_one_stage(pipelines, pipelines.job(way))) > 1e-2


@pytest.mark.parametrize("way", ["cache", "rerun"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_broken_rule_is_noticed(kind: str, way: str, opened: Open, model: Callable[[str], Model]) -> None:
    pipelines, chosen = opened(kind), WAYS[way]
    job = pipelines.job(chosen)
    ours = on_one_stage(pipelines, job)
    for mistake in Mistake:
        if chosen.rerun and mistake is Mistake.LATE_PREFIX:
            continue  # there are no keys that could stand anywhere
            assert difference(ours, reference(model(kind), chosen, job, mistake)) > 100 * TOLERANCE, mistake


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_keys_may_wait_elsewhere(kind: str, opened: Open) -> None:
    """In host memory nothing changes; in eight bits something does, and not by far."""
    pipelines = opened(kind)
    layers = range(len(pipelines.adapter.layer_split().layers))
    job = pipelines.job(WAYS["cache"])
    ours = on_one_stage(pipelines, job)
    host, rounded = (
        denoise(job, Attached.load(pipelines.adapter, layers, storage), StageLinks(), 1)
        for storage in (Storage.HOST, Storage.INT8)
    )
    assert same_bits(host, ours)
    assert 1e-5 < difference(rounded, ours) < 1e-2


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_a_video_in_one_block_is_denoised_as_ever(kind: str, opened: Open) -> None:
    pipelines = opened(kind)
    job = pipelines.job(WAYS["one block"])
    request = dataclasses.replace(job.request, num_frames=4 * (3 - 1) + 1)
    stage = pipelines.adapter.load_denoise_stage("cpu", FLOAT32)
    state = stage.begin(request, dict(job.texts))
    noise = stage.latents(state).clone()
    for step in range(job.plan.num_steps):
        stage.step(state, step)
    ours = on_one_stage(pipelines, dataclasses.replace(job, noise=[noise]))
    assert difference(ours, [stage.latents(state)]) <= TOLERANCE
