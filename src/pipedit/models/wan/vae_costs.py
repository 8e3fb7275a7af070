"""Operations, parameters and memory of Wan's VAE decoder, from config values alone. One latent frame at a time."""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipedit.models.tiles import Tiling, areas_of, largest_share, tile_sizes
from pipedit.models.wan.slabs import num_slabs
from pipedit.plan.costs import Operations

# Spatial tiles in pixels: defaults of `AutoencoderKLWan`, which holds them as attributes, not in its config.
PICTURE = Tiling(length=256, stride=192)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Convolution:
    """One convolution of the decoder. `space` and `time` are the scale of its output against the latents; `cached` is
    how many input frames it keeps between chunks; `later_only`: it does not run in the first chunk; `entered` is the
    width of the block that it is in, for convolutions of residual blocks."""

    in_channels: int
    out_channels: int
    kernel: int
    space: int
    time: int
    cached: int = 0
    later_only: bool = False
    entered: int = 0


def _residual_block(in_dim: int, out_dim: int, space: int, time: int, entered: int) -> Iterator[_Convolution]:
    make = functools.partial(_Convolution, out_channels=out_dim, space=space, time=time)
    yield make(in_channels=in_dim, kernel=27, cached=2, entered=entered)
    yield make(in_channels=out_dim, kernel=27, cached=2, entered=entered)
    if in_dim != out_dim:
        yield make(in_channels=in_dim, kernel=1)


def _upsampling(config: dict[str, Any], level: int, width: int, space: int, time: int) -> Iterator[_Convolution]:
    """The convolutions after the residual blocks of a level that is not the last."""
    if _doubles_time(config, level):
        # sees the frames before doubling and makes twice the channels
        yield _Convolution(
            in_channels=width, out_channels=2 * width, kernel=3, space=space, time=time, cached=2, later_only=True
        )
        time *= 2
    narrow = width if config.get("is_residual", False) else width // 2
    yield _Convolution(in_channels=width, out_channels=narrow, kernel=9, space=2 * space, time=time)


def _doubles_time(config: dict[str, Any], level: int) -> bool:
    return bool(list(config["temperal_downsample"])[::-1][level])


def _widths(config: dict[str, Any]) -> list[int]:
    base, mult = config.get("decoder_base_dim") or config["base_dim"], list(config["dim_mult"])
    return [base * m for m in [mult[-1], *mult[::-1]]]


def _convolutions(config: dict[str, Any]) -> Iterator[_Convolution]:
    """Every convolution of `AutoencoderKLWan.decoder` in order, the mid block's 1x1 projections included."""
    widths, residual = _widths(config), config.get("is_residual", False)
    mid, space, time = widths[0], 1, 1
    yield _Convolution(in_channels=config["z_dim"], out_channels=mid, kernel=27, space=1, time=1, cached=2)
    yield from _residual_block(mid, mid, 1, 1, mid)
    yield _Convolution(in_channels=mid, out_channels=4 * mid, kernel=1, space=1, time=1)
    yield from _residual_block(mid, mid, 1, 1, mid)
    for level, (in_dim, out_dim) in enumerate(itertools.pairwise(widths)):
        entered = current = in_dim // 2 if level > 0 and not residual else in_dim
        for _ in range(config["num_res_blocks"] + 1):
            yield from _residual_block(current, out_dim, space, time, entered * (1 + residual))
            current = out_dim
        if level < len(widths) - 2:
            yield from _upsampling(config, level, out_dim, space, time)
            space, time = 2 * space, time * (1 + _doubles_time(config, level))
    yield _Convolution(
        in_channels=widths[-1], out_channels=config.get("out_channels", 3), kernel=27, space=space, time=time, cached=2
    )


def decoder_parameters(config: dict[str, Any]) -> int:
    """Parameters of the decoder and `post_quant_conv`, all that text-to-video loads."""
    latent, mid = config["z_dim"], _widths(config)[0]
    convolutions = list(_convolutions(config))
    total = latent**2 + latent + sum(c.in_channels * c.out_channels * c.kernel + c.out_channels for c in convolutions)
    # One norm before every 3x3x3 convolution but the first, and one in the mid block's attention.
    return int(total + sum(c.in_channels for c in convolutions if c.kernel == 27) - latent + mid)


def decode_operations(
    config: dict[str, Any], *, rows: int, columns: int, first: bool, tiling: bool = False
) -> Operations:
    """Decoding one latent frame of `rows` x `columns` positions; the first frame gives one frame, later ones four."""
    total = Operations()
    for (height, width), count in _tiles(config, rows, columns, tiling=tiling).items():
        total += _decode_whole(config, height * width, first=first).times(count)
    return total


def _decode_whole(config: dict[str, Any], positions: int, *, first: bool) -> Operations:
    convolution = 2 * positions * config["z_dim"] ** 2  # post_quant_conv
    for c in _convolutions(config):
        if not (first and c.later_only):
            frames = 1 if first else c.time
            convolution += 2 * c.in_channels * c.out_channels * c.kernel * positions * c.space**2 * frames
    return Operations(convolution=convolution, attention=4 * positions**2 * _widths(config)[0])


def _tiles(config: dict[str, Any], rows: int, columns: int, *, tiling: bool) -> Counter[tuple[int, int]]:
    factor = config.get("scale_factor_spatial", 8)
    return tile_sizes(rows, columns, PICTURE.scaled_down(factor) if tiling else None)


def decode_working_bytes(
    config: dict[str, Any], *, rows: int, columns: int, element: int, tiling: bool = False, decoders: int = 1
) -> int:
    """Peak of decoding one latent frame: the caches of all tiles (they live from frame to frame), the hungriest
    convolution of one tile, and the pictures put together of the tiles. Of several `decoders`, the first rank's."""
    tiles = _tiles(config, rows, columns, tiling=tiling)
    frames, space = int(2 ** sum(config["temperal_downsample"])), int(config.get("scale_factor_spatial", 8))
    position = 3 * frames * space**2  # values of the video for one latent position
    cached = sum(c.cached * c.in_channels * c.space**2 for c in _convolutions(config)) * element
    areas = areas_of(tiles)
    whole, covered, largest = rows * columns, sum(area * count for area, count in areas.items()), max(areas)
    if tiles.total() == 1:
        slabs = num_slabs(rows, decoders)
        slab = -(-rows // slabs)
        peak = _hungriest(config, element, slab if slabs > 1 else None)
        bytes_out = 2 * whole * position if slabs > 1 else 0  # slabs of bytes, and the frames put together of them
        largest = slab * columns
        return largest * (cached + max(peak, position * (2 * element + 3 * 4))) + bytes_out
    peak, assembled = largest * _hungriest(config, element, None), whole * position * 2 * element
    if decoders == 1:
        return covered * cached + max(peak + assembled, whole * position * (2 * element + 3 * 4))
    own, arrived = largest_share(areas, decoders), covered * position * element
    return own * cached + max(peak + own * position * element, 2 * arrived + assembled)


def _hungriest(config: dict[str, Any], element: int, slab: int | None) -> int:
    return max(_residual_bytes(c, element, slab) for c in _convolutions(config) if c.entered)


def _residual_bytes(c: _Convolution, element: int, slab: int | None) -> int:
    """Bytes for one latent position at the hungriest moment around a convolution of a residual block: its input joined
    with the cached frames and padded; or, in half precision, its input's norm in float32. On a `slab` of so many latent
    rows, input and cache are there once more, with the neighbours' rows."""
    edges = 1.0 if slab is None else 1 + 2 / (slab * c.space)
    stream = c.time * (c.entered + c.out_channels * edges) * element
    copies = (2 if slab is None else 3) * 1.02 * edges
    joining = (c.time + c.cached) * (copies + 1) * c.in_channels * element
    norming = c.time * c.in_channels * (element + (2 * 4 if element < 4 else 0))
    return int(c.space**2 * (stream + max(joining, norming)))
