"""Decodes a picture in overlapping tiles, blended over their overlap as diffusers' VAEs blend them; alone, or with the
tiles dealt out over a group of ranks. Knows a VAE by its tile sizes and blending methods only.

Tiling saves memory and changes pixels near the seams, because a tile does not see its neighbours and its normalisation
and attention see only itself. Sharing tiles among ranks changes nothing more: it is bit-equal to one rank that tiles.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from pipedit.models.rows import RowGroup
from pipedit.models.tiles import Tiling, deal

Place = tuple[int, int]  # number of the tile from the top, and from the left
TileDecoder = Callable[[Place, torch.Tensor], torch.Tensor]


class TilingVae(Protocol):
    """What diffusers' VAEs offer: sizes of tiles in pixels, and methods that blend the end of `a` into the beginning of
    `b`, in place."""

    spatial_compression_ratio: int
    tile_sample_min_height: int
    tile_sample_min_width: int
    tile_sample_stride_height: int
    tile_sample_stride_width: int

    def blend_v(self, a: torch.Tensor, b: torch.Tensor, blend_extent: int) -> torch.Tensor: ...

    def blend_h(self, a: torch.Tensor, b: torch.Tensor, blend_extent: int) -> torch.Tensor: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureTiling:
    """Windows down and across in latent positions; `scale`: pixels that the decoder makes of one."""

    down: Tiling
    across: Tiling
    scale: int

    @classmethod
    def of(cls, vae: TilingVae, *, patch: int = 1) -> "PictureTiling":
        """`patch`: pixels in each direction that are put apart only after the tiles are put together."""
        ratio = vae.spatial_compression_ratio
        return cls(
            down=Tiling(length=vae.tile_sample_min_height // ratio, stride=vae.tile_sample_stride_height // ratio),
            across=Tiling(length=vae.tile_sample_min_width // ratio, stride=vae.tile_sample_stride_width // ratio),
            scale=ratio // patch,
        )

    @staticmethod
    def fits(vae: TilingVae) -> bool:
        """Whether the VAE's tiles begin and end between two latent positions. Sizes of the user's own may not, and
        diffusers then blends and crops in another way."""
        sizes = (vae.tile_sample_min_height, vae.tile_sample_min_width)
        strides = (vae.tile_sample_stride_height, vae.tile_sample_stride_width)
        return all(pixels % vae.spatial_compression_ratio == 0 for pixels in (*sizes, *strides))

    def applies(self, latents: torch.Tensor) -> bool:
        """Whether the picture [..., H, W] is larger than one tile."""
        return latents.shape[-2] > self.down.length or latents.shape[-1] > self.across.length

    def windows(self, latents: torch.Tensor) -> dict[Place, tuple[slice, slice]]:
        """Row by row, from left to right."""
        down, across = self.down.windows(latents.shape[-2]), self.across.windows(latents.shape[-1])
        return {(row, column): (h, w) for row, h in enumerate(down) for column, w in enumerate(across)}


def decode_tiles(
    latents: torch.Tensor, tiling: PictureTiling, decode: TileDecoder, vae: TilingVae, group: RowGroup | None = None
) -> torch.Tensor | None:
    """Latents [1, C, F, H, W] -> video [1, channels, frames, H * scale, W * scale]; with a group all its ranks call
    this and have the latents, and only rank 0 gets the video. `decode` takes one tile; that of a given place is always
    decoded by the same rank."""
    windows = tiling.windows(latents)
    if group is None:
        return blend_tiles(windows, latents, tiling, vae, lambda at: decode(at, latents[..., *windows[at]]))
    tiles = _shared(latents, tiling, decode, group)
    return None if tiles is None else blend_tiles(windows, latents, tiling, vae, tiles.pop)


def blend_tiles(
    windows: dict[Place, tuple[slice, slice]],
    latents: torch.Tensor,
    tiling: PictureTiling,
    vae: TilingVae,
    tile_at: Callable[[Place], torch.Tensor],
) -> torch.Tensor:
    """The video of `latents` from its decoded tiles, which are changed. Asks for one after the other and keeps the row
    above, no more."""
    stride = tiling.down.stride * tiling.scale, tiling.across.stride * tiling.scale
    blend = tiling.down.length * tiling.scale - stride[0], tiling.across.length * tiling.scale - stride[1]
    last_row, last_column = list(windows)[-1]
    above: list[torch.Tensor] = []
    rows = []
    for row in range(last_row + 1):
        tiles: list[torch.Tensor] = []
        for column in range(last_column + 1):
            tile = tile_at((row, column))
            if row > 0:
                tile = vae.blend_v(above[column], tile, blend[0])
            if column > 0:
                tile = vae.blend_h(tiles[column - 1], tile, blend[1])
            tiles.append(tile)
        rows.append(torch.cat([tile[..., : stride[0], : stride[1]] for tile in tiles], dim=-1))
        above = tiles
    height, width = latents.shape[-2] * tiling.scale, latents.shape[-1] * tiling.scale
    return torch.cat(rows, dim=-2)[..., :height, :width]


def _shared(
    latents: torch.Tensor, tiling: PictureTiling, decode: TileDecoder, group: RowGroup
) -> dict[Place, torch.Tensor] | None:
    """All tiles on rank 0, each decoded by its owner; None on the others."""
    windows = tiling.windows(latents)
    sizes = {at: latents[0, 0, 0, *window].shape for at, window in windows.items()}
    owners = dict(zip(windows, deal([size.numel() for size in sizes.values()], group.size), strict=True))
    own = [decode(at, latents[..., *windows[at]]) for at, owner in owners.items() if owner == group.index]
    if not own:
        return None  # more ranks than tiles
    depth = own[0].shape[:3]
    shapes: list[dict[Place, Sequence[int]]] = [{} for _ in range(group.size)]
    for at, (height, width) in sizes.items():
        shapes[owners[at]][at] = (*depth, height * tiling.scale, width * tiling.scale)
    counts = [sum(torch.Size(shape).numel() for shape in mine.values()) for mine in shapes]
    pieces = group.collect(torch.cat([tile.flatten() for tile in own]), counts)
    if pieces is None:
        return None
    return {at: tile for piece, mine in zip(pieces, shapes, strict=True) for at, tile in _unpacked(piece, mine).items()}


def _unpacked(piece: torch.Tensor, shapes: dict[Place, Sequence[int]]) -> dict[Place, torch.Tensor]:
    parts = piece.split([torch.Size(shape).numel() for shape in shapes.values()])
    return {at: part.view(*shape) for (at, shape), part in zip(shapes.items(), parts, strict=True)}
