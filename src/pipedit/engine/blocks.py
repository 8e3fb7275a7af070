"""Videos that are made block by block: what the settings mean for a request, and what is wrong with them."""

import dataclasses
from typing import Any

from pipedit.core.blocks import BlockPlan, Prefix, Storage
from pipedit.core.request import VideoRequest
from pipedit.engine.fitting import CostOf
from pipedit.engine.settings import EngineSettings, strategy_problems
from pipedit.models.adapter import ModelAdapter, Precision
from pipedit.models.noise_schedulers import snapshot_problem
from pipedit.plan.block_memory import stage_cost, window_latents
from pipedit.plan.costs import RequestCost


def block_plan(request: VideoRequest, adapter: ModelAdapter, settings: EngineSettings) -> BlockPlan | None:
    """Of a completed request; None where videos are made in one piece."""
    if not settings.is_blockwise:
        return None
    assert request.num_inference_steps is not None
    return BlockPlan(
        latents=adapter.latent_shape(request)[2],
        block_latents=settings.block_size,
        context_latents=settings.context_latents,
        num_steps=request.num_inference_steps,
        prefix=Prefix(settings.prefix),
        compat=settings.dualparal_compat,
    )


def seen_at_once(request: VideoRequest, adapter: ModelAdapter, settings: EngineSettings) -> VideoRequest:
    """The completed request as the model sees it: no longer than a window. A length that is illegal stays, and so does
    any where the settings are wrong."""
    frames, step = request.num_frames, adapter.size_rules.frame_step
    if not settings.is_blockwise or strategy_problems(settings):
        return request
    if frames is None or frames < 1 or (frames - 1) % step or not request.num_inference_steps:
        return request
    plan = block_plan(request, adapter, settings)
    assert plan is not None
    return dataclasses.replace(request, num_frames=(window_latents(plan) - 1) * step + 1)


def output_frames(request: VideoRequest, adapter: ModelAdapter, settings: EngineSettings) -> int:
    """Of a completed request."""
    plan = block_plan(request, adapter, settings)
    assert request.num_frames is not None
    if plan is None or not plan.compat or plan.output_latents is None:
        return request.num_frames
    return (plan.output_latents - 1) * adapter.size_rules.frame_step + 1


def stage_cost_of(adapter: ModelAdapter, precision: Precision, settings: EngineSettings) -> CostOf:
    """What the largest stage has to hold for a request."""

    def cost_of(request: VideoRequest, /, *, tiling: bool, decoders: int) -> RequestCost:
        plan = block_plan(request, adapter, settings)
        assert plan is not None
        window = seen_at_once(request, adapter, settings)
        return stage_cost(
            adapter.cost(request, precision, tiling=tiling, decoders=decoders),
            adapter.cost(window, precision, tiling=tiling, decoders=decoders),
            plan,
            stages=settings.num_denoisers,
            storage=Storage(settings.context_storage),
            decodes=settings.num_denoisers == settings.num_workers,
        )

    return cost_of


def saving_problems(settings: EngineSettings, adapter: ModelAdapter) -> list[str]:
    """Why a run cannot be saved and gone on with, a sentence each."""
    if not settings.is_blockwise:
        return ["a checkpoint needs --strategy dualparal: other videos are made as a whole"]
    checkpoint = adapter.checkpoint
    problem = snapshot_problem(checkpoint.component_class("scheduler"), checkpoint.config("scheduler"))
    return [f"{checkpoint.name}: {problem}"] if problem else []


def block_metadata(request: VideoRequest, adapter: ModelAdapter, settings: EngineSettings) -> dict[str, Any]:
    """That the video is an approximation, and of which kind."""
    plan = block_plan(request, adapter, settings)
    if plan is None:
        return {}
    return {"dualparal": {**dataclasses.asdict(plan), "context_storage": str(settings.context_storage)}}
