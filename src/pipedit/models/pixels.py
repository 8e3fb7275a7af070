"""From the VAE's output to picture bytes."""

from typing import Any

import numpy as np
import torch


def to_frames(video: torch.Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """[1, 3, F, H, W] in [-1, 1] (clamped here) -> uint8 [F, H, W, 3] on the host, rounded to the nearest level."""
    levels = (video[0].float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    frames: np.ndarray[Any, np.dtype[np.uint8]] = levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return frames
