"""The command line over the simulated executor, in a folder of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.running import Cli


@pytest.fixture
def cli(
    tiny_folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Cli:
    model = tiny_folder("wan")
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_INTERACTIVE", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    return Cli(capsys, model)
