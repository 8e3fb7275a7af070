"""Wan's decode stage: latent frame by latent frame with the VAE's own feature cache, equal to the one-shot decode.

The cache belongs to the request, not to the module, so that several videos can be decoded in turns. Spatial tiling is
optional and changes pixels near the seams, as it does in diffusers; every tile keeps its own cache through time.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, unpatchify

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import Precision
from pipedit.models.loading import load_module
from pipedit.models.pixels import require_finite, to_frames
from pipedit.models.wan.layout import WanLayout

FeatureCache = list[torch.Tensor | str | None]


@dataclasses.dataclass(kw_only=True)
class WanDecodeState:
    """De-normalised latents [1, C, F, H, W] in the VAE's precision and the feature cache of each tile."""

    latents: torch.Tensor
    caches: dict[tuple[int, int], FeatureCache]


class WanDecodeStage:
    def __init__(self, vae: AutoencoderKLWan, device: str, *, tiling: bool) -> None:
        self.vae, self._device, self._tiling = vae, device, tiling
        self._num_caches = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())

    @classmethod
    def load(cls, layout: WanLayout, device: str, precision: Precision, *, tiling: bool) -> "WanDecodeStage":
        vae = load_module(
            lambda: AutoencoderKLWan.from_config(layout.vae_config),
            layout.checkpoint.weights("vae"),
            device=device,
            dtype=getattr(torch, precision.vae),
            prefixes=("decoder", "post_quant_conv"),
        )
        return cls(vae, device, tiling=tiling)

    @torch.inference_mode()
    def begin(self, request: VideoRequest, latents: torch.Tensor) -> WanDecodeState:
        require_finite(latents)
        config = self.vae.config
        dtype = next(self.vae.decoder.parameters()).dtype
        latents = latents.to(self._device, dtype)
        per_channel = (1, config.z_dim, 1, 1, 1)
        mean = torch.tensor(config.latents_mean).view(per_channel).to(latents)
        inverse_std = 1.0 / torch.tensor(config.latents_std).view(per_channel).to(latents)
        latents = latents / inverse_std + mean
        if not self._is_tiled(latents):
            latents = self.vae.post_quant_conv(latents)
        return WanDecodeState(latents=latents, caches={})

    @torch.inference_mode()
    def chunk(self, state: WanDecodeState, index: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        latents = state.latents[:, :, index : index + 1]
        if self._is_tiled(latents):
            video = self._decode_tiles(state, latents, index)
        else:
            video = self._decode(state, (0, 0), latents, index)
        if self.vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=self.vae.config.patch_size)
        return to_frames(video)

    def _decode(self, state: WanDecodeState, tile: tuple[int, int], latents: torch.Tensor, index: int) -> torch.Tensor:
        """One latent frame of one tile; it must follow frame `index` - 1 of the same tile."""
        cache = state.caches.setdefault(tile, [None] * self._num_caches)
        video: torch.Tensor = self.vae.decoder(latents, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
        return video

    # -- spatial tiling -----------------------------------------------------------------------------------------

    def _is_tiled(self, latents: torch.Tensor) -> bool:
        vae = self.vae
        return self._tiling and (
            latents.shape[3] > vae.tile_sample_min_height // vae.spatial_compression_ratio
            or latents.shape[4] > vae.tile_sample_min_width // vae.spatial_compression_ratio
        )

    def _decode_tiles(self, state: WanDecodeState, latents: torch.Tensor, index: int) -> torch.Tensor:
        """Overlapping tiles, blended over their overlap as `AutoencoderKLWan.tiled_decode` blends them."""
        vae, patch = self.vae, self.vae.config.patch_size or 1
        stride = vae.tile_sample_stride_height // patch, vae.tile_sample_stride_width // patch
        blend = vae.tile_sample_min_height // patch - stride[0], vae.tile_sample_min_width // patch - stride[1]
        above: list[torch.Tensor] = []
        rows = []
        for row, starts in enumerate(self._tile_starts(latents)):
            tiles: list[torch.Tensor] = []
            for column, (top, left) in enumerate(starts):
                window = self.vae.post_quant_conv(self._tile_window(latents, top, left))
                tile = self._decode(state, (row, column), window, index)
                if row > 0:
                    tile = vae.blend_v(above[column], tile, blend[0])
                if column > 0:
                    tile = vae.blend_h(tiles[column - 1], tile, blend[1])
                tiles.append(tile)
            rows.append(torch.cat([tile[..., : stride[0], : stride[1]] for tile in tiles], dim=-1))
            above = tiles
        ratio = vae.spatial_compression_ratio // patch
        height, width = latents.shape[3] * ratio, latents.shape[4] * ratio
        return torch.cat(rows, dim=-2)[..., :height, :width]

    def _tile_starts(self, latents: torch.Tensor) -> Iterator[list[tuple[int, int]]]:
        ratio = self.vae.spatial_compression_ratio
        down = self.vae.tile_sample_stride_height // ratio
        across = self.vae.tile_sample_stride_width // ratio
        for top in range(0, latents.shape[3], down):
            yield [(top, left) for left in range(0, latents.shape[4], across)]

    def _tile_window(self, latents: torch.Tensor, top: int, left: int) -> torch.Tensor:
        ratio = self.vae.spatial_compression_ratio
        height, width = self.vae.tile_sample_min_height // ratio, self.vae.tile_sample_min_width // ratio
        return latents[..., top : top + height, left : left + width]
