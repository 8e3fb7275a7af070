"""The decode of diffusers' own Wan VAE, shared by ranks that all get the whole video: by slabs of rows, or by tiles
where the VAE has spatial tiling enabled."""

from collections.abc import Callable

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, unpatchify

from pipedit.models.rows import VideoGroup
from pipedit.models.spatial_tiles import PictureTiling, blend_tiles
from pipedit.models.spread_windows import decode_windows
from pipedit.models.wan.halo import on_row_slabs
from pipedit.models.wan.slabs import num_slabs


def decode(
    vae: AutoencoderKLWan,
    latents: torch.Tensor,
    group: VideoGroup,
    whole: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Latents [B, C, F, H, W] -> video [B, 3, frames, height, width] on every rank; `whole` is the VAE's own decode."""
    tiling = PictureTiling.of(vae, patch=vae.config.patch_size or 1)
    if not (vae.use_tiling and tiling.applies(latents)):
        return _decode_slabs(vae, latents, group, whole)
    if not PictureTiling.fits(vae):
        return whole(latents)
    return _decode_tiles(vae, latents, group, tiling)


def _decode_slabs(
    vae: AutoencoderKLWan,
    latents: torch.Tensor,
    group: VideoGroup,
    whole: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    rows = latents.shape[3]
    members = num_slabs(rows, group.size)
    if members == 1:  # too small for sharing to pay
        return whole(latents)
    shares = group.shares(rows, members)
    own = None
    if shares[group.index] > 0:
        with on_row_slabs(vae.decoder, group, shares):
            own = whole(latents.split(shares, dim=3)[group.index])
    return torch.cat([slab for slab in group.gather_all(own) if slab is not None], dim=3)


def _decode_tiles(
    vae: AutoencoderKLWan, latents: torch.Tensor, group: VideoGroup, tiling: PictureTiling
) -> torch.Tensor:
    """As diffusers: tiles are blended before pixels are put apart and clamped."""
    num_caches = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())

    def decode_tile(window: torch.Tensor) -> torch.Tensor:
        cache = [None] * num_caches
        frames = [
            vae.decoder(vae.post_quant_conv(frame), feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
            for index, frame in enumerate(window.split(1, dim=2))
        ]
        return torch.cat(frames, dim=2)

    places = tiling.windows(latents)
    decoded = decode_windows([latents[..., *window] for window in places.values()], decode_tile, group)
    tiles = dict(zip(places, decoded, strict=True))
    del decoded  # `pop` then frees each tile as soon as it is blended
    video = blend_tiles(places, latents, tiling, vae, tiles.pop)
    patch = vae.config.patch_size
    return (video if patch is None else unpatchify(video, patch_size=patch)).clamp(-1.0, 1.0)
