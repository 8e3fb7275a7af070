"""Rotated keys moved along in time: rotary positions only count as differences, so what was computed at one place in a
video can be read from any other. Knows no model: it is told which channels turn, and how fast."""

import functools

import torch

from pipedit.core.rotation import TemporalRotation


def turn(keys: torch.Tensor, frames: int, rotation: TemporalRotation) -> torch.Tensor:
    """Keys [B, n, S, D] that were rotated at their positions, as if each stood `frames` latent frames later (negative:
    earlier). Computed in float32 (float64 for float64), rounded once to the data type of `keys`.

    Memory: the result, and the channels that turn in float32. For 0 frames the keys themselves.
    """
    if frames == 0:
        return keys
    assert keys.shape[-1] >= rotation.channels, (tuple(keys.shape), rotation)
    wide = torch.promote_types(keys.dtype, torch.float32)
    cosines, sines = _cosines_and_sines(rotation, frames, keys.device, wide)
    channels = keys[..., : rotation.channels].to(wide)
    even, odd = channels[..., ::2], channels[..., 1::2]
    turned = keys.clone()
    turned[..., : rotation.channels : 2] = even * cosines - odd * sines
    turned[..., 1 : rotation.channels : 2] = even * sines + odd * cosines
    return turned


@functools.lru_cache(maxsize=256)
def _cosines_and_sines(
    rotation: TemporalRotation, frames: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """One of each for every pair. Kept, because every layer asks for the same, and copying to a GPU waits for it."""
    with torch.inference_mode(False):  # ordinary tensors, whoever asks first
        angles = torch.tensor(rotation.angles(frames), dtype=torch.float64)
        return angles.cos().to(device, dtype), angles.sin().to(device, dtype)
