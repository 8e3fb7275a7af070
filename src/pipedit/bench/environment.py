"""What a figure was measured on: hardware, versions, commit, command. A figure without these is not published."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipedit.worker.machine import inspect_machine

_PACKAGES = ("pipedit", "torch", "diffusers", "transformers", "av", "numpy")


def environment() -> dict[str, Any]:
    """A JSON-ready description of this machine and this code."""
    machine = inspect_machine()
    return {
        "processor": machine.processor,
        "cores": machine.cores,
        "memory_bytes": machine.memory_bytes,
        "gpus": [accelerator.name for accelerator in machine.accelerators],
        "driver": machine.driver,
        "torch_threads": machine.torch_threads,
        "system": machine.system,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _commit() -> str | None:
    """The commit of the source tree, "-dirty" if it was changed, or None for an installed package."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
