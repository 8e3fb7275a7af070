"""Judges long videos of the embedded model, made block by block: python -m training.long_videos [-o FILE] [--videos 7].

Every configuration makes the same videos (prompts, seeds, length). Clips are kept in a folder and figures in FILE as
they come, so that a run can be stopped and goes on where it was; --minutes stops it by itself.
"""

import argparse
import dataclasses
import fnmatch
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pipedit
from pipedit.bench.environment import environment
from pipedit.core.blocks import BlockPlan, Prefix
from training import continuity, evaluate, measure, world

Frames = continuity.Frames

# Longer than a model was trained for, growing and shrinking have no meaning.
MOTIONS = ("right", "still", "bounce_y", "up", "left", "bounce_x", "down")
FIRST_SEED = 2_000_000
TRAINED_LATENTS = 13
CHECKS = ("colour", "background", "shape", "motion")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to make the videos. `block_size` None: in one piece; without `engine` and `block_size` a real clip."""

    name: str
    block_size: int | None = None
    context: int = 0
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    request: dict[str, Any] = dataclasses.field(default_factory=dict)
    latents: int | None = None  # None: as long as the others

    @property
    def is_real(self) -> bool:
        return self.block_size is None and not self.engine

    def joints(self, latents: int) -> list[int]:
        """The first latent frame of each block but the first."""
        if self.block_size is None:
            return []
        compat = bool(self.engine.get("dualparal_compat"))
        plan = BlockPlan(
            latents=latents,
            block_latents=self.block_size,
            context_latents=self.context,
            num_steps=1,
            prefix=Prefix(self.engine["prefix"]),
            compat=compat,
        )
        firsts = (plan.first_latent(block) for block in range(1, plan.num_blocks or 0))
        return [first for first in firsts if first < latents]


def blocks(prefix: str, block_size: int, context: int, *, name: str = "", **more: Any) -> Configuration:
    request = more.pop("request", {})
    engine = {"strategy": "dualparal", "prefix": prefix, "block_size": block_size, "context": context, **more}
    title = " ".join([f"{prefix} {block_size}/{context}", *([name] if name else [])])
    return Configuration(name=title, block_size=block_size, context=context, engine=engine, request=request)


def configurations() -> tuple[Configuration, ...]:
    """In the order of the table."""
    whole = {"strategy": "colocated"}
    return (
        Configuration(name="real clips"),
        Configuration(name="one piece, as trained", engine=whole, latents=TRAINED_LATENTS),
        Configuration(name="one piece, untrained length", engine=whole),
        *(blocks("cache", 8, context) for context in (0, 1, 2, 3, 4, 5, 6, 7, 8)),
        *(blocks("rerun", 8, context) for context in (0, 2, 4, 6, 8)),
        blocks("rerun", 8, 8, name="compat", dualparal_compat=True),
        blocks("cache", 4, 2),
        blocks("cache", 4, 4),
        blocks("rerun", 4, 4),
        blocks("cache", 12, 6),
        blocks("rerun", 12, 6),
        blocks("cache", 8, 4, name="int8", context_storage="int8"),
        blocks("cache", 8, 4, name="guidance 1", request={"guidance_scale": 1.0}),
        blocks("cache", 8, 4, name="60 steps", request={"num_inference_steps": 60}),
    )


def questions(count: int) -> list[evaluate.Question]:
    """Prompts whose motion can go on for ever, each motion once before any comes twice."""
    asked = evaluate.questions(60 * len(MOTIONS), first_seed=FIRST_SEED)
    by_motion = {motion: iter([q for q in asked if q.scene.motion == motion]) for motion in MOTIONS}
    return [next(by_motion[MOTIONS[number % len(MOTIONS)]]) for number in range(count)]


# -- making -------------------------------------------------------------------------------------------------------


def make(configuration: Configuration, asked: list[evaluate.Question], latents: int) -> Iterator[Frames]:
    """The videos, one by one."""
    length = continuity.num_frames(configuration.latents or latents)
    if configuration.is_real:
        yield from (_real_clip(question, length) for question in asked)
        return
    with pipedit.Engine("tiny", device="cpu", num_workers=1, **configuration.engine) as engine:
        requests = [
            pipedit.VideoRequest(prompt=q.prompt, seed=q.seed, num_frames=length, **configuration.request)
            for q in asked
        ]
        for video in engine.generate(requests):
            yield video.frames[:length]  # the released code's conventions make more


def _real_clip(question: evaluate.Question, length: int) -> Frames:
    rng = random.Random(question.seed)
    (asked,) = question.scene.things
    thing = world.sample_thing(rng, shape=asked.shape, colour=asked.colour, motion=question.scene.motion)
    clip = world.render([dataclasses.replace(question.scene, things=(thing,))], length)[0]
    frames: Frames = ((clip.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    return frames


# -- measuring ----------------------------------------------------------------------------------------------------


def figures(question: evaluate.Question, frames: Frames, joints: list[int], block_size: int) -> dict[str, Any]:
    """What one video shows. Positions in latent frames."""
    latents = (len(frames) - 1) // continuity.FRAMES_OF_LATENT + 1
    spans = continuity.windows(latents)
    seen = [evaluate.judge(question, measure.measure(frames[continuity.frames_of(*span)])) for span in spans]
    change, middles = continuity.changes(frames), continuity.between_joints(latents, joints)
    centres = _centres(question, frames[:: continuity.FRAMES_OF_LATENT])
    return {
        "prompt": question.prompt,
        "motion": question.scene.motion,
        "latents": latents,
        "joints": joints,
        "windows": {check: [int(row[check]) for row in seen] for check in CHECKS},
        "overlap": [row["overlap"] for row in seen],
        "flicker": _rounded(continuity.flicker(change, joints, joints, block_size)),
        "flicker_between": _rounded(continuity.flicker(change, middles, joints, block_size)),
        "leaps": continuity.leaps(centres),
        "wander": round(continuity.wander(centres, question.scene.motion), 1),
    }


def _centres(question: evaluate.Question, frames: Frames) -> continuity.Floats:
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).float()
    thing = question.thing
    ground, ink = (
        torch.tensor(colour).float()
        for colour in (world.BACKGROUNDS[question.scene.background], world.COLOURS[thing.colour])
    )
    fit = measure.fit(measure.cover_of(pixels, ground, ink), thing.shape)
    return torch.stack([fit.x, fit.y], dim=1).double().numpy()


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]


# -- a run --------------------------------------------------------------------------------------------------------


def run(output: Path, clips: Path, *, latents: int, count: int, minutes: float, only: str) -> None:
    """Makes and measures what `output` lacks, until the time is up."""
    result = _opened(output, latents)
    asked, until = questions(count), time.monotonic() + 60 * minutes
    for configuration in configurations():
        if not fnmatch.fnmatch(configuration.name, only):
            continue
        rows = result["videos"].setdefault(configuration.name, {})
        missing = [question for question in asked if str(question.seed) not in rows]
        for question, frames in _clips(clips, configuration, missing, latents):
            length = configuration.latents or latents
            joints = configuration.joints(length)
            rows[str(question.seed)] = figures(question, frames, joints, configuration.block_size or length)
            _write(output, result)
            if time.monotonic() > until:
                print(f"time is up in {configuration.name}; start it again to go on")
                return
        print(f"{configuration.name}: {len(rows)} videos", flush=True)


def _opened(output: Path, latents: int) -> dict[str, Any]:
    if not output.exists():
        return {"benchmark": "long video quality", "latents": latents, "videos": {}}
    result: dict[str, Any] = json.loads(output.read_text())
    if result["latents"] != latents:
        raise SystemExit(f"{output} holds videos of {result['latents']} latent frames, not {latents}: use another")
    return result


def _write(output: Path, result: dict[str, Any]) -> None:
    """A line for each video."""
    head = json.dumps({**result, "environment": environment(), "videos": {}}, indent=1)
    configurations = []
    for name, videos in result["videos"].items():
        rows = ",\n".join(f"   {json.dumps(seed)}: {json.dumps(row)}" for seed, row in videos.items())
        configurations.append(f"  {json.dumps(name)}: {{\n{rows}\n  }}")
    videos_text = '"videos": {\n' + ",\n".join(configurations) + "\n }"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(head.replace('"videos": {}', videos_text) + "\n")


def clip_path(clips: Path, configuration: str, seed: int, latents: int) -> Path:
    return clips / str(latents) / configuration.replace(" ", "_").replace("/", "-") / f"{seed}.npz"


def _clips(
    clips: Path, configuration: Configuration, asked: list[evaluate.Question], latents: int
) -> Iterator[tuple[evaluate.Question, Frames]]:
    """From the folder, or made and put there."""
    paths = {q.seed: clip_path(clips, configuration.name, q.seed, latents) for q in asked}
    there = [question for question in asked if paths[question.seed].exists()]
    for question in there:
        yield question, np.load(paths[question.seed])["frames"]
    missing = [question for question in asked if question not in there]
    for question, frames in zip(missing, make(configuration, missing, latents) if missing else (), strict=True):
        path = paths[question.seed]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, frames=frames)
        yield question, frames


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/long_video_quality.json"))
    parser.add_argument("--clips", type=Path, default=Path("out/long_videos"))
    parser.add_argument("--latents", type=int, default=48, help="latent frames of each video; 48 are 189 frames")
    parser.add_argument("--videos", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--only", default="*", help="configurations whose names match, such as 'cache 8/*'")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(
        arguments.output,
        arguments.clips,
        latents=arguments.latents,
        count=arguments.videos,
        minutes=arguments.minutes,
        only=arguments.only,
    )
