"""Models by name, for planning alone: sizes and costs, without checkpoint and network where configs are built in.

Some models are known by their costs only; nothing but planning can be done with those.
"""

import dataclasses
import functools
from typing import Protocol

from pipedit.core.errors import InvalidRequestError
from pipedit.core.request import RequestDefaults, VideoRequest
from pipedit.models.adapter import ModelAdapter, SizeRules
from pipedit.models.open_sora_plan.costs import TEXT_TOKENS, request_cost
from pipedit.models.planned_videos import planned_video
from pipedit.models.published_configs import PUBLISHED
from pipedit.models.registry import KNOWN_MODELS, open_model, open_published
from pipedit.models.validation import check_request, check_values, size_problems
from pipedit.plan.block_predict import BlockVideo
from pipedit.plan.costs import RequestCost
from pipedit.plan.planned_video import PlannedVideo

_ANY_PROMPT = "a prompt"
OPEN_SORA_PLAN = "open-sora-plan-v1.3"


class PlannableModel(Protocol):
    """A model of which the costs are known. `can_run`: it can be generated with, too."""

    can_run: bool

    def complete(self, request: VideoRequest) -> VideoRequest:
        """The request with the model's defaults in what it leaves open."""

    @property
    def size_rules(self) -> SizeRules: ...

    def problems(self, request: VideoRequest) -> list[str]:
        """Why a completed request cannot run on it. The prompts are not looked at."""

    def planned(self, request: VideoRequest, count: int = 1) -> PlannedVideo:
        """`count` videos like this completed request, which has no problems."""

    def in_blocks(self, request: VideoRequest, count: int = 1, *, tiling: bool = False) -> BlockVideo:
        """The same, made block by block. `tiling`: the VAE decodes in spatial tiles. Raises InvalidRequestError for a
        model with which that cannot be."""


def find_model(name: str, *, device_type: str = "cuda") -> PlannableModel:
    """By what people call it: a short name in any spelling ("HunyuanVideo", "hunyuanvideo"), a hub id or a folder.
    Raises InvalidRequestError or CheckpointError for anything else."""
    if _plain(name) in (_plain(OPEN_SORA_PLAN), "opensoraplan"):
        return _OpenSoraPlan()
    aliases = {_plain(alias): alias for alias in PUBLISHED}
    aliases |= {_plain(model.hub_id): model.alias for model in KNOWN_MODELS if model.hub_id is not None}
    alias = aliases.get(_plain(name))
    adapter = open_model(name) if alias is None else open_published(alias)
    return _Adapted(adapter, device_type)


def known_names() -> list[str]:
    """Short names of the models that need no files."""
    return [*PUBLISHED, OPEN_SORA_PLAN]


def is_same_model(name: str, other: str) -> bool:
    """Whether two names are spellings of one."""
    return _plain(name) == _plain(other)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _prompted(request: VideoRequest) -> VideoRequest:
    """Streams of requests have no prompts yet; one to guide away from costs as much as any other."""
    negative = "" if (request.true_cfg_scale or 0) > 1 else None
    return dataclasses.replace(request, prompt=_ANY_PROMPT, negative_prompt=negative)


class _Adapted:
    """Any model with an adapter."""

    can_run = True

    def __init__(self, adapter: ModelAdapter, device_type: str) -> None:
        self._adapter, self._precision = adapter, adapter.default_precision(device_type)

    @property
    def size_rules(self) -> SizeRules:
        return self._adapter.size_rules

    def complete(self, request: VideoRequest) -> VideoRequest:
        return self._adapter.complete(request)

    def problems(self, request: VideoRequest) -> list[str]:
        return check_request(_prompted(request), self._adapter)

    def planned(self, request: VideoRequest, count: int = 1) -> PlannedVideo:
        return planned_video(_prompted(request), self._adapter, self._precision, count=count)

    def in_blocks(self, request: VideoRequest, count: int = 1, *, tiling: bool = False) -> BlockVideo:
        adapter, precision, step = self._adapter, self._precision, self.size_rules.frame_step
        request, latents = _prompted(request), adapter.latent_shape(request)[2]
        if adapter.token_layout(request).latent_frames != latents:
            name = adapter.checkpoint.name
            raise InvalidRequestError([f"{name} makes one token of several latent frames: its videos have no blocks"])

        @functools.cache
        def cost_of(count: int) -> RequestCost:
            shorter = dataclasses.replace(request, num_frames=(count - 1) * step + 1)
            return adapter.cost(shorter, precision, tiling=tiling)

        def ready_chunks(come: int, is_complete: bool) -> int:
            return adapter.num_ready_chunks(come, is_complete=is_complete)

        return BlockVideo(request=request, latents=latents, cost_of=cost_of, ready_chunks=ready_chunks, count=count)


class _OpenSoraPlan:
    """Open-Sora-Plan v1.3, as published."""

    can_run = False
    _DEFAULTS = RequestDefaults(
        height=352,
        width=640,
        num_frames=93,
        fps=18.0,
        num_inference_steps=100,
        guidance_scale=7.5,
        max_sequence_length=TEXT_TOKENS,
    )
    size_rules = SizeRules(frame_step=4, size_multiple=16)

    def complete(self, request: VideoRequest) -> VideoRequest:
        return request.complete(self._DEFAULTS)

    def problems(self, request: VideoRequest) -> list[str]:
        others = ("true_cfg_scale", "guidance_scale_2", "flow_shift")
        foreign = [f"{name} is not for Open-Sora-Plan" for name in others if getattr(request, name) is not None]
        return [*check_values(_prompted(request)), *size_problems(request, self.size_rules), *foreign]

    def planned(self, request: VideoRequest, count: int = 1) -> PlannedVideo:
        cost = _open_sora_plan_cost(request)
        assert cost.attention is not None
        return PlannedVideo(
            request=request,
            heads=cost.attention.heads,
            cost_with=lambda _decoders: cost,
            chunks_with=lambda _decoders: cost.num_chunks,
            count=count,
        )

    def in_blocks(self, request: VideoRequest, count: int = 1, *, tiling: bool = False) -> BlockVideo:
        raise InvalidRequestError([f"{OPEN_SORA_PLAN} cannot be run block by block; use another strategy"])


def _open_sora_plan_cost(request: VideoRequest) -> RequestCost:
    width, height, frames, steps = request.width, request.height, request.num_frames, request.num_inference_steps
    assert width and height and frames and steps and request.guidance_scale is not None, "complete the request first"
    return request_cost(
        width=width, height=height, num_frames=frames, num_steps=steps, guided=request.guidance_scale > 1
    )
