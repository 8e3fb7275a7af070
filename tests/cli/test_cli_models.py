"""`pipedit models` over a hub cache of our own, in a process of its own because the cache's place is read on import."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipedit.models.registry import KNOWN_MODELS

CACHED = "wan2.1-t2v-1.3b"


@pytest.fixture
def hub_cache(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A cache that holds a tiny model under the name of a large one."""
    model = tmp_path / "hub" / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_folder("wan"), model / "snapshots" / ("0" * 40))
    return tmp_path / "hub"


def ask(hub_cache: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipedit", "models", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"},
    )
    return done.stdout


def states(hub_cache: Path) -> dict[str, dict[str, Any]]:
    return {model["alias"]: model for model in json.loads(ask(hub_cache, "--json"))["models"]}


def test_what_is_here_is_told_with_size_and_parameters(hub_cache: Path) -> None:
    found = states(hub_cache)
    assert list(found) == [model.alias for model in KNOWN_MODELS]
    cached, absent = found[CACHED], found["hunyuanvideo"]
    assert cached["state"] == "ready"
    assert cached["size_bytes"] > 100_000
    assert cached["parameters"]["transformer"] > 1000
    assert (absent["state"], absent["size_bytes"], absent["folder"]) == ("absent", 0, None)
    assert 12e9 < absent["parameters"]["transformer"] < 14e9
    assert "Tencent" in absent["licence"]


def test_missing_weights_are_noticed(hub_cache: Path) -> None:
    for file in hub_cache.rglob("vae/*.safetensors"):
        file.unlink()
    assert states(hub_cache)[CACHED]["state"] == "incomplete"


def test_the_table_has_a_row_for_each(hub_cache: Path) -> None:
    table = ask(hub_cache)
    rows = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert {model.alias for model in KNOWN_MODELS} <= set(rows)
    assert "ready" in rows[CACHED]
