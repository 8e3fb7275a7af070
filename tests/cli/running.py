"""Runs command lines in this process over the simulated executor: no weights are loaded, no model computes."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from pipedit.cli.app import run
from pipedit.cli.console import Session
from pipedit.core.messages import Command
from pipedit.engine.engine import Engine
from pipedit.engine.settings import EngineSettings
from pipedit.executor.simulated import SimulatedExecutor

SMALL = ("--num-frames", "9", "--height", "32", "--width", "48", "--num-inference-steps", "3", "--device", "cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """What a command line left behind."""

    code: int
    out: str
    err: str

    @property
    def paths(self) -> list[str]:
        return self.out.splitlines()

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def errors(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


class Cli:
    """`cli("generate", "a prompt")` runs the command in the current folder."""

    def __init__(self, capture: pytest.CaptureFixture[str], model: Path) -> None:
        self._capture, self.model = capture, str(model)

    def __call__(self, *arguments: str, failing: Callable[[Command], None] | None = None) -> Ran:
        def open_engine(settings: EngineSettings) -> Engine:
            executor = SimulatedExecutor(failing=failing)
            return Engine.of(settings, executor)

        self._capture.readouterr()
        code = run(arguments, Session(open_engine=open_engine))
        captured = self._capture.readouterr()
        return Ran(code=code, out=captured.out, err=captured.err)

    def generate(self, *arguments: str, failing: Callable[[Command], None] | None = None) -> Ran:
        """`pipedit generate` of a small video with the tiny model."""
        return self("generate", "--model", self.model, *SMALL, *arguments, failing=failing)


def names_in(folder: Path) -> list[str]:
    """Everything below the folder, hidden and half-written things too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def lines(path: Path, texts: Iterable[str]) -> str:
    """Writes a text file and returns its name."""
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)
