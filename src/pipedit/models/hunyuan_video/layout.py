"""Where things are in a HunyuanVideo checkpoint: configs, factors, shapes, layers. Read by adapter and stages."""

import dataclasses
from typing import Any

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import LayerSplit
from pipedit.models.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class HunyuanVideoLayout:
    checkpoint: Checkpoint

    @property
    def transformer_config(self) -> dict[str, Any]:
        return self.checkpoint.config("transformer")

    @property
    def vae_config(self) -> dict[str, Any]:
        return self.checkpoint.config("vae")

    @property
    def temporal_factor(self) -> int:
        return int(self.vae_config.get("temporal_compression_ratio", 4))

    @property
    def spatial_factor(self) -> int:
        return int(self.vae_config.get("spatial_compression_ratio", 8))

    def latent_shape(self, request: VideoRequest) -> tuple[int, int, int, int, int]:
        """[1, C, F, H, W] of the latents."""
        assert request.num_frames and request.height and request.width
        frames = (request.num_frames - 1) // self.temporal_factor + 1
        channels = int(self.transformer_config["in_channels"])
        return (1, channels, frames, request.height // self.spatial_factor, request.width // self.spatial_factor)

    def layer_split(self) -> LayerSplit:
        config = self.transformer_config
        double = (f"transformer_blocks.{layer}" for layer in range(config["num_layers"]))
        single = (f"single_transformer_blocks.{layer}" for layer in range(config["num_single_layers"]))
        return LayerSplit(
            front=("x_embedder", "context_embedder", "time_text_embed"),
            layers=(*double, *single),
            back=("norm_out", "proj_out"),
        )
