"""Resumable training state on disk, and the log of its figures (one JSON object a line)."""

import json
import time
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes beside and renames, so that a kill never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    beside.replace(path)


def load(path: Path) -> dict[str, Any] | None:
    return torch.load(path, weights_only=True) if path.exists() else None


class Log:
    """Appends figures to a file and to the screen; means of what came since the last line."""

    def __init__(self, path: Path, every: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._every = path, every
        self._sums: dict[str, float] = {}
        self._count, self._since = 0, time.process_time()

    def add(self, step: int, **figures: float) -> None:
        for key, value in figures.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._count += 1
        if self._count == self._every:
            line = {"step": step, **{k: round(v / self._count, 5) for k, v in self._sums.items()}}
            line["cpu_s_per_step"] = round((time.process_time() - self._since) / self._count, 3)
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
            self._sums, self._count, self._since = {}, 0, time.process_time()
