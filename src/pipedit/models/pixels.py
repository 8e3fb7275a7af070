"""What goes into a VAE is checked, what comes out of it becomes picture bytes."""

from typing import Any

import numpy as np
import torch

from pipedit.core.errors import NonFiniteError


def require_finite(latents: torch.Tensor) -> None:
    """Raises NonFiniteError for latents that would decode to a meaningless picture without any error."""
    if not bool(torch.isfinite(latents).all()):
        raise NonFiniteError(
            "the model produced latents that are not finite numbers, so there is no video to decode; "
            "try another data type (float32 or bfloat16) or a lower guidance scale"
        )


def to_levels(video: torch.Tensor) -> torch.Tensor:
    """[1, 3, F, H, W] in [-1, 1] (clamped here) -> uint8 [F, H, W, 3] where it was, rounded to the nearest level. Each
    position for itself, so that a part of a picture gives a part of the frame."""
    levels = (video[0].float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous()


def to_frames(video: torch.Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """`to_levels`, on the host."""
    return to_host(to_levels(video))


def to_host(levels: torch.Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    frames: np.ndarray[Any, np.dtype[np.uint8]] = levels.cpu().numpy()
    return frames
