"""What a clip shows, read from its pixels alone: colour, background, shape, motion, and how clean the shape is.

Knows the world's palette and shapes, not the prompt. Positions live on the torus, as in the world.

Shape legend: F frames, H = W = world.SIZE.
"""

import dataclasses
import itertools
import math

import numpy as np
import torch

from training import world

# Areas of the unit-radius shapes, to get a first radius from the covered area.
_UNIT_AREA = {
    "circle": math.pi,
    "square": (2 * world.SQUARE_HALF_SIDE) ** 2,
    "triangle": 3 * math.sqrt(3) * world.TRIANGLE_INRADIUS**2,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """`overlap` is the mean over frames of the soft intersection over union with the best-fitting ideal shape, by
    shape; `steady` is the share of frames whose best shape is `shape`."""

    background: str
    colour: str
    shape: str
    motion: str
    overlap: dict[str, float]
    worst_frame: float
    steady: float
    centre: tuple[float, float]  # x and y in the first frame


def measure(frames: np.ndarray) -> Measurement:
    """Measures one clip with one object, uint8 [F, H, W, 3]."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).float()
    border = torch.cat([pixels[:, :2].flatten(0, 2), pixels[:, -2:].flatten(0, 2), pixels[:, :, :2].flatten(0, 2)])
    ground = border.median(0).values
    distance = (pixels - ground).norm(dim=-1)
    strong = distance > max(0.6 * float(distance.max()), 40.0)
    ink = pixels[strong].median(0).values if bool(strong.any()) else ground
    return _describe(cover_of(pixels, ground, ink), nearest(world.BACKGROUNDS, ground), nearest(world.COLOURS, ink))


def _describe(cover: torch.Tensor, background: str, colour: str) -> Measurement:
    fits = {shape: fit(cover, shape) for shape in world.SHAPES}
    scores = torch.stack([fits[shape].overlap for shape in world.SHAPES])  # [shapes, F]
    best = int(scores.mean(1).argmax())
    shape = world.SHAPES[best]
    return Measurement(
        background=background,
        colour=colour,
        shape=shape,
        motion=motion_of(fits[shape]),
        overlap={name: float(fits[name].overlap.mean()) for name in world.SHAPES},
        worst_frame=float(scores[best].min()),
        steady=float((scores.argmax(0) == best).float().mean()),
        centre=(float(fits[shape].x[0]), float(fits[shape].y[0])),
    )


def cover_of(pixels: torch.Tensor, ground: torch.Tensor, ink: torch.Tensor) -> torch.Tensor:
    """Share of ink in each pixel, [F, H, W] in [0, 1]; colours off the line between ground and ink count as missing
    (where there should be ink) or as surplus (where there should be none). A pixel within a tenth of ground or ink is
    that: a faint tint of the whole picture is no matter of shape."""
    line = ink - ground
    share = ((pixels - ground) @ line / line.square().sum().clamp(min=1.0)).clamp(0, 1)
    off = (pixels - ground - share[..., None] * line).norm(dim=-1) / 255
    blamed = torch.where(share > 0.5, share - off, share + off)
    return ((blamed - 0.1) / 0.8).clamp(0, 1)


def nearest(palette: dict[str, tuple[int, int, int]], colour: torch.Tensor, limit: float = 60.0) -> str:
    """Name of the nearest palette colour, "none" if even that is farther than `limit` levels."""
    names = list(palette)
    distances = (torch.tensor([palette[name] for name in names]).float() - colour).norm(dim=-1)
    return names[int(distances.argmin())] if float(distances.min()) < limit else "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """The ideal shape that fits best in each frame: centre and radius in pixels, overlap in [0, 1]; all [F]."""

    x: torch.Tensor
    y: torch.Tensor
    radius: torch.Tensor
    overlap: torch.Tensor


def fit(cover: torch.Tensor, shape: str) -> Fit:
    """Fits position and radius frame by frame: centre of mass and area first, then a coarse-to-fine search."""
    area = cover.sum((1, 2))
    best = torch.stack([_centre(cover.sum(1)), _centre(cover.sum(2)), (area / _UNIT_AREA[shape]).clamp(min=1).sqrt()])
    overlap = _overlap(cover, shape, best)
    for step in (2.0, 1.0, 0.5, 0.25):
        start = best.clone()
        for offset in itertools.product((-step, 0.0, step), repeat=3):
            candidate = start + torch.tensor(offset)[:, None]
            score = _overlap(cover, shape, candidate)
            better = score > overlap
            best, overlap = torch.where(better, candidate, best), torch.where(better, score, overlap)
    return Fit(x=best[0], y=best[1], radius=best[2], overlap=overlap)


def _overlap(cover: torch.Tensor, shape: str, pose: torch.Tensor) -> torch.Tensor:
    ideal = world.coverage(shape, pose[0], pose[1], pose[2].clamp(0.5, 24.0))
    return torch.minimum(cover, ideal).sum((1, 2)) / torch.maximum(cover, ideal).sum((1, 2)).clamp(min=1e-6)


def _centre(profile: torch.Tensor) -> torch.Tensor:
    """Circular mean position of a profile [F, SIZE] on the torus."""
    angle = (torch.arange(world.SIZE) + 0.5) * (2 * math.pi / world.SIZE)
    mean = torch.atan2((profile * angle.sin()).sum(1), (profile * angle.cos()).sum(1))
    return (mean % (2 * math.pi)) * (world.SIZE / (2 * math.pi))


def motion_of(fit_: Fit) -> str:
    """One of world.MOTIONS, or "unclear"."""
    frames = len(fit_.x)
    growth = float(fit_.radius[-3:].mean() - fit_.radius[:3].mean()) / max(frames - 3, 1)
    if abs(growth) > 0.09:
        return "grow" if growth > 0 else "shrink"
    ways = torch.stack([_unwrapped(fit_.x), _unwrapped(fit_.y)])  # [2, F]
    spans = ways.amax(1) - ways.amin(1)
    if float(spans.max()) < 3.0:
        return "still"
    axis = int(spans.argmax())
    if float(spans[1 - axis]) > 0.4 * float(spans[axis]):
        return "unclear"
    net = float(ways[axis, -1] - ways[axis, 0])
    if abs(net) > 0.85 * float(spans[axis]) and abs(net) / (frames - 1) > 0.5:
        return (("left", "right"), ("up", "down"))[axis][net > 0]
    if float(spans[axis]) < 25.0 and _turns(ways[axis]) >= 1:
        return ("bounce_x", "bounce_y")[axis]
    return "unclear"


def _unwrapped(position: torch.Tensor) -> torch.Tensor:
    steps = (position.diff() + world.SIZE / 2) % world.SIZE - world.SIZE / 2
    return torch.cat([torch.zeros(1), steps.cumsum(0)])


def _turns(way: torch.Tensor, least: float = 2.0) -> int:
    """How often the way turns back by more than `least` pixels."""
    turns, direction, extreme = 0, 0, float(way[0])
    for value in way.tolist():
        if (direction >= 0 and value > extreme) or (direction <= 0 and value < extreme):
            direction = direction or (1 if value > float(way[0]) else -1)
            extreme = value
        elif abs(value - extreme) > least:
            turns, direction, extreme = turns + 1, -direction or 1, value
    return turns


def measure_pair(frames: np.ndarray, colours: tuple[str, str], background: str) -> tuple[Measurement, Measurement]:
    """The two objects of the asked colours, each measured on the pixels nearest to its colour."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).float()
    ground = torch.tensor(world.BACKGROUNDS[background]).float()
    inks = [torch.tensor(world.COLOURS[colour]).float() for colour in colours]
    covers = [cover_of(pixels, ground, ink) for ink in inks]
    nearest_ink = torch.stack([(pixels - ink).norm(dim=-1) for ink in inks]).argmin(0)
    own = [torch.where(nearest_ink == number, cover, 0.0) for number, cover in enumerate(covers)]
    first, second = (_describe(cover, background, c) for cover, c in zip(own, colours, strict=True))
    return first, second


def relation_of(first: Measurement, second: Measurement) -> str:
    """Where the first object is relative to the second: "above", "left of", or "other"."""
    apart = [b - a for a, b in zip(first.centre, second.centre, strict=True)]
    across, along = (min(abs(d), world.SIZE - abs(d)) for d in apart)  # on the torus
    # Objects stay in their lanes, which do not wrap, so that the sign can be read off as it is.
    if along > max(across, 15.0):
        return "above" if apart[1] > 0 else "other"
    return "left of" if across > max(along, 15.0) and apart[0] > 0 else "other"
