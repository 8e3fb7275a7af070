"""Where things are in a Wan checkpoint: configs, factors, shapes, layers. Read by the adapter and by its stages."""

import dataclasses
from typing import Any

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import LayerSplit
from pipedit.models.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class WanLayout:
    checkpoint: Checkpoint

    @property
    def transformer_config(self) -> dict[str, Any]:
        return self.checkpoint.config("transformer")

    @property
    def vae_config(self) -> dict[str, Any]:
        return self.checkpoint.config("vae")

    @property
    def has_two_experts(self) -> bool:
        return self.checkpoint.has("transformer_2") and self.boundary_ratio is not None

    @property
    def boundary_ratio(self) -> float | None:
        ratio = self.checkpoint.index.get("boundary_ratio")
        return None if ratio is None else float(ratio)

    @property
    def expands_timesteps(self) -> bool:
        """Wan 2.2 TI2V: every token carries its own timestep."""
        return bool(self.checkpoint.index.get("expand_timesteps", False))

    @property
    def temporal_factor(self) -> int:
        return int(self.vae_config.get("scale_factor_temporal", 4))

    @property
    def spatial_factor(self) -> int:
        return int(self.vae_config.get("scale_factor_spatial", 8))

    def latent_shape(self, request: VideoRequest) -> tuple[int, int, int, int, int]:
        """[1, C, F, H, W] of the latents."""
        assert request.num_frames and request.height and request.width
        frames = (request.num_frames - 1) // self.temporal_factor + 1
        channels = int(self.transformer_config["in_channels"])
        return (1, channels, frames, request.height // self.spatial_factor, request.width // self.spatial_factor)

    def layer_split(self) -> LayerSplit:
        layers = tuple(f"blocks.{layer}" for layer in range(self.transformer_config["num_layers"]))
        return LayerSplit(
            front=("patch_embedding", "condition_embedder"), layers=layers, back=("proj_out", "scale_shift_table")
        )
