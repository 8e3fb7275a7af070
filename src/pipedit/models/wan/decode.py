"""Wan's decode stage: latent frame by latent frame with the VAE's own feature cache, equal to the one-shot decode.

The cache belongs to the request, not to the module, so that several videos can be decoded in turns; each latent frame
can be decoded as soon as it is there. A group of ranks shares each picture by slabs of rows, which is exact (see
halo.py), unless it is too small for that to pay (slabs.py); time cannot be cut, because each frame needs the cache of
the one before. Spatial tiling is optional and changes pixels near the seams, as it does in diffusers; every tile keeps
its own cache through time. A group then shares the tiles, which changes nothing more.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, unpatchify

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import Precision
from pipedit.models.latent_stream import LatentStream
from pipedit.models.loading import load_module
from pipedit.models.pixels import require_finite, to_frames, to_host, to_levels
from pipedit.models.rows import RowGroup
from pipedit.models.spatial_tiles import PictureTiling, Place, decode_tiles
from pipedit.models.wan.halo import on_row_slabs
from pipedit.models.wan.layout import WanLayout
from pipedit.models.wan.slabs import num_slabs

FeatureCache = list[torch.Tensor | str | None]


WHOLE: Place = (0, 0)  # the place of a picture, or of a slab of rows, that is not cut into tiles


@dataclasses.dataclass(kw_only=True)
class WanDecodeState:
    """De-normalised latents in the VAE's precision, whole or this rank's rows, and the feature cache of each tile.
    `group`: several ranks, or None. `is_tiled`: the pictures are cut into spatial tiles. `shares`: latent rows of each
    rank, where they are cut into slabs."""

    group: RowGroup | None
    latents: LatentStream = dataclasses.field(default_factory=LatentStream)
    is_tiled: bool = False
    caches: dict[Place, FeatureCache] = dataclasses.field(default_factory=dict)
    shares: tuple[int, ...] | None = None


class WanDecodeStage:
    def __init__(self, vae: AutoencoderKLWan, device: str, *, tiling: bool) -> None:
        self.vae, self.device, self._is_tiling = vae, device, tiling
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

    @property
    def modules(self) -> Sequence[torch.nn.Module]:
        return (self.vae,)

    def begin(
        self, request: VideoRequest, latents: torch.Tensor | None = None, group: RowGroup | None = None
    ) -> WanDecodeState:
        state = WanDecodeState(group=None if group is None or group.size == 1 else group)
        if latents is not None:
            self.extend(state, latents)
            self.finish(state)
        return state

    @torch.inference_mode()
    def extend(self, state: WanDecodeState, latents: torch.Tensor) -> None:
        require_finite(latents)
        latents, group = self._denormalised(latents), state.group
        state.is_tiled = self._is_tiled(latents)
        if group is not None and not state.is_tiled:
            rows = latents.shape[3]
            state.shares = group.shares(rows, num_slabs(rows, group.size))
            latents = latents.split(state.shares, dim=3)[group.index]
        state.latents.extend(latents)

    def finish(self, state: WanDecodeState) -> None:
        state.latents.finish()

    @torch.inference_mode()
    def chunk(self, state: WanDecodeState, index: int) -> "np.ndarray[Any, np.dtype[np.uint8]] | None":
        """The frame, or the four frames, of latent frame `index`; it must follow frame `index` - 1 of the same state.
        None on ranks of a group but the first."""
        state.latents.begin_chunk(index, state.latents.num_frames)
        latents = state.latents.window(range(index, index + 1))
        state.latents.release(index + 1)
        if state.shares is not None:
            return self._decode_slabs(state, state.shares, latents, index)
        if state.is_tiled:
            video = self._decode_tiles(state, latents, index)
        else:
            video = self._decode(state, WHOLE, latents, index)
        return None if video is None else to_frames(self._unpatchified(video))

    def save(self, state: WanDecodeState) -> dict[str, Any]:
        assert state.group is None, "a rank of a group has a part only"
        return {
            "latents": state.latents.save(),
            "is_tiled": state.is_tiled,
            "caches": [{"place": list(place), "cache": list(cache)} for place, cache in state.caches.items()],
        }

    def restore(self, saved: dict[str, Any]) -> WanDecodeState:
        caches = {(each["place"][0], each["place"][1]): list(each["cache"]) for each in saved["caches"]}
        latents = LatentStream.restore(saved["latents"])
        return WanDecodeState(group=None, latents=latents, is_tiled=saved["is_tiled"], caches=caches)

    def _denormalised(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        dtype = next(self.vae.decoder.parameters()).dtype
        latents = latents.to(self.device, dtype)
        per_channel = (1, config.z_dim, 1, 1, 1)
        mean = torch.tensor(config.latents_mean).view(per_channel).to(latents)
        inverse_std = 1.0 / torch.tensor(config.latents_std).view(per_channel).to(latents)
        return latents / inverse_std + mean

    def _decode(self, state: WanDecodeState, place: Place, latents: torch.Tensor, index: int) -> torch.Tensor:
        """One latent frame of one tile; it must follow frame `index` - 1 of the same tile."""
        cache = state.caches.setdefault(place, [None] * self._num_caches)
        latents = self.vae.post_quant_conv(latents)
        video: torch.Tensor = self.vae.decoder(latents, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
        return video

    def _unpatchified(self, video: torch.Tensor) -> torch.Tensor:
        patch = self.vae.config.patch_size
        return video if patch is None else unpatchify(video, patch_size=patch)

    # -- slabs of rows, one for each rank of a group --------------------------------------------------------------

    def _decode_slabs(
        self, state: WanDecodeState, shares: Sequence[int], latents: torch.Tensor, index: int
    ) -> "np.ndarray[Any, np.dtype[np.uint8]] | None":
        """Bytes travel to rank 0, not values: turning one into the other looks at single positions too."""
        group = state.group
        assert group is not None
        if shares[group.index] == 0:
            return None  # too few latent rows for all ranks
        with on_row_slabs(self.vae.decoder, group, shares):
            video = self._decode(state, WHOLE, latents, index)
        own = to_levels(self._unpatchified(video))
        per_row = own.numel() // shares[group.index]
        slabs = group.collect(own.flatten(), [rows * per_row for rows in shares])
        if slabs is None:
            return None
        frames, _, width, colours = own.shape
        return to_host(torch.cat([slab.view(frames, -1, width, colours) for slab in slabs if len(slab)], dim=1))

    # -- spatial tiling -----------------------------------------------------------------------------------------

    @property
    def _tiling(self) -> PictureTiling:
        return PictureTiling.of(self.vae, patch=self.vae.config.patch_size or 1)

    def _is_tiled(self, latents: torch.Tensor) -> bool:
        return self._is_tiling and self._tiling.applies(latents)

    def _decode_tiles(self, state: WanDecodeState, latents: torch.Tensor, index: int) -> torch.Tensor | None:
        def decode(place: Place, window: torch.Tensor) -> torch.Tensor:
            return self._decode(state, place, window, index)

        return decode_tiles(latents, self._tiling, decode, self.vae, state.group)
