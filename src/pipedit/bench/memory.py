"""`pipedit bench memory`: peak memory of a whole process against the number of frames, beside plain diffusers."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipedit.bench.environment import environment
from pipedit.bench.generate import GenerateBench, complete_settings, fresh_processes
from pipedit.bench.processes import peak_memory_bytes
from pipedit.engine.engine import Engine


def run(bench: GenerateBench, num_frames: Sequence[int]) -> dict[str, Any]:
    """JSON-ready rows, one for each frame count: peak bytes of both sides, and the bytes of the latents, which is all
    that has to grow with the length of the video."""
    rows: list[dict[str, Any]] = []
    for frames in num_frames:
        folder, settings = complete_settings(bench, num_frames=frames)
        with tempfile.TemporaryDirectory() as scratch:
            commands = fresh_processes(bench, folder, settings, Path(scratch))
            peaks = {name: peak_memory_bytes(c, timeout_s=bench.timeout_s) for name, c in commands.items()}
        rows.append({"num_frames": frames, "peak_bytes": peaks, "latent_bytes": _latent_bytes(bench, settings)})
    return {
        "benchmark": "memory",
        "model": bench.model,
        "settings": {k: v for k, v in settings.items() if k != "num_frames"},
        "rows": rows,
        "growth_bytes": {name: rows[-1]["peak_bytes"][name] - first for name, first in rows[0]["peak_bytes"].items()},
        "environment": environment(),
    }


def _latent_bytes(bench: GenerateBench, settings: dict[str, Any]) -> int:
    from pipedit.core.request import VideoRequest

    engine = Engine(bench.model, device=bench.device, dtype=bench.dtype)
    return engine.adapter.cost(VideoRequest(**settings), engine.precision).latent_bytes
