"""The project keeps its own promises: a light import, an honest interface, pins that hold on every machine."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "pipedit"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
LIST_NEW_MODULES = """
import json, sys
before = set(sys.modules)
{statement}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(new - sys.stdlib_module_names)))
"""


def imported_by(statement: str) -> list[str]:
    """Packages outside the standard library that `statement` loads in a fresh interpreter."""
    script = LIST_NEW_MODULES.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    packages: list[str] = json.loads(done.stdout)
    return packages


def normalised(name: str) -> str:
    """The form in which package names compare."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_import_is_light() -> None:
    assert imported_by("import pipedit") == ["pipedit"]


def test_light_import_check_can_fail() -> None:
    assert "rich" in imported_by("import pipedit, rich.console")


def test_public_names_are_sorted_and_there() -> None:
    import pipedit

    assert pipedit.__all__ == sorted(pipedit.__all__)
    missing = [name for name in pipedit.__all__ if not hasattr(pipedit, name)]
    assert not missing


def test_installed_version_is_the_one_in_the_code() -> None:
    import pipedit

    assert importlib.metadata.version("pipedit") == pipedit.__version__


def test_architecture_names_every_package() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    packages = [path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    missing = [name for name in packages if f"`{name}/`" not in page]
    assert not missing
    assert len(page.split()) < 1500, "two pages at most"


def test_changelog_has_a_place_for_the_next_change() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("pin", PINS)
def test_pin_holds_on_every_machine(pin: str) -> None:
    """No host, no path, no local version; nothing that only a CUDA build of torch needs."""
    assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin)
    assert not re.match(r"nvidia|cuda|triton", pin)


def test_every_direct_dependency_is_pinned() -> None:
    pinned = {normalised(pin.partition("==")[0]) for pin in PINS}
    wanted = [
        *PROJECT["dependencies"],
        *(name for extra in PROJECT["optional-dependencies"].values() for name in extra),
    ]
    names = {normalised(re.split(r"[^A-Za-z0-9._-]", requirement)[0]) for requirement in wanted}
    assert names - pinned == set()
    assert "torch==2.13.0" in PINS
