"""HunyuanVideo's decode stage: one temporal tile after the other, equal to the tiled decode of the whole video.

Between tiles it keeps only the few frames that the next one is blended with, so that memory does not grow with the
video. A tile waits for the latents of its window, and for no later ones. Tiles know nothing of each other until they
are blended, so a group of N ranks decodes N of them in each round, bit-equal to one rank; a video of one tile is
decoded by the first rank alone. Spatial tiling is optional and changes pixels near the seams, as it does in diffusers;
a group then shares the spatial tiles of each temporal one, which changes nothing more.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import Precision
from pipedit.models.hunyuan_video.layout import HunyuanVideoLayout
from pipedit.models.hunyuan_video.tiles import (
    BLENDED_FRAMES,
    TemporalTile,
    first_latent,
    num_ready_rounds,
    num_temporal_tiles,
    temporal_tile,
)
from pipedit.models.latent_stream import LatentStream
from pipedit.models.loading import load_module
from pipedit.models.pixels import require_finite, to_frames, to_host, to_levels
from pipedit.models.rows import RowGroup
from pipedit.models.spatial_tiles import PictureTiling, Place, decode_tiles


@dataclasses.dataclass(kw_only=True)
class HunyuanVideoDecodeState:
    """Scaled latents in the VAE's precision, and the end of the tile before that was not given out. `group`: several
    ranks, or None. `is_tiled`: the pictures are cut into spatial tiles."""

    group: RowGroup | None
    latents: LatentStream = dataclasses.field(default_factory=LatentStream)
    is_tiled: bool = False
    overlap: torch.Tensor | None = None  # [1, 3, BLENDED_FRAMES, height, width]


class HunyuanVideoDecodeStage:
    def __init__(self, vae: AutoencoderKLHunyuanVideo, device: str, *, tiling: bool) -> None:
        self.vae, self.device, self._is_tiling = vae, device, tiling

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

    @property
    def modules(self) -> Sequence[torch.nn.Module]:
        return (self.vae,)

    def begin(
        self, request: VideoRequest, latents: torch.Tensor | None = None, group: RowGroup | None = None
    ) -> HunyuanVideoDecodeState:
        state = HunyuanVideoDecodeState(group=None if group is None or group.size == 1 else group)
        if latents is not None:
            self.extend(state, latents)
            self.finish(state)
        return state

    @torch.inference_mode()
    def extend(self, state: HunyuanVideoDecodeState, latents: torch.Tensor) -> None:
        require_finite(latents)
        dtype = next(self.vae.decoder.parameters()).dtype
        state.is_tiled = self._is_tiled(latents)
        state.latents.extend(latents.to(self.device, dtype) / self.vae.config.scaling_factor)

    def finish(self, state: HunyuanVideoDecodeState) -> None:
        state.latents.finish()

    @torch.inference_mode()
    def chunk(self, state: HunyuanVideoDecodeState, index: int) -> "np.ndarray[Any, np.dtype[np.uint8]] | None":
        """Frames of temporal tile `index`, or, in a group, of round `index`: a tile for each rank, or as many as are
        left. It must follow `index` - 1 of the same state. None on ranks of a group but the first."""
        tiles = self._begin_round(state, index)
        frames = self._decode_round(state, tiles)
        state.latents.release(first_latent(tiles.stop, self.vae.temporal_compression_ratio))
        return frames

    def save(self, state: HunyuanVideoDecodeState) -> dict[str, Any]:
        assert state.group is None, "a rank of a group has a part only"
        return {"latents": state.latents.save(), "is_tiled": state.is_tiled, "overlap": state.overlap}

    def restore(self, saved: dict[str, Any]) -> HunyuanVideoDecodeState:
        latents = LatentStream.restore(saved["latents"])
        return HunyuanVideoDecodeState(
            group=None, latents=latents, is_tiled=saved["is_tiled"], overlap=saved["overlap"]
        )

    def _begin_round(self, state: HunyuanVideoDecodeState, index: int) -> range:
        """The temporal tiles of round `index`, which must be the next one, and ready."""
        came, factor = state.latents, self.vae.temporal_compression_ratio
        decoders = 1 if state.group is None else state.group.size
        num_ready = num_ready_rounds(came.num_frames, factor, is_complete=came.is_complete, decoders=decoders)
        came.begin_chunk(index, num_ready)
        return range(index * decoders, min((index + 1) * decoders, self._num_tiles(state)))

    def _decode_round(
        self, state: HunyuanVideoDecodeState, tiles: range
    ) -> "np.ndarray[Any, np.dtype[np.uint8]] | None":
        if state.group is None:
            video = self._next_frames(state, tiles[0])
            return None if video is None else to_frames(video)
        if not state.is_tiled:
            return self._share_round(state.group, state, tiles)
        parts = [to_levels(video) for tile in tiles if (video := self._next_frames(state, tile)) is not None]
        return to_host(torch.cat(parts)) if parts else None

    def _num_tiles(self, state: HunyuanVideoDecodeState) -> int:
        """Of the latents that are there; where a tile is ready and more will come, it is not the last of these."""
        return num_temporal_tiles(state.latents.num_frames, self.vae.temporal_compression_ratio)

    def _tile(self, state: HunyuanVideoDecodeState, number: int) -> TemporalTile:
        return temporal_tile(state.latents.num_frames, self.vae.temporal_compression_ratio, number)

    def _next_frames(self, state: HunyuanVideoDecodeState, number: int) -> torch.Tensor | None:
        """What temporal tile `number` adds to the video; its spatial tiles, if it has any, are shared by the group, and
        ranks that only helped get None."""
        tile = self._tile(state, number)
        video = self._decode(state, tile)
        if video is None:
            return None
        if number > 0:
            assert state.overlap is not None
            video = self.vae.blend_t(state.overlap, video, BLENDED_FRAMES)
        state.overlap = video[:, :, tile.num_frames :].clone()  # a copy, so that the rest of the tile is freed
        return video[:, :, : tile.num_frames]

    def _decode(self, state: HunyuanVideoDecodeState, tile: TemporalTile) -> torch.Tensor | None:
        """One temporal tile, not blended yet; None on ranks that only helped."""
        window = state.latents.window(tile.latents)
        if state.is_tiled:
            video = decode_tiles(window, self._tiling, self._decode_window, self.vae, state.group)
        else:
            video = self._decode_window((0, 0), window)
        return None if video is None else video[:, :, int(tile.drops_first) :]

    def _decode_window(self, _place: Place, latents: torch.Tensor) -> torch.Tensor:
        video: torch.Tensor = self.vae.decoder(self.vae.post_quant_conv(latents))
        return video

    # -- a temporal tile for each rank of a group -----------------------------------------------------------------

    def _share_round(
        self, group: RowGroup, state: HunyuanVideoDecodeState, tiles: range
    ) -> "np.ndarray[Any, np.dtype[np.uint8]] | None":
        """Each rank decodes a tile, blends it with the end of the one before, which that one's rank sends, and brings
        it to rank 0 as bytes."""
        number = tiles.start + group.index
        if number not in tiles:
            return None  # fewer tiles are left than there are ranks
        tile = self._tile(state, number)
        video = self._decode(state, tile)
        assert video is not None
        before = self._exchange_ends(group, state, number, video)
        if before is not None:
            video = self.vae.blend_t(before, video, BLENDED_FRAMES)
        own = to_levels(video[:, :, : tile.num_frames])
        counts = [self._tile(state, other).num_frames * own[0].numel() for other in tiles]
        pieces = group.collect(own.flatten(), [*counts, *[0] * (group.size - len(tiles))])
        if pieces is None:
            return None
        return to_host(torch.cat(pieces).view(-1, *own.shape[1:]))

    def _exchange_ends(
        self, group: RowGroup, state: HunyuanVideoDecodeState, number: int, video: torch.Tensor
    ) -> torch.Tensor | None:
        """The end of the tile before tile `number`, for the end of this one. Rank 0 gets that of the last rank of this
        round, which it needs in the next one."""
        total = self._num_tiles(state)
        before = video.new_empty(*video.shape[:2], BLENDED_FRAMES, *video.shape[3:])
        end = video[:, :, self._tile(state, number).num_frames :].contiguous()
        awaited = number if group.index > 0 else number + group.size
        group.pass_on(end if number + 1 < total else None, before if awaited < total else None)
        if group.index > 0:
            return before
        earlier, state.overlap = state.overlap, before
        return earlier

    # -- spatial tiling -------------------------------------------------------------------------------------------

    @property
    def _tiling(self) -> PictureTiling:
        return PictureTiling.of(self.vae)

    def _is_tiled(self, latents: torch.Tensor) -> bool:
        return self._is_tiling and self._tiling.applies(latents)
