"""The decode of diffusers' own HunyuanVideo VAE, shared by ranks that all get the whole video: by its temporal tiles,
and by the spatial tiles of each where the VAE has them enabled. Bit-equal to one rank."""

from collections.abc import Callable, Iterable

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

from pipedit.models.hunyuan_video.tiles import BLENDED_FRAMES, FRAMES, TemporalTile, num_temporal_tiles, temporal_tile
from pipedit.models.rows import VideoGroup
from pipedit.models.spatial_tiles import PictureTiling, Place, blend_tiles
from pipedit.models.spread_windows import decode_windows


def decode(
    vae: AutoencoderKLHunyuanVideo,
    latents: torch.Tensor,
    group: VideoGroup,
    whole: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Latents [B, C, F, H, W] -> video [B, 3, frames, height, width] on every rank; `whole` is the VAE's own decode,
    for a video that is one tile, and for tiles of sizes that are not diffusers' defaults in time, or not multiples of
    a latent position."""
    tiling = PictureTiling.of(vae)
    is_tiled = vae.use_tiling and tiling.applies(latents)
    if (is_tiled and not PictureTiling.fits(vae)) or (vae.use_framewise_decoding and not _has_default_frames(vae)):
        return whole(latents)
    tiles = _temporal_tiles(vae, latents)
    places = tiling.windows(latents) if is_tiled else {(0, 0): (slice(None), slice(None))}
    if len(tiles) * len(places) == 1:
        return whole(latents)
    windows = [latents[:, :, tile.latents.start : tile.latents.stop, *at] for tile in tiles for at in places.values()]
    decoded = iter(decode_windows(windows, lambda window: vae.decoder(vae.post_quant_conv(window)), group))

    def picture(parts: dict[Place, torch.Tensor]) -> torch.Tensor:
        return blend_tiles(places, latents, tiling, vae, parts.pop) if is_tiled else parts[0, 0]

    videos = (picture({place: next(decoded) for place in places}) for _ in tiles)
    return _blended(vae, tiles, videos)


def _has_default_frames(vae: AutoencoderKLHunyuanVideo) -> bool:
    return (vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames) == (FRAMES.length, FRAMES.stride)


def _temporal_tiles(vae: AutoencoderKLHunyuanVideo, latents: torch.Tensor) -> list[TemporalTile]:
    frames, factor = latents.shape[2], vae.temporal_compression_ratio
    if not vae.use_framewise_decoding:
        return [TemporalTile(latents=range(frames), drops_first=False, num_frames=factor * (frames - 1) + 1)]
    return [temporal_tile(frames, factor, index) for index in range(num_temporal_tiles(frames, factor))]


def _blended(
    vae: AutoencoderKLHunyuanVideo, tiles: Iterable[TemporalTile], videos: Iterable[torch.Tensor]
) -> torch.Tensor:
    before, frames = None, []
    for tile, video in zip(tiles, videos, strict=True):
        video = video[:, :, int(tile.drops_first) :]
        if before is not None:
            video = vae.blend_t(before, video, BLENDED_FRAMES)
        frames.append(video[:, :, : tile.num_frames])
        before = video
    return torch.cat(frames, dim=2)
