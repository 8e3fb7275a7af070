"""What every family's layout has in common: the two configs that sizes come from, and the shapes of the latents."""

import abc
import dataclasses
import math
from typing import Any

from pipedit.core.request import VideoRequest
from pipedit.core.rotation import TemporalRotation
from pipedit.models.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class Layout(abc.ABC):
    """Where things are in one checkpoint. Read by the adapter and by its stages."""

    checkpoint: Checkpoint

    @property
    def transformer_config(self) -> dict[str, Any]:
        return self.checkpoint.config("transformer")

    @property
    def vae_config(self) -> dict[str, Any]:
        return self.checkpoint.config("vae")

    @property
    @abc.abstractmethod
    def temporal_factor(self) -> int:
        """Frames that one latent frame stands for (the first one stands for a single frame)."""

    @property
    @abc.abstractmethod
    def spatial_factor(self) -> int:
        """Pixels along each side of one latent position."""

    @property
    @abc.abstractmethod
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns that make one token."""

    @property
    @abc.abstractmethod
    def temporal_rotation(self) -> TemporalRotation: ...

    def latent_shape(self, request: VideoRequest) -> tuple[int, int, int, int, int]:
        """[1, C, F, H, W] of the latents."""
        assert request.num_frames
        return self.window_shape(request, (request.num_frames - 1) // self.temporal_factor + 1)

    def window_shape(self, request: VideoRequest, frames: int) -> tuple[int, int, int, int, int]:
        """[1, C, frames, H, W] of so many latent frames of the request, however many it has."""
        assert request.height and request.width
        channels = int(self.transformer_config["in_channels"])
        return (1, channels, frames, request.height // self.spatial_factor, request.width // self.spatial_factor)

    def tokens(self, latent_shape: tuple[int, ...]) -> int:
        """Of latents [1, C, F, H, W]."""
        return math.prod(size // patch for size, patch in zip(latent_shape[2:], self.patch, strict=True))
