"""`pipedit profile`: this machine as a cluster for planning and simulation. Measures without any model.

As many processes as there will be workers measure at the same time, each with its share of the cores.
"""

import contextlib
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from pipedit.bench.machine_rates import mean
from pipedit.bench.processes import Peer
from pipedit.core.errors import InvalidRequestError
from pipedit.plan.hardware import Cluster, Device, Link, find_link
from pipedit.worker.machine import Machine, inspect_machine

_THINGS = 16  # that are measured, about
_TIMEOUT_S = 300.0
_POLL_S = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineProfile:
    """What to measure. `device`: auto, cpu or cuda. `workers`: processes; None: one for each GPU, or two on the CPU.
    `budget_s`: about how long it takes."""

    device: str = "auto"
    workers: int | None = None
    budget_s: float = 45.0


def measure(profile: MachineProfile) -> Cluster:
    """Raises InvalidRequestError for devices and workers that the machine does not have."""
    machine = inspect_machine()
    kind = _kind(profile.device, machine)
    workers = _workers(profile.workers, kind, machine)
    answers = _ask_ranks(kind, workers, machine, profile.budget_s / _THINGS)
    measured = mean(answers)
    return Cluster(
        device=_device(kind, machine, workers, measured),
        num_devices=workers,
        devices_per_node=workers,
        link=_link(kind, workers, measured),
        node_host_bytes_per_s=workers * measured["host_bytes_per_s"],
    )


def _kind(device: str, machine: Machine) -> str:
    if device == "auto":
        return "cuda" if machine.accelerators else "cpu"
    if device not in ("cpu", "cuda"):
        raise InvalidRequestError([f"device={device} cannot be profiled; use auto, cpu or cuda"])
    if device == "cuda" and not machine.accelerators:
        raise InvalidRequestError(["device=cuda, but torch sees no CUDA device; use cpu"])
    return device


def _workers(wanted: int | None, kind: str, machine: Machine) -> int:
    most = len(machine.accelerators) if kind == "cuda" else machine.cores
    what = "CUDA devices" if kind == "cuda" else "cores"
    if wanted is None:
        return most if kind == "cuda" else min(2, most)
    if not 1 <= wanted <= most:
        raise InvalidRequestError([f"num_workers={wanted} does not suit {most} {what}; use 1 to {most}"])
    return wanted


def _ask_ranks(kind: str, workers: int, machine: Machine, each_s: float) -> list[dict[str, Any]]:
    """What each of them measured, in order."""
    variables = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    if kind == "cpu":
        variables["OMP_NUM_THREADS"] = str(max(machine.cores // workers, 1))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        peers = []
        for rank in range(workers):
            options = {
                "rank": rank,
                "world_size": workers,
                "meeting": str(Path(folder) / "meeting"),
                "device": kind if kind == "cpu" else f"{kind}:{rank}",
                "each_s": each_s,
                "timeout_s": _TIMEOUT_S / 2,
            }
            peer = Peer(
                "machine_rank.py", [json.dumps(options)], timeout_s=_TIMEOUT_S, variables=variables, wait_ready=False
            )
            peers.append(stack.enter_context(peer))
        for peer in peers:
            stack.callback(peer.kill)  # called before any of them is waited for
        _answers(peers)  # they are ready
        for peer in peers:
            peer.ask("measure")
        return _answers(peers)


def _answers(peers: list[Peer]) -> list[dict[str, Any]]:
    """One of each. A rank that ends is noticed while others are waited for."""
    answers: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + _TIMEOUT_S
    while len(answers) < len(peers):
        for rank, peer in enumerate(peers):
            if rank not in answers and (answer := peer.poll(_POLL_S)) is not None:
                answers[rank] = answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(peers) - len(answers)} ranks did not answer within {_TIMEOUT_S:.0f} s")
    return [answers[rank] for rank in range(len(peers))]


def _device(kind: str, machine: Machine, workers: int, measured: dict[str, float]) -> Device:
    if kind == "cuda":
        title, memory = machine.accelerators[0].name, min(a.memory_bytes for a in machine.accelerators[:workers])
    else:
        title, memory = machine.processor, machine.memory_bytes // workers
    names = {field.name for field in dataclasses.fields(Device)}
    rates = {name: value for name, value in measured.items() if name in names}
    rates["masked_attention"] = min(rates["masked_attention"], 1.0)
    sharing = "alone" if workers == 1 else f"while {workers} processes measured at the same time"
    return Device(
        name="measured",
        title=title,
        memory_bytes=memory,
        **rates,
        source={
            "memory_bytes": "the system" if kind == "cuda" else "the system, shared among the workers",
            **dict.fromkeys(rates, f"measured by pipedit profile, {sharing}"),
        },
    )


def _link(kind: str, workers: int, measured: dict[str, float]) -> Link:
    """A single worker has nobody to exchange with: an assumed one."""
    if workers == 1:
        return find_link("loopback" if kind == "cpu" else "pcie4")
    names = ("bytes_per_s", "latency_s", "neighbour_bytes_per_s")
    how = f"measured by pipedit profile, {workers} processes over {'gloo' if kind == 'cpu' else 'NCCL'}"
    return Link(
        name="measured",
        title="between the workers of this machine",
        **{name: measured[name] for name in names},
        source=dict.fromkeys(names, how),
    )
