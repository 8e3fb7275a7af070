"""What a figure was measured on: hardware, versions, commit, command. A figure without these is not published."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from pipedit.worker.machine import inspect_machine

# More than what an idle system and the end of whatever started this leave behind.
_BUSY_LOAD, _BUSY_CORES = 0.5, 0.2
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


def load() -> dict[str, Any]:
    """How busy the machine is before anything is measured; takes half a second. Where it is busy, absolute times are
    too long, and bounds that were measured as well too."""
    cores = psutil.cpu_count() or 1
    busy_cores = psutil.cpu_percent(interval=0.5) / 100 * cores
    average = psutil.getloadavg()[0]
    return {
        "load_average": average,
        "busy_cores": round(busy_cores, 2),
        "is_busy": average > _BUSY_LOAD or busy_cores > _BUSY_CORES,
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
