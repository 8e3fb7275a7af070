"""How HunyuanVideo's VAE cuts a video, with diffusers' defaults: always in time, in space only where asked for.

The normalisation inside the decoder sees a whole temporal tile, so tiles are part of the result: others give another
video. `AutoencoderKLHunyuanVideo` holds the same numbers as attributes, not in its config.
"""

import dataclasses

from pipedit.models.tiles import Tiling

FRAMES = Tiling(length=16, stride=12)  # in pixel frames
PICTURE = Tiling(length=256, stride=192)  # in pixels
BLENDED_FRAMES = FRAMES.length - FRAMES.stride


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemporalTile:
    """Latent frames `latents` are decoded together and give `num_frames` pixel frames of the video.

    Tiles but the first decode one latent frame more than they need and drop the pixel frame that it gives.
    """

    latents: range
    drops_first: bool
    num_frames: int


def num_temporal_tiles(num_latent_frames: int, factor: int) -> int:
    """How many tiles a video has. A video no longer than one tile is decoded in one piece."""
    latent = FRAMES.scaled_down(factor)
    if num_latent_frames <= latent.length:
        return 1
    # One at every stride; a last window of one latent frame would repeat what its predecessor gave.
    return (num_latent_frames - 2) // latent.stride + 1


def num_ready_rounds(num_latent_frames: int, factor: int, *, is_complete: bool, decoders: int) -> int:
    """How many rounds of `decoders` tiles can be decoded of a video of which so many latent frames have come;
    `is_complete`: no more will. Else a tile waits for its whole window, and a round for all its tiles: such a tile is
    not the video's last one, so that it is the same whatever comes."""
    if is_complete:
        return -(-num_temporal_tiles(num_latent_frames, factor) // decoders)
    latent = FRAMES.scaled_down(factor)
    return max(num_latent_frames - (latent.length + 1) + latent.stride, 0) // latent.stride // decoders


def first_latent(index: int, factor: int) -> int:
    """The first latent frame of tile `index`."""
    return index * FRAMES.scaled_down(factor).stride


def temporal_tile(num_latent_frames: int, factor: int, index: int) -> TemporalTile:
    """Tile `index` of a video, or of its beginning where the tile is ready (see `num_ready_rounds`)."""
    latent = FRAMES.scaled_down(factor)
    if num_latent_frames <= latent.length:
        whole = range(num_latent_frames)
        return TemporalTile(latents=whole, drops_first=False, num_frames=factor * (num_latent_frames - 1) + 1)
    start = first_latent(index, factor)
    window = range(start, min(start + latent.length + 1, num_latent_frames))
    fresh = factor * min(len(window) - 1, latent.stride)
    return TemporalTile(latents=window, drops_first=index > 0, num_frames=fresh + (index == 0))


def kinds_of_tile(num_latent_frames: int, factor: int) -> tuple[TemporalTile, TemporalTile, TemporalTile]:
    """The first tile, one from the middle (the first again where there is no other), and the last: no others differ."""
    count = num_temporal_tiles(num_latent_frames, factor)
    first, middle, last = (
        temporal_tile(num_latent_frames, factor, index) for index in (0, min(1, count - 1), count - 1)
    )
    return first, middle, last
