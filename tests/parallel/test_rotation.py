"""Keys moved along in time against the models' own rotary embeddings, at their published sizes."""

import functools
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.models.embeddings import apply_rotary_emb
from hypothesis import given
from hypothesis import strategies as st

from pipedit.core.rotation import TemporalRotation
from pipedit.models.hunyuan_video import HunyuanVideoAdapter
from pipedit.models.registry import open_published
from pipedit.models.wan import WanAdapter
from pipedit.parallel.rotation import turn

FRAMES, ROWS, COLUMNS = 12, 2, 3  # of tokens
MODELS = ("wan2.1-t2v-1.3b", "wan2.2-ti2v-5b", "hunyuanvideo")


@functools.cache
def declared(model: str) -> tuple[TemporalRotation, int, Any]:
    """What the family declares, the width of a head, and the model's own module for cosines and sines."""
    adapter = open_published(model)
    assert isinstance(adapter, (WanAdapter, HunyuanVideoAdapter))
    config, name = adapter.checkpoint.config("transformer"), adapter.checkpoint.component_class("transformer")
    shortened = {**config, "num_layers": 0} | ({"num_single_layers": 0} if "num_single_layers" in config else {})
    with init_empty_weights():
        transformer = getattr(diffusers, str(name)).from_config(shortened)
    return adapter.layout.temporal_rotation, config["attention_head_dim"], transformer.rope


def rotated(keys: torch.Tensor, model: str, first: int) -> torch.Tensor:
    """Keys [B, n, S, D] of the frames from `first` on, as the model's attention rotates them."""
    _, _, rope = declared(model)
    cosines, sines = (x.reshape(-1, x.shape[-1]) for x in rope(torch.empty(1, 1, FRAMES, 2 * ROWS, 2 * COLUMNS)))
    start = first * ROWS * COLUMNS
    rows = slice(start, start + keys.shape[2])
    turned: torch.Tensor = apply_rotary_emb(keys, (cosines[rows], sines[rows]), sequence_dim=2)
    return turned


def draw(width: int, frames: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Keys between -1 and 1."""
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.rand(1, 2, frames * ROWS * COLUMNS, width, generator=generator) - 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("frames", [1, 3, 8])
@pytest.mark.parametrize("model", MODELS)
def test_turned_keys_stand_where_they_were_turned_to(model: str, frames: int, dtype: torch.dtype) -> None:
    rotation, width, _ = declared(model)
    keys = draw(width, FRAMES - frames, dtype)
    early, late = rotated(keys, model, 0), rotated(keys, model, frames)
    assert (turn(early, frames, rotation) - late).abs().max() <= 1e-6
    assert (turn(late, -frames, rotation) - early).abs().max() <= 1e-6
    assert turn(early, frames, rotation).dtype == dtype
    # What is nearly right is not right.
    others = [
        (frames + 1, rotation),
        (-frames, rotation),
        (frames, TemporalRotation(channels=rotation.channels - 2, theta=rotation.theta)),
        (frames, TemporalRotation(channels=rotation.channels, theta=rotation.theta * 1.01)),
    ]
    for wrong_frames, wrong in others:
        assert (turn(early, wrong_frames, wrong) - late).abs().max() > 1e-4


@given(there=st.integers(-300, 300), back=st.integers(-300, 300))
def test_turns_add_up(there: int, back: int) -> None:
    rotation, keys = TemporalRotation(channels=8, theta=100.0), draw(12, 2, torch.float64)
    twice = turn(turn(keys, there, rotation), back, rotation)
    assert torch.allclose(twice, turn(keys, there + back, rotation), atol=1e-12)
    assert torch.equal(twice[..., 8:], keys[..., 8:])


def test_half_precision_is_rounded_once() -> None:
    rotation, keys = TemporalRotation(channels=8, theta=100.0), draw(12, 2, torch.bfloat16)
    before = keys.clone()
    assert torch.equal(turn(keys, 5, rotation), turn(keys.float(), 5, rotation).bfloat16())
    assert torch.equal(keys, before)
    assert turn(keys, 0, rotation) is keys


def test_views_of_rows_are_turned_as_they_are() -> None:
    """As the exchange hands keys out: [S, B, 3, n, D] permuted."""
    rotation = TemporalRotation(channels=4, theta=10.0)
    keys = torch.randn(6, 1, 3, 2, 12)[:, :, 1].permute(1, 2, 0, 3)
    assert torch.equal(turn(keys, 3, rotation), turn(keys.contiguous(), 3, rotation))
