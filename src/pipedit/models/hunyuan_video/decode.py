"""HunyuanVideo's decode stage: one temporal tile after the other, equal to the tiled decode of the whole video.

Between tiles it keeps only the few frames that the next one is blended with, so that memory does not grow with the
video. Spatial tiling is optional and changes pixels near the seams, as it does in diffusers.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import Precision
from pipedit.models.hunyuan_video.layout import HunyuanVideoLayout
from pipedit.models.hunyuan_video.tiles import BLENDED_FRAMES, temporal_tile
from pipedit.models.loading import load_module
from pipedit.models.pixels import require_finite, to_frames


@dataclasses.dataclass(kw_only=True)
class HunyuanVideoDecodeState:
    """Scaled latents [1, C, F, H, W] in the VAE's precision, and the end of the tile before that was not given out."""

    latents: torch.Tensor
    overlap: torch.Tensor | None = None  # [1, 3, BLENDED_FRAMES, height, width]


class HunyuanVideoDecodeStage:
    def __init__(self, vae: AutoencoderKLHunyuanVideo, device: str, *, tiling: bool) -> None:
        self.vae, self._device = vae, device
        vae.use_framewise_decoding = False  # tiles in time are cut here, one at a time
        if tiling:
            vae.enable_tiling()

    @classmethod
    def load(
        cls, layout: HunyuanVideoLayout, device: str, precision: Precision, *, tiling: bool
    ) -> "HunyuanVideoDecodeStage":
        vae = load_module(
            lambda: AutoencoderKLHunyuanVideo.from_config(layout.vae_config),
            layout.checkpoint.weights("vae"),
            device=device,
            dtype=getattr(torch, precision.vae),
            prefixes=("decoder", "post_quant_conv"),
        )
        return cls(vae, device, tiling=tiling)

    @torch.inference_mode()
    def begin(self, request: VideoRequest, latents: torch.Tensor) -> HunyuanVideoDecodeState:
        require_finite(latents)
        dtype = next(self.vae.decoder.parameters()).dtype
        return HunyuanVideoDecodeState(latents=latents.to(self._device, dtype) / self.vae.config.scaling_factor)

    @torch.inference_mode()
    def chunk(self, state: HunyuanVideoDecodeState, index: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """Frames of temporal tile `index`; it must follow tile `index` - 1 of the same state."""
        tile = temporal_tile(state.latents.shape[2], self.vae.temporal_compression_ratio, index)
        window = state.latents[:, :, tile.latents.start : tile.latents.stop]
        video: torch.Tensor = self.vae.decode(window, return_dict=False)[0][:, :, int(tile.drops_first) :]
        if index > 0:
            assert state.overlap is not None, "tiles come in order"
            video = self.vae.blend_t(state.overlap, video, BLENDED_FRAMES)
        state.overlap = video[:, :, tile.num_frames :].clone()  # a copy, so that the rest of the tile is freed
        return to_frames(video[:, :, : tile.num_frames])
