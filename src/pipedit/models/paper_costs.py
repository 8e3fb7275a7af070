"""What PipeDiT's published cases cost: its models by the paper's names, decoded the way their own repositories do."""

import dataclasses
import difflib
import functools

from pipedit.core.errors import InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.models.adapter import Precision
from pipedit.models.hunyuan_video import vae_costs
from pipedit.models.open_sora_plan.costs import request_cost
from pipedit.models.published_configs import PUBLISHED
from pipedit.models.registry import open_published
from pipedit.plan.costs import Operations, RequestCost

_HUNYUAN_PRECISION = Precision(text_encoder="float16", transformer="bfloat16", vae="float16")
# HunyuanVideo's own code decodes 64 frames at a time that overlap by a quarter, each with a latent frame in front;
# diffusers takes 16 frames. Spatial tiles are the same.
_WINDOW, _STRIDE = 17, 12
_MODELS = ("OpenSoraPlan", "HunyuanVideo")


@functools.lru_cache(maxsize=1024)
def paper_cost(model: str, width: int, height: int, num_frames: int) -> RequestCost:
    """One step; nothing but `num_steps` depends on how many there are. Raises InvalidRequestError for other models."""
    if model == "OpenSoraPlan":
        return request_cost(width=width, height=height, num_frames=num_frames, num_steps=1)
    if model == "HunyuanVideo":
        return _hunyuan_video_cost(width, height, num_frames)
    nearest = difflib.get_close_matches(model, _MODELS, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise InvalidRequestError([f"model {model!r} is not one of the paper's: {', '.join(_MODELS)}{hint}"])


def _hunyuan_video_cost(width: int, height: int, num_frames: int) -> RequestCost:
    adapter = open_published("hunyuanvideo")
    request = adapter.complete(
        VideoRequest(prompt="", width=width, height=height, num_frames=num_frames, num_inference_steps=1, seed=0)
    )
    latents, config = (num_frames - 1) // 4 + 1, dict(PUBLISHED["hunyuanvideo"]["vae"])
    whole = Operations()
    for start in range(0, latents, _STRIDE) if latents >= _WINDOW else (0,):
        frames = min(_WINDOW, latents - start)
        whole += vae_costs.decode_operations(config, frames=frames, rows=height // 8, columns=width // 8, tiling=True)
    cost = adapter.cost(request, _HUNYUAN_PRECISION, tiling=True)
    return dataclasses.replace(cost, num_chunks=1, decode_first_chunk=whole, decode_last_chunk=None)
