"""How a long video holds together: changes across the joints of its blocks, leaps and wandering of the shape, and where
the windows lie in which its content is judged. Arithmetic on frames and positions; knows no model and no settings.

A latent frame is decoded to four frames, the first one of a video to one. A latent frame that begins a block (but the
first block) is called a joint. Shape legend: F frames, L latent frames.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from training import world

FRAMES_OF_LATENT = 4
WINDOW, STRIDE = 8, 4  # latent frames of a window, and from one to the next: half of them overlap
LEAP = 6.0  # pixels
_FAINT = 0.05  # levels: what keeps the ratio of two frozen stretches at 1

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Frames = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def num_frames(latents: int) -> int:
    return FRAMES_OF_LATENT * (latents - 1) + 1


def frames_of(first: int, stop: int) -> slice:
    """The frames that latent frames `first` to `stop` - 1 are decoded to."""
    return slice(num_frames(first) if first else 0, num_frames(stop))


def windows(latents: int) -> tuple[tuple[int, int], ...]:
    """First latent frame and the one after the last of each window that fits."""
    return tuple((first, first + WINDOW) for first in range(0, latents - WINDOW + 1, STRIDE))


def quarter_of(window: tuple[int, int], latents: int) -> int | None:
    """0 for a window in the first quarter of the video, 3 for one in the last, None for one in neither."""
    if window[1] * 4 <= latents:
        return 0
    return 3 if window[0] * 4 >= 3 * latents else None


def changes(frames: Frames) -> Floats:
    """Mean absolute difference in levels between each frame and the next, [F - 1]."""
    return np.array([np.abs(after.astype(np.int16) - before).mean() for before, after in itertools.pairwise(frames)])


def flicker(change: Floats, at: Sequence[int], joints: Sequence[int], reach: int) -> list[float]:
    """Change into each of the latent frames `at` over the usual one beside it: the median over the pairs of frames
    within `reach` latent frames on either side, without those across a joint. 1: nothing to see."""
    across = {_pair(latent) for latent in (*at, *joints)}
    ratios = []
    for latent in at:
        beside = range(max(_pair(latent - reach), 0), min(_pair(latent + reach) + 1, len(change)))
        usual = float(np.median([change[pair] for pair in beside if pair not in across]))
        ratios.append((float(change[_pair(latent)]) + _FAINT) / (usual + _FAINT))
    return ratios


def _pair(latent: int) -> int:
    """The pair of frames across the beginning of a latent frame, as an index of `changes`."""
    return num_frames(latent) - 1


def between_joints(latents: int, joints: Sequence[int]) -> list[int]:
    """The middles of all blocks that have one: latent frames like joints, where none is."""
    ends = [0, *joints, latents]
    return [(first + stop) // 2 for first, stop in itertools.pairwise(ends) if stop - first > 1]


def ways(centres: Floats) -> Floats:
    """Steps on the torus between centres [L, 2] in pixels, [L - 1, 2]."""
    half = world.SIZE / 2
    steps: Floats = (np.diff(centres, axis=0) + half) % world.SIZE - half
    return steps


def leaps(centres: Floats) -> list[int]:
    """The latent frames into which the shape moves by `LEAP` pixels more than it usually does (the median). `centres`
    [L, 2]: at the last frame of each latent frame."""
    lengths = np.linalg.norm(ways(centres), axis=1)
    return [int(latent) + 1 for latent in np.flatnonzero(lengths > np.median(lengths) + LEAP)]


def wander(centres: Floats, motion: str) -> float:
    """How far apart the shape comes to be along an axis on which it should rest, in pixels."""
    path = np.concatenate([np.zeros((1, 2)), ways(centres).cumsum(axis=0)])
    spans = path.max(axis=0) - path.min(axis=0)
    resting = {"left": [1], "right": [1], "bounce_x": [1], "up": [0], "down": [0], "bounce_y": [0]}
    return float(spans[resting.get(motion, [0, 1])].max())
