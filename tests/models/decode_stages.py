"""Decode stages of tiny models, with tiles small enough for tiny pictures."""

import dataclasses
from typing import Any

from pipedit.models.adapter import ModelAdapter

SMALL_TILES = {
    f"tile_sample_{kind}_{side}": size for kind, size in (("min", 32), ("stride", 24)) for side in ("height", "width")
}


def load(adapter: ModelAdapter, *, tiling: bool = False, dtype: str = "float32") -> Any:
    precision = dataclasses.replace(adapter.default_precision("cpu"), vae=dtype)
    stage: Any = adapter.load_decode_stage("cpu", precision, tiling=tiling)
    stage.vae.enable_tiling(**SMALL_TILES)  # sets sizes; whether tiles are cut is the stage's own decision
    return stage
