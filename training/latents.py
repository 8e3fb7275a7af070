"""Encodes the training clips once: python -m training.latents --out DIR [--clips N]. Needs DIR/vae.pt."""

import argparse
import random
from pathlib import Path

import torch

from training import checkpoint, vae, world

NUM_FRAMES = 49
TWO_SHAPES = 0.12


def scene(seed: int, index: int) -> world.Scene:
    """Training scene number `index`; the latents on disk and the captions drawn later agree by this number."""
    return world.sample_scene(random.Random(f"scene {seed} {index}"), two_shapes=TWO_SHAPES)


@torch.inference_mode()
def encode_clips(out: Path, clips: int, seed: int, batch: int = 8) -> None:
    """Writes DIR/latents.pt: means [clips, C, 13, 8, 8] in half precision, and their deviation per channel."""
    codec = vae.load(out)
    parts = []
    for first in range(0, clips, batch):
        scenes = [scene(seed, i) for i in range(first, min(first + batch, clips))]
        with torch.autocast("cpu", torch.bfloat16):
            mean, _ = vae.encode(codec, world.render(scenes, NUM_FRAMES))
        parts.append(mean.half())
        if first // batch % 50 == 0:
            print(f"{first + len(scenes)} of {clips} clips", flush=True)
    latents = torch.cat(parts)
    dims = (0, 2, 3, 4)
    statistics = {"mean": latents.float().mean(dims), "std": latents.float().std(dims)}
    checkpoint.save(out / "latents.pt", {"latents": latents, "seed": seed, **statistics})


def load(out: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(out / "latents.pt")
    if state is None:
        raise SystemExit(f"{out / 'latents.pt'} is missing: run python -m training.latents --out {out} first")
    return state


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    encode_clips(arguments.out, arguments.clips, arguments.seed)
