"""Devices as a worker sees them: which there are, which data types they run, how much memory is free and was used."""

import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipedit.plan.precision import DTYPES

_CUDA = re.compile(r"cuda(?::(0|[1-9][0-9]{0,5}))?")


def resolve_device(wanted: str) -> str:
    """ "auto" -> the best device there is; anything else stays as it is. Imports torch."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def device_problems(device: str, dtype: str) -> list[str]:
    """Why `device` or `dtype` cannot be used here, one sentence each; "auto" is always fine."""
    problems = []
    if dtype not in ("auto", *DTYPES):
        problems.append(f"dtype {dtype!r} is not known; use auto, {', '.join(DTYPES)}")
    cuda = _CUDA.fullmatch(device)
    if cuda is None and device not in ("auto", "cpu"):
        problems.append(f"device {device!r} is not known; use auto, cpu, cuda or cuda:N")
    elif cuda is not None:
        problems += _cuda_problems(cuda[1])
    if device == "cpu" and dtype == "float16":
        problems.append("float16 is not supported on the cpu; use float32 or bfloat16")
    return problems


def worker_problems(device: str, num_workers: int) -> list[str]:
    """Why this many workers cannot have a device each, one sentence each. On the CPU they share it."""
    if num_workers <= 1 or device == "cpu":
        return []
    device_type, _, index = resolve_device(device).partition(":")
    if device_type != "cuda":
        return []
    if device != "auto" and index:
        return [f"device {device} is one GPU, and each of the {num_workers} workers needs its own; use device cuda"]
    import torch

    count = torch.cuda.device_count()
    if not 0 < count < num_workers:  # without any, `device_problems` tells more
        return []
    gpus = "is 1 CUDA device" if count == 1 else f"are {count} CUDA devices"
    return [f"num_workers={num_workers} needs a GPU for each, and there {gpus}; use at most {count}, or device cpu"]


def worker_devices(device: str, num_workers: int) -> tuple[str, ...]:
    """The device of each worker on this machine, by rank: all on the CPU, or a GPU for each. A single worker takes the
    GPU that is named."""
    device = resolve_device(device)
    if num_workers > 1 and device.startswith("cuda"):
        return tuple(f"cuda:{rank}" for rank in range(num_workers))
    return (device,) * num_workers


def _cuda_problems(index: str | None) -> list[str]:
    import torch

    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        return [f"device cuda is not available ({reason}); use cpu, or run pipedit doctor"]
    count = torch.cuda.device_count()
    if index is not None and int(index) >= count:
        return [f"device cuda:{index} does not exist; there are cuda:0 to cuda:{count - 1}"]
    return []


def available_bytes(device: str) -> int:
    """Memory that is free on the device now (for the CPU: what the system can give without swapping, and what the
    limits of this process's control groups leave, as containers and job systems set them)."""
    if device == "cpu":
        return min([int(psutil.virtual_memory().available), *_group_rooms(Path("/"))])
    import torch

    free, _ = torch.cuda.mem_get_info(torch.device(device))
    # What torch's allocator keeps for later is as good as free for us.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept)


def peak_bytes(device: str) -> int:
    """The most memory that this process has held so far, on the device (for the CPU: resident)."""
    if device == "cpu":
        return _peak_resident(Path("/proc/self/status"))
    import torch

    return int(torch.cuda.max_memory_allocated(device))


def _peak_resident(status: Path) -> int:
    # Linux' getrusage also counts what the process that started this one held at that moment.
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _group_rooms(root: Path) -> Iterator[int]:
    """What is left of each memory limit on this process, by Linux control groups of version 2 or 1; nothing where there
    are none. Cached file contents count as used there, but make way for others."""
    membership = root / "proc/self/cgroup"
    if not membership.is_file():
        return
    mounts = root / "sys/fs/cgroup"
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            top, names = mounts, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top, names = mounts / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = top / path.strip("/")
        # Limits of the groups around it hold as well. Inside a container, only the top may be there to see.
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            room = _room_of_group(folder, *names)
            if room is not None:
                yield room


def _room_of_group(folder: Path, limit_name: str, used_name: str, prefix: str) -> int | None:
    try:
        limit, used = (folder / limit_name).read_text().strip(), int((folder / used_name).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # the group, or a file of it, is not visible
        return None
    if limit == "max":
        return None
    cached = sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return max(int(limit) - used + cached, 0)
