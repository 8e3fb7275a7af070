"""Videos block by block on several stages, which are threads, against one stage, bit by bit; in pieces, and stopped."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from pipedit.core.blocks import BlockPlan, Prefix
from pipedit.parallel.stage_links import StageLinks
from pipedit.plan.block_orders import published_order
from tests.worker.pipelines_of_stages import (
    ORDERS,
    WAYS,
    Attached,
    Job,
    Pipelines,
    assert_nothing_is_left,
    denoise,
    eager,
    in_stages,
    on_one_stage,
    on_stages,
    same_bits,
)

Open = Callable[[str], Pipelines]
Latents = list[torch.Tensor]


def depths(kind: str) -> list[int]:
    """As many stages as there are layers, at most."""
    return [2, 3, 4] if kind == "hunyuan" else [2, 3]


@pytest.mark.parametrize(("way", "guided"), [("cache", True), ("rerun", True), ("cache", False)])
@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_stages_and_orders_change_no_bit(kind: str, way: str, guided: bool, opened: Open) -> None:
    pipelines = opened(kind)
    job = pipelines.job(WAYS[way], guided=guided)
    alone = on_one_stage(pipelines, job)
    for order in ORDERS.values():
        ordered = dataclasses.replace(job, order=order)
        assert same_bits(on_one_stage(pipelines, ordered), alone)
        for depth in depths(kind):
            assert same_bits(on_stages(pipelines, ordered, depth), alone), (order, depth)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_can_be_cut(way: str, opened: Open) -> None:
    pipelines = opened("hunyuan")
    for steps in (1, 3):
        job = pipelines.job(WAYS[way], steps=steps)
        alone = on_one_stage(pipelines, job)
        for depth in (2, 4):
            assert same_bits(on_stages(pipelines, dataclasses.replace(job, order=eager), depth), alone)


@pytest.mark.parametrize("kind", ["wan22", "wan_ti2v"])
def test_two_experts_and_timesteps_of_tokens_can_be_cut(kind: str, opened: Open) -> None:
    pipelines = opened(kind)
    for way in ("cache", "rerun"):
        job = pipelines.job(WAYS[way])
        assert same_bits(on_stages(pipelines, job, 3), on_one_stage(pipelines, job))


def test_orders_differ_and_so_do_videos(opened: Open) -> None:
    """The controls of what is equal above."""
    pipelines = opened("wan")
    job = pipelines.job(WAYS["cache"])
    assert list(published_order(job.plan)) != list(eager(job.plan))
    alone = on_one_stage(pipelines, job)
    noise = [job.noise[0], *(x + 1e-6 for x in job.noise[1:])]
    other = on_one_stage(pipelines, dataclasses.replace(job, noise=noise))
    assert not any(map(torch.equal, alone, other))  # the first block sees the second one


# -- in pieces, and stopped -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 2, 7, 100])
def test_pieces_of_any_length_change_nothing(piece: int, opened: Open) -> None:
    pipelines = opened("wan")
    job = pipelines.job(WAYS["cache"])
    alone = on_one_stage(pipelines, job)
    assert same_bits(denoise(job, pipelines.of_depth(1)[0], StageLinks(), 1, piece), alone)

    def work(attached: Attached, links: StageLinks) -> Latents:
        return denoise(job, attached, links, 3, piece)

    assert same_bits(in_stages(pipelines, 3, work)[0], alone)


@pytest.mark.parametrize("way", ["cache", "rerun"])
@pytest.mark.parametrize("stop", [1, 4, 9, 14])
def test_after_a_stop_nothing_is_on_its_way(way: str, stop: int, opened: Open) -> None:
    """Another video goes through the very same links."""
    pipelines = opened("wan")
    job = dataclasses.replace(pipelines.job(WAYS[way]), order=eager)
    assert stop < job.count
    stopped = dataclasses.replace(job, name="stopped", noise=[x + 1.0 for x in job.noise])
    whole = on_one_stage(pipelines, stopped)
    last = job.plan.num_steps - 1
    over = [op.block for op in list(eager(job.plan))[:stop] if op.step == last]

    def work(attached: Attached, links: StageLinks) -> Latents:
        denoiser = stopped.denoiser(attached, links, 3)
        finished = [block for ran in denoiser.run(stop) for block in ran.finished]
        finished += denoiser.drain()
        attached.context.abandon()
        assert_nothing_is_left(attached, links)
        assert denoiser.drain() == ()
        assert [block.block for block in finished] == (over if attached.stage.first else [])
        assert same_bits([block.latents for block in finished], whole[: len(finished)])
        return denoise(job, attached, links, 3)

    assert same_bits(in_stages(pipelines, 3, work)[0], on_one_stage(pipelines, job))


def test_videos_do_not_read_each_others_keys(opened: Open) -> None:
    """Two in turns on one stage, as far as their kernel is concerned."""
    pipelines = opened("wan")
    job = pipelines.job(WAYS["cache"])
    other = dataclasses.replace(job, name="other", noise=[x.flip(2) for x in job.noise])
    attached, finished = pipelines.of_depth(1)[0], dict[str, Latents]()
    denoisers = {each.name: each.denoiser(attached, StageLinks(), 1) for each in (job, other)}
    for _ in range(job.count):
        for name, denoiser in denoisers.items():
            finished.setdefault(name, []).extend(x.latents for ran in denoiser.run(1) for x in ran.finished)
    for each in (job, other):
        finished[each.name] += [block.latents for block in denoisers[each.name].drain()]
        assert same_bits(finished[each.name], on_one_stage(pipelines, each))


def test_what_ran_is_told_with_its_passes(opened: Open) -> None:
    pipelines = opened("wan")
    job = pipelines.job(WAYS["cache"])
    attached = pipelines.of_depth(1)[0]
    denoiser = job.denoiser(attached, StageLinks(), 1)
    ran = list(denoiser.run(job.count + 3))
    assert [one.op for one in ran] == list(published_order(job.plan))
    assert all(one.passes == ((0.0, 0.0),) * 2 for one in ran)
    finished = [block.block for one in ran for block in one.finished]
    assert finished + [block.block for block in denoiser.drain()] == [0, 1, 2, 3]
    assert list(denoiser.run(1)) == []


def test_a_long_video_keeps_few_blocks_and_entries(opened: Open) -> None:
    """As many as there are steps, not as there are blocks."""
    pipelines, most = opened("wan"), {}
    attached = pipelines.of_depth(1)[0]
    for count in (6, 12):
        for prefix in Prefix:
            plan = BlockPlan(latents=count, block_latents=1, context_latents=1, num_steps=2, prefix=prefix)
            job = Job(
                plan=plan,
                request=pipelines.request(2),
                texts=pipelines.texts(),
                noise=pipelines.noise(plan),
                order=eager,
            )
            denoiser = job.denoiser(attached, StageLinks(), 1)
            held = [(len(denoiser._blocks), attached.context.nbytes) for _ in denoiser.run(job.count)]
            most[prefix, count] = tuple(map(max, zip(*held, strict=True)))
            denoiser.drain()
            assert not attached.context.entries
    for prefix in Prefix:
        assert most[prefix, 6] == most[prefix, 12]
