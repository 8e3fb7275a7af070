"""Judges a model folder by the pixels of what it makes: python -m training.evaluate [--model FOLDER] [--prompts 240].

Generates through pipedit itself, with seeds and wordings that training never saw, a quarter of the prompts from
held-out combinations, 9 to 49 frames. Writes figures and a contact sheet; exits with 1 if a threshold is missed.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pipedit
from pipedit.media import contact_sheet, evenly
from pipedit.worker.machine import usable_cores
from training import measure, world

NUM_FRAMES = (9, 17, 25, 33, 49)
THRESHOLDS = {"colour": 0.98, "motion": 0.97, "shape": 0.95, "background": 0.95, "overlap": 0.90}
FIRST_SEED = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt, what it asks for, and how it is generated."""

    prompt: str
    scene: world.Scene
    held_out: bool
    num_frames: int
    seed: int

    @property
    def thing(self) -> world.Thing:
        return self.scene.things[0]


def questions(count: int, *, first_seed: int = FIRST_SEED) -> list[Question]:
    """`count` single-shape prompts: every fourth from a held-out combination, lengths and backgrounds in turn."""
    rng = random.Random(f"evaluation {first_seed}")
    pools = {held: world.combinations(held_out=held) for held in (True, False)}
    for pool in pools.values():
        rng.shuffle(pool)
    backgrounds = list(world.BACKGROUNDS)
    asked = []
    for number in range(count):
        held = number % 4 == 0
        shape, colour, motion = pools[held][(number // 4 if held else number) % len(pools[held])]
        scene = world.Scene(
            things=(world.Thing(shape=shape, colour=colour, x=0, y=0, radius=1),),
            motion=motion,
            background=backgrounds[rng.randrange(len(backgrounds))],
        )
        asked.append(
            Question(
                prompt=world.caption(scene, rng),
                scene=scene,
                held_out=held,
                num_frames=NUM_FRAMES[number % len(NUM_FRAMES)],
                seed=first_seed + number,
            )
        )
    return asked


def judge(question: Question, seen: measure.Measurement) -> dict[str, Any]:
    """What was right about one clip; `shape` also asks that nine frames in ten show it."""
    thing = question.thing
    return {
        "prompt": question.prompt,
        "seed": question.seed,
        "num_frames": question.num_frames,
        "held_out": question.held_out,
        "asked_motion": question.scene.motion,
        "asked_shape": thing.shape,
        "colour": seen.colour == thing.colour,
        "shape": seen.shape == thing.shape and seen.steady >= 0.9,
        "motion": seen.motion == question.scene.motion,
        "background": seen.background == question.scene.background,
        "overlap": round(seen.overlap[thing.shape], 4),
        "worst_frame": round(seen.worst_frame, 4),
        "seen": f"{seen.colour} {seen.shape} {seen.motion} on {seen.background}",
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in THRESHOLDS}


def breakdown(rows: list[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    groups = defaultdict(list)
    for row in rows:
        groups[str(row[key])].append(row)
    return {name: {"clips": len(group), **summary(group)} for name, group in sorted(groups.items())}


# -- in worker processes: one engine and one thread each, which two cores like better than two threads ---------------

_engine: pipedit.Engine | None = None
_settings: dict[str, Any] = {}


def _begin(model: str, settings: dict[str, Any]) -> None:
    global _engine, _settings
    torch.set_num_threads(1)
    _engine, _settings = pipedit.Engine(model, device="cpu"), settings


def _answer(question: Question) -> tuple[measure.Measurement, np.ndarray]:
    assert _engine is not None
    request = pipedit.VideoRequest(
        prompt=question.prompt, seed=question.seed, num_frames=question.num_frames, **_settings
    )
    (video,) = _engine.generate(request)
    return measure.measure(video.frames), video.frames


def _answer_pair(number: int) -> dict[str, bool]:
    """A two-shape prompt: whether both shapes, their relation and their motion are right, and all of it."""
    assert _engine is not None
    rng = random.Random(f"pair {number}")
    scene = world.sample_scene(rng, two_shapes=1.0)
    seed = FIRST_SEED + 500_000 + number
    request = pipedit.VideoRequest(prompt=world.caption(scene, rng), seed=seed, num_frames=17, **_settings)
    (video,) = _engine.generate(request)
    first, second = scene.things
    seen = measure.measure_pair(video.frames, (first.colour, second.colour), scene.background)
    pairs = list(zip(seen, scene.things, strict=True))
    checks = {
        "shapes": all(s.shape == t.shape for s, t in pairs),
        "motion": all(s.motion == scene.motion for s in seen),
        "relation": measure.relation_of(*seen) == scene.relation,
        "overlap": all(s.overlap[t.shape] > 0.6 for s, t in pairs),
    }
    return {**checks, "all": all(checks.values())}


# -------------------------------------------------------------------------------------------------------------------


def ceiling(asked: list[Question]) -> dict[str, float]:
    """The same judgement on real clips of the world: what a perfect model would get."""
    rng = random.Random("ceiling")
    rows = []
    for question in asked:
        thing = world.sample_thing(
            rng, shape=question.thing.shape, colour=question.thing.colour, motion=question.scene.motion
        )
        clip = world.render([dataclasses.replace(question.scene, things=(thing,))], question.num_frames)[0]
        frames = ((clip.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
        rows.append(judge(question, measure.measure(frames)))
    return summary(rows)


def save_contact_sheet(asked: list[Question], clips: list[np.ndarray], path: Path, columns: int = 9) -> None:
    """One clip a row under its prompt, `columns` frames spread over its length."""
    frames = np.concatenate([evenly(clip, columns) for clip in clips])
    titles = [f"{q.prompt} ({q.num_frames} frames)" for q in asked]
    contact_sheet(frames, columns=columns, scale=2, row_titles=titles).save(path, optimize=True)


def evaluate(model: str, count: int, pairs: int, to: Path, settings: dict[str, Any]) -> bool:
    """Writes DIR/evaluation.json and DIR/contact_sheet.png; True if every threshold is met."""
    asked = questions(count)
    with concurrent.futures.ProcessPoolExecutor(
        max_workers=usable_cores(),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(model, settings),
    ) as pool:
        answers = list(pool.map(_answer, asked))
        pair_rows = list(pool.map(_answer_pair, range(pairs)))
    rows = [judge(question, seen) for question, (seen, _) in zip(asked, answers, strict=True)]
    # The judge must say no to clips of other prompts.
    shuffled = [judge(question, seen) for question, (seen, _) in zip(asked, answers[7:] + answers[:7], strict=True)]
    defaults = dataclasses.asdict(pipedit.Engine(model, device="cpu").adapter.defaults)
    all_clips = summary(rows)
    result = {
        "clips": len(rows),
        "settings": {**defaults, **settings},
        "all": all_clips,
        "held_out": summary([row for row in rows if row["held_out"]]),
        "by_num_frames": breakdown(rows, "num_frames"),
        "by_motion": breakdown(rows, "asked_motion"),
        "by_shape": breakdown(rows, "asked_shape"),
        "two_shapes": {k: round(float(np.mean([row[k] for row in pair_rows])), 4) for k in pair_rows[0]}
        if pairs
        else {},
        "ceiling": ceiling(asked[:60]),
        "wrong_prompts": summary(shuffled),
        "failures": [row for row in rows if not all(row[k] for k in ("colour", "shape", "motion", "background"))],
    }
    missed = {k: v for k, v in all_clips.items() if v < THRESHOLDS[k]}
    result["missed"] = missed
    to.mkdir(parents=True, exist_ok=True)
    (to / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    save_contact_sheet(asked[:16], [frames for _, frames in answers[:16]], to / "contact_sheet.png")
    print(json.dumps({k: result[k] for k in ("all", "held_out", "two_shapes", "ceiling", "wrong_prompts")}, indent=1))
    print(f"missed: {missed}" if missed else "every threshold is met")
    return not missed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--to", type=Path, default=Path("training/card"))
    parser.add_argument("--num-inference-steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--max-sequence-length", type=int)
    arguments = parser.parse_args()
    names = ("num_inference_steps", "guidance_scale", "max_sequence_length")
    chosen = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    passed = evaluate(arguments.model, arguments.prompts, arguments.pairs, arguments.to, chosen)
    raise SystemExit(0 if passed else 1)
