"""Operations, parameters and memory of HunyuanVideo's VAE decoder, from config values alone."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipedit.models.hunyuan_video.tiles import PICTURE
from pipedit.models.tiles import areas_of, largest_share, tile_sizes
from pipedit.plan.costs import Operations

_CHANNELS = (128, 256, 512, 512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Convolution:
    """One convolution of the decoder. `space` and `doublings` say how much larger than the latents its output is, in
    each direction of the picture and in time (n frames become 2n - 1 at each doubling)."""

    in_channels: int
    out_channels: int
    kernel: int
    space: int = 1
    doublings: int = 0

    @property
    def parameters(self) -> int:
        return self.in_channels * self.out_channels * self.kernel + self.out_channels

    def positions(self, frames: int, rows: int, columns: int) -> int:
        return _lengthened(frames, self.doublings) * rows * columns * self.space**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Level:
    """One up block: its residual blocks work at `space` and `doublings`, its last convolution after upsampling."""

    in_channels: int
    out_channels: int
    space: int
    doublings: int
    space_factor: int
    time_factor: int


def _levels(config: dict[str, Any]) -> Iterator[_Level]:
    channels = list(config.get("block_out_channels", _CHANNELS))[::-1]
    in_space = int(math.log2(config.get("spatial_compression_ratio", 8)))
    in_time = int(math.log2(config.get("temporal_compression_ratio", 4)))
    space, doublings, before = 1, 0, channels[0]
    for level, width in enumerate(channels):
        grows = level < in_space
        lengthens = len(channels) - 1 - in_time <= level < len(channels) - 1
        yield _Level(
            in_channels=before, out_channels=width, space=space, doublings=doublings,
            space_factor=1 + grows, time_factor=1 + lengthens,
        )  # fmt: skip
        before, space, doublings = width, space * (1 + grows), doublings + lengthens


def _residual_block(inputs: int, outputs: int, space: int, doublings: int) -> Iterator[_Convolution]:
    size = {"space": space, "doublings": doublings}
    yield _Convolution(in_channels=inputs, out_channels=outputs, kernel=27, **size)
    yield _Convolution(in_channels=outputs, out_channels=outputs, kernel=27, **size)
    if inputs != outputs:
        yield _Convolution(in_channels=inputs, out_channels=outputs, kernel=1, **size)


def _convolutions(config: dict[str, Any]) -> Iterator[_Convolution]:
    """Every convolution of `post_quant_conv` and the decoder, in order."""
    latent, widths = config.get("latent_channels", 16), config.get("block_out_channels", _CHANNELS)
    yield _Convolution(in_channels=latent, out_channels=latent, kernel=1)
    yield _Convolution(in_channels=latent, out_channels=widths[-1], kernel=27)
    yield from _residual_block(widths[-1], widths[-1], 1, 0)
    yield from _residual_block(widths[-1], widths[-1], 1, 0)
    space, doublings = 1, 0
    for level in _levels(config):
        width, space, doublings = level.in_channels, level.space, level.doublings
        for _ in range(config.get("layers_per_block", 2) + 1):
            yield from _residual_block(width, level.out_channels, space, doublings)
            width = level.out_channels
        if level.space_factor > 1 or level.time_factor > 1:
            space, doublings = space * level.space_factor, doublings + level.time_factor - 1
            yield _Convolution(in_channels=width, out_channels=width, kernel=27, space=space, doublings=doublings)
    yield _Convolution(
        in_channels=widths[0], out_channels=config.get("out_channels", 3), kernel=27, space=space, doublings=doublings
    )


def _attention_width(config: dict[str, Any]) -> int:
    """Channels of the mid block's attention, 0 where it has none."""
    widths = config.get("block_out_channels", _CHANNELS)
    return int(widths[-1]) if config.get("mid_block_add_attention", True) else 0


def decoder_parameters(config: dict[str, Any]) -> int:
    """Parameters of the decoder and `post_quant_conv`, all that text-to-video loads."""
    convolutions = list(_convolutions(config))
    # A group norm before every 3x3x3 convolution of a residual block and before the last convolution.
    norms = sum(2 * c.in_channels for c in convolutions if c.kernel == 27) - 2 * convolutions[1].in_channels
    norms -= sum(2 * level.out_channels for level in _levels(config) if level.space_factor * level.time_factor > 1)
    width = _attention_width(config)
    attention = 4 * (width * width + width) + 2 * width
    return sum(c.parameters for c in convolutions) + norms + attention


def decode_operations(
    config: dict[str, Any], *, frames: int, rows: int, columns: int, tiling: bool = False
) -> Operations:
    """Decoding one temporal tile of `frames` x `rows` x `columns` latents, in spatial tiles where asked for."""
    total = Operations()
    for (height, width), count in _tiles(config, rows, columns, tiling=tiling).items():
        total += _decode_whole(config, frames, height, width).times(count)
    return total


def _decode_whole(config: dict[str, Any], frames: int, rows: int, columns: int) -> Operations:
    convolution = sum(
        2 * c.in_channels * c.out_channels * c.kernel * c.positions(frames, rows, columns)
        for c in _convolutions(config)
    )
    width, tokens = _attention_width(config), frames * rows * columns
    return Operations(
        convolution=convolution, linear=2 * tokens * 4 * width * width, attention=4 * tokens * tokens * width
    )


def _tiles(config: dict[str, Any], rows: int, columns: int, *, tiling: bool) -> Counter[tuple[int, int]]:
    factor = config.get("spatial_compression_ratio", 8)
    return tile_sizes(rows, columns, PICTURE.scaled_down(factor) if tiling else None)


def decode_working_bytes(
    config: dict[str, Any],
    *,
    frames: int,
    rows: int,
    columns: int,
    element: int,
    tiling: bool = False,
    decoders: int = 1,
) -> int:
    """Peak of decoding one temporal tile: the hungriest of its spatial tiles, and the pictures put together of them. Of
    several `decoders`, the first rank's: what the others send it comes on top, and no tile gets smaller.

    Without spatial tiles either the last upsampling or the mid block's dense mask decides: the mask has one entry for
    each pair of latent positions.
    """
    tiles = _tiles(config, rows, columns, tiling=tiling)
    peak = max(_tile_working_bytes(config, frames, height, width, element) for height, width in tiles)
    doublings = int(math.log2(config.get("temporal_compression_ratio", 4)))
    space = int(config.get("spatial_compression_ratio", 8))
    values = 3 * _lengthened(frames, doublings) * rows * columns * space**2
    to_bytes = values * (2 * element + 3 * 4)
    assembled = values * 2 * element
    if tiles.total() == 1:
        arrived = 2 * decoders * values if decoders > 1 else 0  # frames of a round, as bytes, and those joined
        return max(peak, to_bytes + arrived)
    if decoders == 1:
        return max(peak + assembled, to_bytes)
    areas, position = areas_of(tiles), values // (rows * columns)
    covered = sum(area * count for area, count in areas.items()) * position
    own = largest_share(areas, decoders) * position
    kept = decoders * values + values * element // 4  # the round so far, as bytes, and what is blended with the rest
    return kept + max(peak + own * element, 2 * covered * element + assembled, to_bytes)


def _tile_working_bytes(config: dict[str, Any], frames: int, rows: int, columns: int, element: int) -> int:
    mask = (frames * rows * columns) ** 2 * max(4 + 1, 4 + element) if _attention_width(config) else 0
    return max(mask, *(_level_values(level, frames, rows, columns) * element for level in _levels(config)))


def _level_values(level: _Level, frames: int, rows: int, columns: int) -> int:
    """Values alive at the hungriest moment of an up block: in its first residual block or in its upsampling."""
    height, width = rows * level.space, columns * level.space
    length = _lengthened(frames, level.doublings)
    into, out = level.in_channels, level.out_channels
    entered = length * height * width * into  # the block's input stays alive
    residual = 2 * entered + _padded(length, height, width) * into + length * height * width * out
    up_length = (length - 1) * level.time_factor + 1
    up_height, up_width = height * level.space_factor, width * level.space_factor
    copies = 3 if length > 1 else 2  # upsampled parts, those joined, and the convolution's output
    upsampled = _padded(up_length, up_height, up_width) + copies * up_length * up_height * up_width
    return max(residual, entered + (length * height * width + upsampled) * out)


def _lengthened(frames: int, doublings: int) -> int:
    """The first frame stays one frame, every other one doubles."""
    return (frames - 1) * int(2**doublings) + 1


def _padded(length: int, height: int, width: int) -> int:
    return (length + 2) * (height + 2) * (width + 2)
