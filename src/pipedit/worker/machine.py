"""What this machine is: processor, memory, devices, links between them. For `doctor` and beside every measurement."""

import dataclasses
import os
import platform
import shutil
import subprocess
from pathlib import Path

import psutil

_ASK_DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
_DRIVER_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One CUDA device. `free_bytes` is None where it could not be asked, for example because it is fully in use."""

    index: int
    name: str
    capability: str  # "9.0"
    memory_bytes: int
    free_bytes: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """`peers[i][j]`: device i can read device j's memory directly, without a detour through the host's."""

    system: str
    processor: str
    cores: int  # that this process may use
    memory_bytes: int
    available_bytes: int
    torch: str
    torch_cuda: str | None  # the CUDA version that torch is built for
    torch_threads: int
    driver: str | None  # NVIDIA's driver, whether torch can use it or not
    accelerators: tuple[Accelerator, ...]
    peers: tuple[tuple[bool, ...], ...]


def inspect_machine() -> Machine:
    """Imports torch; raises ImportError or OSError where that is broken. Asks the driver for at most 10 s."""
    import torch

    memory = psutil.virtual_memory()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_processor_name(),
        cores=usable_cores(),
        memory_bytes=memory.total,
        available_bytes=memory.available,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        torch_threads=torch.get_num_threads(),
        driver=_driver_version(),
        accelerators=tuple(_accelerator(index) for index in range(count)),
        peers=tuple(
            tuple(i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)) for i in range(count)
        ),
    )


def usable_cores() -> int:
    """Cores that this process may run on: containers and job systems often allow fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _accelerator(index: int) -> Accelerator:
    import torch

    properties = torch.cuda.get_device_properties(index)
    try:
        free_bytes: int | None = torch.cuda.mem_get_info(index)[0]
    except RuntimeError:
        free_bytes = None
    return Accelerator(
        index=index,
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory_bytes=properties.total_memory,
        free_bytes=free_bytes,
    )


def _processor_name() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        for line in facts.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver_version() -> str | None:
    """None where there is no NVIDIA driver, or where it does not answer."""
    if shutil.which(_ASK_DRIVER[0]) is None:
        return None
    try:
        done = subprocess.run(_ASK_DRIVER, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
