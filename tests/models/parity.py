"""Runs an adapter's stages one after the other and compares the result with the plain diffusers pipeline."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import ModelAdapter
from tests import tiny_pipelines
from tests.tiny_pipelines import Frames

PROMPT = "a red ball moves right"


def make_request(adapter: ModelAdapter, kind: str, **settings: Any) -> VideoRequest:
    """A complete request with the kind's quick settings and these changes."""
    chosen = {"prompt": PROMPT, "seed": 3, **tiny_pipelines.QUICK_SETTINGS[kind], **settings}
    return adapter.complete(VideoRequest(**chosen))


def denoise(adapter: ModelAdapter, request: VideoRequest, **precision: str) -> torch.Tensor:
    """The clean latents, by the text and denoise stages. `precision` changes the CPU's default data types."""
    chosen = dataclasses.replace(adapter.default_precision("cpu"), **precision)
    conditioning = adapter.load_text_stage("cpu", chosen).encode(request)
    stage = adapter.load_denoise_stage("cpu", chosen)
    state = stage.begin(request, conditioning)
    for step in range(request.num_inference_steps or 0):
        stage.step(state, step)
    return stage.latents(state)


def decode(adapter: ModelAdapter, request: VideoRequest, latents: torch.Tensor, *, tiling: bool = False) -> Frames:
    """All frames, chunk by chunk."""
    stage = adapter.load_decode_stage("cpu", adapter.default_precision("cpu"), tiling=tiling)
    state = stage.begin(request, latents)
    return joined([stage.chunk(state, index) for index in range(adapter.num_decode_chunks(request))])


def joined(chunks: Sequence[Frames | None]) -> Frames:
    """The video of its chunks, all of which must be there."""
    present = [chunk for chunk in chunks if chunk is not None]
    assert len(present) == len(chunks)
    return np.concatenate(present)


def run_stages(adapter: ModelAdapter, request: VideoRequest) -> tuple[torch.Tensor, Frames]:
    """Latents and frames, by the three stages."""
    latents = denoise(adapter, request)
    return latents, decode(adapter, request, latents)


def run_reference(folder: Path, request: VideoRequest) -> tuple[torch.Tensor, Frames]:
    """Latents and frames of the diffusers pipeline for the same request."""
    asked = {name: value for name, value in dataclasses.asdict(request).items() if value is not None and name != "fps"}
    return tiny_pipelines.run_diffusers(folder, **asked)


def assert_close(ours: tuple[torch.Tensor, Frames], theirs: tuple[torch.Tensor, Frames]) -> None:
    """Latents within 1e-5 (measured: 1e-6 at most), pixels within one level."""
    assert (ours[0] - theirs[0]).abs().max() <= 1e-5
    assert ours[1].shape == theirs[1].shape
    assert np.abs(ours[1].astype(int) - theirs[1].astype(int)).max() <= 1
