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


def temporal_tiles(num_latent_frames: int, factor: int) -> tuple[TemporalTile, ...]:
    """The tiles of a video in order. A video no longer than one tile is decoded in one piece."""
    latent = FRAMES.scaled_down(factor)
    if num_latent_frames <= latent.length:
        whole = range(num_latent_frames)
        return (TemporalTile(latents=whole, drops_first=False, num_frames=factor * (num_latent_frames - 1) + 1),)
    tiles = []
    for window in Tiling(length=latent.length + 1, stride=latent.stride).windows(num_latent_frames):
        first = window.start == 0
        fresh = factor * min(len(window) - 1, latent.stride)
        if fresh:  # a last window of one latent frame repeats what its predecessor gave
            tiles.append(TemporalTile(latents=window, drops_first=not first, num_frames=fresh + first))
    return tuple(tiles)
