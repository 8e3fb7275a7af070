"""Devices as a worker sees them: which there are, which data types they run, how much memory is free."""

import psutil

from pipedit.plan.precision import DTYPES


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
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        problems.append(f"device {device!r} is not known; use auto, cpu, cuda or cuda:N")
    elif kind == "cuda":
        problems += _cuda_problems(index)
    if kind == "cpu" and dtype == "float16":
        problems.append("float16 is not supported on the cpu; use float32 or bfloat16")
    return problems


def _cuda_problems(index: str) -> list[str]:
    import torch

    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        return [f"device cuda is not available ({reason}); use cpu, or run pipedit doctor"]
    count = torch.cuda.device_count()
    if index and int(index) >= count:
        return [f"device cuda:{index} does not exist; there are cuda:0 to cuda:{count - 1}"]
    return []


def available_bytes(device: str) -> int:
    """Memory that is free on the device now (for the CPU: what the system can give without swapping)."""
    if device == "cpu":
        return int(psutil.virtual_memory().available)
    import torch

    free, _ = torch.cuda.mem_get_info(torch.device(device))
    # What torch's allocator keeps for later is as good as free for us.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept)
