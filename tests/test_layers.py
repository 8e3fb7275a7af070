"""Imports point downwards, heavy packages stay where they belong, modules say what they are.

Walks src/pipedit with ast. Imports inside functions count too: being lazy does not make an upward import right.
"""

import ast
import dataclasses
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "pipedit"

# Top to bottom; packages of one layer never import each other. "pipedit" is the package's own __init__.
LAYERS = (
    ("cli",),
    ("bench", "server"),
    ("pipedit",),
    ("engine",),
    ("executor",),
    ("worker",),
    ("models", "parallel", "media"),
    ("plan",),
    ("core",),
)
DEPTH = {package: depth for depth, layer in enumerate(LAYERS) for package in layer}
TORCH_FREE = ("plan", "core")
ONLY_HERE = {
    "diffusers": "models",
    "transformers": "models",
    "ray": "executor",
    "fastapi": "server",
    "av": "media",
    "PIL": "media",
}
PEER_SCRIPTS = PurePosixPath("bench/peers")  # these run other systems, so they import them
DISTRIBUTIONS = {"PIL": "pillow"}  # where the name to import is not the name to install
SAYS_NOTHING = {"utils", "util", "helpers", "helper", "common", "manager", "managers", "misc"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    module: str  # absolute, dotted; for `from a import b` it is "a.b"
    line: int
    for_types: bool  # below `if TYPE_CHECKING:`, so never run


def find_imports(node: ast.AST, path: PurePosixPath, *, for_types: bool = False) -> Iterator[Import]:
    """Every import below `node`, in a module at `path` inside the package."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for statement in child.body:
                yield from find_imports(ast.Module([statement], []), path, for_types=True)
            yield from find_imports(ast.Module(child.orelse, []), path, for_types=for_types)
            continue
        for module in _imported(child, path):
            yield Import(module=module, line=getattr(child, "lineno", 0), for_types=for_types)
        yield from find_imports(child, path, for_types=for_types)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _imported(node: ast.AST, path: PurePosixPath) -> list[str]:
    """Modules that this one node imports. A name taken from a package may be a module, so it is kept."""
    match node:
        case ast.Import(names=names):
            return [name.name for name in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            parents = ["pipedit", *path.parts[:-1]]
            start = parents[: len(parents) - level + 1] if level else []
            return [".".join([*start, *([module] if module else []), name.name]) for name in names]
        case ast.Call(func=function, args=[ast.Constant(value=str(module)), *_]):
            called = ast.unparse(function)
            return [module] if called in {"importlib.import_module", "import_module", "__import__"} else []
    return []


def package_of(path: PurePosixPath) -> str:
    """The layer's name: "core" for core/errors.py, "pipedit" for __init__.py, "cli" for __main__.py."""
    if len(path.parts) > 1:
        return path.parts[0]
    return {"__init__": "pipedit", "__main__": "cli"}.get(path.stem, path.stem)


def declared_distributions() -> set[str]:
    """What pyproject.toml installs for users, extras included, development tools not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [names for extra, names in project["optional-dependencies"].items() if extra != "dev"]
    requirements = [*project["dependencies"], *(name for names in extras for name in names)]
    return {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requirements}


DECLARED = declared_distributions()


def find_problems(source: str, path: PurePosixPath) -> list[str]:
    """Everything wrong with one module, a sentence each."""
    tree = ast.parse(source)
    package = package_of(path)
    problems = []
    if not ast.get_docstring(tree):
        problems.append(f"{path}: no docstring; say what the module owns and what it does not know")
    problems += [
        f"{path}: the name {part!r} says nothing; name what it holds"
        for part in path.with_suffix("").parts
        if part in SAYS_NOTHING
    ]
    if package not in DEPTH:
        return [*problems, f"{path}: {package!r} is in no layer; add it to LAYERS and to ARCHITECTURE.md"]
    for found in find_imports(tree, path):
        problem = _own_problem(found, package) or _foreign_problem(found, package, path)
        if problem:
            problems.append(f"{path}:{found.line}: {problem}")
    return problems


def _own_problem(found: Import, package: str) -> str | None:
    root, *rest = found.module.split(".")
    if root != "pipedit":
        return None
    target = rest[0] if rest and rest[0] in DEPTH else "pipedit"
    if target == package or DEPTH[target] > DEPTH[package]:
        return None
    direction = "sideways" if DEPTH[target] == DEPTH[package] else "upward"
    return f"{direction} import of {found.module} ({package} may not know {target})"


def _foreign_problem(found: Import, package: str, path: PurePosixPath) -> str | None:
    root = found.module.split(".")[0]
    if root == "pipedit" or root in sys.stdlib_module_names:
        return None
    if not found.for_types and package == "core":
        return f"core uses the standard library only, not {root}"
    if not found.for_types and package in TORCH_FREE and root == "torch":
        return f"{package} runs without torch"
    if path.is_relative_to(PEER_SCRIPTS):
        return None
    home = ONLY_HERE.get(root, package)
    if home != package:
        return f"{root} is imported inside {home} only"
    if DISTRIBUTIONS.get(root, root).replace("_", "-").lower() not in DECLARED:
        return f"{root} is not among the dependencies in pyproject.toml"
    return None


def test_package_keeps_its_layers() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert len(paths) > 10, f"no package at {PACKAGE}"
    problems = [
        problem
        for path in paths
        for problem in find_problems(path.read_text(encoding="utf-8"), PurePosixPath(path.relative_to(PACKAGE)))
    ]
    assert not problems, "\n" + "\n".join(problems)


DOC = '"""What it owns."""\n'


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("plan/scheduler.py", "from pipedit.models import adapter", "upward import of pipedit.models.adapter"),
        ("plan/scheduler.py", "from pipedit import engine", "upward import of pipedit.engine"),
        ("worker/loop.py", "import pipedit", "upward import of pipedit (worker may not know pipedit)"),
        ("worker/loop.py", "from pipedit import Engine", "upward import of pipedit.Engine"),
        ("bench/generate.py", "import pipedit.cli.main", "upward import of pipedit.cli.main"),
        ("models/wan/adapter.py", "from pipedit.media.mp4 import save", "sideways import"),
        ("parallel/exchange.py", "from ..models import adapter", "sideways import of pipedit.models.adapter"),
        ("media/mp4.py", "def f():\n    from pipedit.parallel import exchange", "sideways import"),
        ("bench/run.py", "from pipedit.server import app", "sideways import"),
        ("core/errors.py", "from ..plan.costs import Operations", "upward import of pipedit.plan.costs.Operations"),
        ("core/errors.py", "from . import plan\nfrom .. import plan", "core/errors.py:3: upward import"),
        ("core/request.py", "if TYPE_CHECKING:\n    from pipedit.plan import costs", "upward import"),
        ("core/request.py", "import numpy as np", "standard library only, not numpy"),
        ("core/request.py", "if TYPE_CHECKING:\n    import sys\nelse:\n    import numpy", "standard library only"),
        ("core/request.py", "if not TYPE_CHECKING:\n    import numpy", "standard library only"),
        ("plan/costs.py", "def f():\n    import torch.nn", "plan runs without torch"),
        ("plan/costs.py", "x = importlib.import_module('torch')", "plan runs without torch"),
        ("worker/loop.py", "import diffusers", "diffusers is imported inside models only"),
        ("bench/generate.py", "from transformers import AutoTokenizer", "transformers is imported inside models only"),
        ("engine/engine.py", "import ray", "ray is imported inside executor only"),
        ("cli/serve.py", "from fastapi import FastAPI", "fastapi is imported inside server only"),
        ("cli/generate.py", "import av", "av is imported inside media only"),
        ("engine/output.py", "from PIL import Image", "PIL is imported inside media only"),
        ("models/hub.py", "def f():\n    import requests", "requests is not among the dependencies"),
        ("plan/utils.py", "", "the name 'utils' says nothing"),
        ("common/words.py", "", "the name 'common' says nothing"),
        ("extras/thing.py", "", "'extras' is in no layer"),
    ],
)
def test_checker_finds(path: str, source: str, expected: str) -> None:
    problems = find_problems(DOC + source, PurePosixPath(path))
    assert any(expected in problem for problem in problems), problems


def test_checker_finds_a_missing_docstring() -> None:
    assert find_problems("import os\n", PurePosixPath("core/units.py")) == [
        "core/units.py: no docstring; say what the module owns and what it does not know"
    ]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/messages.py", "if TYPE_CHECKING:\n    import numpy as np"),
        ("core/messages.py", "from .request import VideoRequest\nfrom pipedit.core import spans"),
        ("plan/costs.py", "if typing.TYPE_CHECKING:\n    import torch\nfrom pipedit.core.units import GIB"),
        ("models/wan/adapter.py", "import torch, diffusers\nfrom transformers import UMT5EncoderModel"),
        ("worker/loop.py", "from pipedit.models import adapter\nfrom pipedit.media import mp4"),
        ("models/hub.py", "import huggingface_hub"),
        ("media/gif.py", "from PIL import Image"),
        ("bench/peers/wan.py", "from diffusers import WanPipeline\nimport xfuser"),
        ("__init__.py", "from pipedit.engine import Engine"),
        ("__main__.py", "from pipedit.cli import main"),
        ("cli/bench.py", "from pipedit import generate\nfrom pipedit.bench import run"),
    ],
)
def test_checker_accepts(path: str, source: str) -> None:
    assert find_problems(DOC + source, PurePosixPath(path)) == []
