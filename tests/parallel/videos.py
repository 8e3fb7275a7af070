"""Tiny pipelines and the videos that ranks and the test process make with them."""

import functools
from pathlib import Path
from typing import Any

import torch

from tests import tiny_pipelines

Settings = dict[str, Any]
PROMPTS = ["a red ball moves right", "two green triangles"]
NEGATIVE = "blurry"
EXPERTS = ("transformer", "transformer_2")


@functools.cache
def load(folder: str) -> Any:
    return tiny_pipelines.load_diffusers(Path(folder))


def settings_of(kind: str, **changes: Any) -> Settings:
    """3 x 2 x 3 = 18 latent tokens, which neither 4 ranks nor 4 heads on 3 ranks share evenly."""
    return {"prompt": PROMPTS[0], "seed": 3, **tiny_pipelines.QUICK_SETTINGS[kind], **changes}


def make_latents(pipe: Any, *, seed: int, **settings: Any) -> torch.Tensor:
    """The clean latents, float32."""
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    generator = torch.Generator("cpu").manual_seed(seed)
    latents: torch.Tensor = pipe(generator=generator, output_type="latent", **settings).frames
    return latents.float()


def parts_of(pipe: Any) -> list[Any]:
    return [part for name in EXPERTS if (part := getattr(pipe, name, None)) is not None]
