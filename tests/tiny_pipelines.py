"""Tiny random-weight pipelines for tests, and the reference run of plain diffusers that pipedit must equal."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from pipedit.models.random_pipelines import (
    SIZES,
    Arguments,
    HunyuanSizes,
    WanSizes,
    build,
    clip_tokenizer,
    llama3_tokenizer,
    randomise,
    umt5_tokenizer,
)

__all__ = [
    "KINDS",
    "QUICK_SETTINGS",
    "SIZES",
    "Frames",
    "HunyuanSizes",
    "WanSizes",
    "build",
    "clip_tokenizer",
    "llama3_tokenizer",
    "load_diffusers",
    "randomise",
    "run_diffusers",
    "run_pipeline",
    "umt5_tokenizer",
]

Frames = np.ndarray[Any, np.dtype[np.uint8]]

KINDS = ("wan", "wan22", "wan_ti2v", "hunyuan")  # the tiny ones, for tests

_QUICK = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "max_sequence_length": 32}
QUICK_SETTINGS: Mapping[str, Arguments] = {
    "wan": _QUICK | {"guidance_scale": 5.0},
    "wan22": _QUICK | {"guidance_scale": 4.0, "guidance_scale_2": 3.0, "num_inference_steps": 6},
    "wan_ti2v": _QUICK | {"guidance_scale": 5.0, "height": 64, "width": 96},
    "hunyuan": _QUICK | {"guidance_scale": 6.0},
}


def load_diffusers(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The plain diffusers pipeline. A byte-level tokenizer is passed in, because the class named for HunyuanVideo
    rebuilds it wrongly under transformers 5."""
    named = json.loads((folder / "model_index.json").read_text())["tokenizer"][1]
    parts: dict[str, Any] = {}
    if named == "LlamaTokenizerFast":
        parts["tokenizer"] = transformers.PreTrainedTokenizerFast.from_pretrained(folder, subfolder="tokenizer")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_pipeline(
    pipe: Any, *, prompt: str, seed: int, flow_shift: float | None = None, **settings: Any
) -> tuple[torch.Tensor, Frames]:
    """Runs a loaded pipeline once with a fresh noise scheduler. Returns what `run_diffusers` returns."""
    name = "flow_shift" if "flow_shift" in pipe.scheduler.config else "shift"
    before = pipe.scheduler
    changes = {} if flow_shift is None else {name: flow_shift}
    pipe.scheduler = type(before).from_config(before.config, **changes)
    last: dict[str, torch.Tensor] = {}

    def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last["latents"] = tensors["latents"].clone()
        return tensors

    generator = torch.Generator("cpu").manual_seed(seed)
    video = pipe(prompt=prompt, generator=generator, output_type="np", callback_on_step_end=keep, **settings).frames[0]
    pipe.scheduler = before
    return last["latents"].float(), (video * 255).round().astype(np.uint8)


def run_diffusers(
    folder: Path, *, prompt: str, seed: int, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[torch.Tensor, Frames]:
    """Loads the folder with diffusers and runs it: the reference that pipedit must equal.

    `settings` go to the pipeline's call (plus `flow_shift`). Returns the latents [1, C, F, H, W] float32 after the last
    step, before the VAE's scaling, and the frames [F, H, W, 3] uint8.
    """
    return run_pipeline(load_diffusers(folder, dtype=dtype), prompt=prompt, seed=seed, **settings)
