"""The synthetic world: one or two plain shapes on a plain background, what they do, and how people say it.

Owns scenes, their exact pixels and their captions. Knows nothing of models. Every clip can be drawn at any length,
because motion is a closed formula of the frame number (moving shapes wrap round the torus of the picture).

Shape legend: B clips, O objects (1 or 2), F frames, H = W = SIZE pixels.
"""

import dataclasses
import math
import random

import torch

SIZE = 64
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (228, 38, 38),
    "orange": (246, 140, 24),
    "yellow": (246, 226, 48),
    "green": (44, 180, 68),
    "cyan": (44, 214, 226),
    "blue": (62, 108, 250),
    "purple": (152, 58, 222),
    "pink": (252, 134, 196),
}
BACKGROUNDS = {
    "black": (10, 10, 14),
    "gray": (112, 112, 116),
    "navy": (18, 26, 84),
    "maroon": (84, 16, 32),
    "white": (240, 240, 240),
}
MOTIONS = ("left", "right", "up", "down", "still", "grow", "shrink", "bounce_x", "bounce_y")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
RELATIONS = ("above", "left of")  # first object relative to the second

NOUNS = {"circle": ("circle", "ball", "disc"), "square": ("square", "box", "block"), "triangle": ("triangle",)}
PHRASES = {
    "left": ("moves left", "moving left", "moves to the left", "slides left", "goes left", "drifts to the left"),
    "right": ("moves right", "moving right", "moves to the right", "slides right", "goes right", "drifts to the right"),
    "up": ("moves up", "moving up", "rises", "goes up", "moves upward", "drifts upward"),
    "down": ("moves down", "moving down", "falls", "goes down", "moves downward", "drifts downward"),
    "still": ("stands still", "stays still", "does not move", "rests in place", "standing still"),
    "grow": ("grows", "growing", "grows larger", "gets bigger", "is growing"),
    "shrink": ("shrinks", "shrinking", "gets smaller", "shrinks away", "is shrinking"),
    "bounce_x": (
        "bounces left and right",
        "bouncing left and right",
        "bounces from side to side",
        "bounces sideways",
    ),
    "bounce_y": ("bounces up and down", "bouncing up and down", "bounces", "bouncing"),
}
PLURAL_PHRASES = {
    "left": ("moving left", "both move left", "sliding left"),
    "right": ("moving right", "both move right", "sliding right"),
    "up": ("moving up", "both move up", "rising"),
    "down": ("moving down", "both move down", "falling"),
    "still": ("standing still", "both stay still", "not moving"),
}
# Sizes are radii of the circle; the other shapes are drawn with about its area.
SQUARE_HALF_SIDE = 0.89
TRIANGLE_INRADIUS = 0.66
REACH = {"circle": 1.0, "square": SQUARE_HALF_SIDE, "triangle": 2 * TRIANGLE_INRADIUS}  # farthest point, in radii


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thing:
    """One shape and its way of moving. Positions and radii in pixels, speeds in pixels per frame."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    velocity: tuple[float, float] = (0.0, 0.0)
    growth: float = 0.0
    swing: tuple[float, float] = (0.0, 0.0)  # peak-to-peak way along x and y
    swing_frames: float = 1.0  # frames from one turning point to the next
    swing_phase: float = 0.0  # in units of swing_frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    things: tuple[Thing, ...]
    motion: str
    background: str
    relation: str | None = None


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    """A quarter of all combinations never appears in training; every single word still does."""
    return (SHAPES.index(shape) + list(COLOURS).index(colour) + MOTIONS.index(motion)) % 4 == 0


def combinations(*, held_out: bool) -> list[tuple[str, str, str]]:
    return [(s, c, m) for s in SHAPES for c in COLOURS for m in MOTIONS if is_held_out(s, c, m) == held_out]


def sample_scene(rng: random.Random, *, two_shapes: float = 0.12) -> Scene:
    """A random training scene; `two_shapes` is the share of scenes with two objects."""
    if rng.random() < two_shapes:
        return _sample_pair(rng)
    shape, colour, motion = rng.choice(combinations(held_out=False))
    thing = sample_thing(rng, shape=shape, colour=colour, motion=motion)
    return Scene(things=(thing,), motion=motion, background=_sample_background(rng))


def _sample_background(rng: random.Random) -> str:
    return rng.choices(list(BACKGROUNDS), weights=(4, 2, 2, 2, 2))[0]


def sample_thing(rng: random.Random, *, shape: str, colour: str, motion: str) -> Thing:
    """A shape with a random place, size and speed for its motion."""
    radius = rng.uniform(8.5, 12.5)
    reach = radius * REACH[shape] + 1
    x, y = (rng.uniform(reach, SIZE - reach) for _ in range(2))
    if motion in DIRECTIONS:
        speed = rng.uniform(1.0, 1.5)
        dx, dy = DIRECTIONS[motion]
        if rng.random() < 0.75:  # stay inside for the first second or so
            x, y = (_start_inside(rng, p, d * speed, reach) for p, d in ((x, dx), (y, dy)))
        else:
            x, y = rng.uniform(0, SIZE) if dx else x, rng.uniform(0, SIZE) if dy else y
        return Thing(shape=shape, colour=colour, x=x, y=y, radius=radius, velocity=(dx * speed, dy * speed))
    if motion in ("grow", "shrink"):
        x, y = (SIZE / 2 + rng.uniform(-4, 4) for _ in range(2))
        rate = rng.uniform(0.20, 0.32)
        small = rng.uniform(5.5, 7.5)
        if motion == "grow":
            return Thing(shape=shape, colour=colour, x=x, y=y, radius=small, growth=rate)
        return Thing(shape=shape, colour=colour, x=x, y=y, radius=small + 48 * rate, growth=-rate)
    if motion in ("bounce_x", "bounce_y"):
        way = rng.uniform(11.0, 15.0)
        swing = (way, 0.0) if motion == "bounce_x" else (0.0, way)
        x, y = (rng.uniform(reach + s / 2, SIZE - reach - s / 2) for s in swing)
        # the first turn comes between frames 2 and 6, so that nine frames show it
        frames = rng.uniform(7.0, 8.0)
        phase = rng.choice((0.0, 1.0)) + 1.0 - rng.uniform(2.0, 6.0) / frames
        return Thing(
            shape=shape, colour=colour, x=x, y=y, radius=radius, swing=swing, swing_frames=frames, swing_phase=phase
        )
    return Thing(shape=shape, colour=colour, x=x, y=y, radius=radius)


def _start_inside(rng: random.Random, position: float, velocity: float, reach: float, frames: int = 24) -> float:
    """A start from which `frames` frames at `velocity` stay inside the picture, as far as that is possible."""
    if velocity == 0:
        return position
    low, high = reach, SIZE - reach
    way = abs(velocity) * frames
    slack = max(high - low - way, 2.0)
    offset = rng.uniform(0, slack)
    return low + offset if velocity > 0 else high - offset


def _sample_pair(rng: random.Random) -> Scene:
    relation = rng.choice(RELATIONS)
    across = ("left", "right") if relation == "above" else ("up", "down")
    motion = rng.choice((*across, *across, "still"))
    colours = rng.sample(list(COLOURS), 2)
    speed = rng.uniform(1.0, 1.4) if motion != "still" else 0.0
    dx, dy = DIRECTIONS.get(motion, (0.0, 0.0))
    along = rng.uniform(14, SIZE - 14) if motion == "still" else rng.uniform(0, SIZE)
    things = []
    for colour, lane in zip(colours, (17.0, 47.0), strict=True):
        radius, lane = rng.uniform(7.5, 9.5), lane + rng.uniform(-3, 3)
        own = along + rng.uniform(-4, 4)
        x, y = (own, lane) if relation == "above" else (lane, own)
        shape = rng.choice(SHAPES)
        things.append(Thing(shape=shape, colour=colour, x=x, y=y, radius=radius, velocity=(dx * speed, dy * speed)))
    return Scene(things=tuple(things), motion=motion, background=_sample_background(rng), relation=relation)


def caption(scene: Scene, rng: random.Random) -> str:
    """One of many ways to say what the scene shows, in lower case."""
    names = [_name(thing, rng) for thing in scene.things]
    if scene.relation is None:
        text = f"{names[0]} {rng.choice(PHRASES[scene.motion])}"
    else:
        first, second = names
        relation = scene.relation
        if rng.random() < 0.3:
            first, second = second, first
            relation = {"above": "below", "left of": "right of"}[relation]
        text = f"{first} {relation} {second}, {rng.choice(PLURAL_PHRASES[scene.motion])}"
    if scene.background != "black" or rng.random() < 0.4:
        text = _with_background(text, scene.background, rng)
    return rng.choice(("", "", "", "a video of ", "a clip of ")) + text


def _name(thing: Thing, rng: random.Random) -> str:
    noun = rng.choice(NOUNS[thing.shape]) if rng.random() < 0.5 else thing.shape
    article = "an" if thing.colour[0] in "aeiou" else "a"
    return rng.choice((article,) * 4 + ("the", "one")) + f" {thing.colour} {noun}"


def _with_background(text: str, background: str, rng: random.Random) -> str:
    article = rng.choice(("a", "the"))
    return rng.choice(
        (
            f"{text} on {article} {background} background",
            f"{text} on {article} {background} background",
            f"{text} on {background}",
            f"{text}, {background} background",
            f"{text} in front of a {background} background",
            f"on a {background} background {text}",
        )
    )


def words() -> list[str]:
    """Every word a caption can hold: the tokenizer's vocabulary."""
    phrases = [p for table in (PHRASES, PLURAL_PHRASES, NOUNS) for choices in table.values() for p in choices]
    fixed = "a an the one video clip of on in front background and with above below left right both not".split()
    return sorted({w for p in phrases for w in p.split()} | set(COLOURS) | set(BACKGROUNDS) | set(fixed))


def _turning(frame: torch.Tensor, thing: Thing) -> torch.Tensor:
    """Triangle wave between -0.5 and 0.5 with a turn every `swing_frames` frames."""
    u = (frame / thing.swing_frames + thing.swing_phase) % 2.0
    return torch.where(u < 1.0, u, 2.0 - u) - 0.5


def track(thing: Thing, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centre x, centre y (unwrapped) and radius of the thing at the given frame numbers, each [F]."""
    wave = _turning(frames, thing)
    x = thing.x + thing.velocity[0] * frames + thing.swing[0] * wave
    y = thing.y + thing.velocity[1] * frames + thing.swing[1] * wave
    return x, y, thing.radius + thing.growth * frames


def coverage(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Anti-aliased share of each pixel that the shape covers, [..., H, W]; x, y, radius are [...], on the torus."""
    grid = torch.arange(SIZE, dtype=torch.float32, device=x.device) + 0.5
    dx = _wrapped(grid - x[..., None])[..., None, :]
    dy = _wrapped(grid - y[..., None])[..., :, None]
    r = radius[..., None, None]
    if shape == "circle":
        distance = torch.sqrt(dx * dx + dy * dy) - r
    elif shape == "square":
        distance = torch.maximum(dx.abs(), dy.abs()) - SQUARE_HALF_SIDE * r
    else:
        slanted = math.cos(math.pi / 6) * dx.abs() - math.sin(math.pi / 6) * dy
        distance = torch.maximum(dy.expand_as(slanted), slanted) - TRIANGLE_INRADIUS * r
    return (0.5 - distance).clamp(0.0, 1.0)


def _wrapped(distance: torch.Tensor) -> torch.Tensor:
    """The distance on the torus, between -SIZE / 2 and SIZE / 2."""
    return (distance + SIZE / 2) % SIZE - SIZE / 2


def render(scenes: list[Scene], num_frames: int, *, first_frame: int = 0) -> torch.Tensor:
    """Pixels of the scenes, [B, 3, F, H, W] in [-1, 1]."""
    frames = torch.arange(first_frame, first_frame + num_frames, dtype=torch.float32)
    clips = []
    for scene in scenes:
        clip = _rgb(BACKGROUNDS[scene.background]).expand(3, num_frames, SIZE, SIZE)
        for thing in scene.things:
            alpha = coverage(thing.shape, *track(thing, frames))
            clip = clip + alpha * (_rgb(COLOURS[thing.colour]) - clip)
        clips.append(clip)
    return torch.stack(clips)


def foreground(scenes: list[Scene], num_frames: int) -> torch.Tensor:
    """1 where a shape covers the pixel or its neighbours, [B, 1, F, H, W]."""
    frames = torch.arange(num_frames, dtype=torch.float32)
    masks = []
    for scene in scenes:
        alphas = []
        for thing in scene.things:
            x, y, radius = track(thing, frames)
            alphas.append(coverage(thing.shape, x, y, radius + 2.0))
        masks.append(torch.stack(alphas).amax(0))
    return torch.stack(masks)[:, None]


def _rgb(colour: tuple[int, int, int]) -> torch.Tensor:
    return (torch.tensor(colour, dtype=torch.float32) / 127.5 - 1.0)[:, None, None, None]
