"""`pipedit profile`: what is measured becomes a cluster; no figure is judged here."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pipedit.bench import machine_profile, machine_rates
from pipedit.bench.machine_profile import MachineProfile, measure
from pipedit.bench.machine_rates import Bench, Sizes, mean
from pipedit.cli.app import run
from pipedit.core.errors import InvalidRequestError
from pipedit.plan.hardware import make_cluster, read_cluster
from pipedit.worker.machine import inspect_machine

SMALL = Sizes(
    linear=((8, 16),), attention=((1, 16, 8),), convolution=((2, 2, 4),), copied_bytes=1 << 12, exchanged_bytes=1 << 12
)
RATES = {
    "linear_per_s": 100.0,
    "attention_per_s": 50.0,
    "masked_attention": 1.2,
    "convolution_per_s": 30.0,
    "memory_bytes_per_s": 20.0,
    "host_bytes_per_s": 10.0,
    "layer_overhead_s": 0.5,
}
LINKS = {"bytes_per_s": 4.0, "neighbour_bytes_per_s": 8.0, "latency_s": 0.25}


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No process is started and all of four cores are free. Returns how many ranks were asked for, each time."""
    asked: list[int] = []

    def answer(_kind: str, workers: int, *_: Any) -> list[dict[str, float]]:
        asked.append(workers)
        return [{**RATES, **(LINKS if workers > 1 else {})}] * workers

    machine = dataclasses.replace(inspect_machine(), cores=4, memory_bytes=1000, accelerators=())
    monkeypatch.setattr(machine_profile, "inspect_machine", lambda: machine)
    monkeypatch.setattr(machine_profile, "_ask_ranks", answer)
    return asked


def test_what_is_measured_becomes_a_cluster(ranks: list[int]) -> None:
    cluster = measure(MachineProfile(workers=4))
    assert ranks == [4]
    assert (cluster.num_devices, cluster.devices_per_node, cluster.node_host_bytes_per_s) == (4, 4, 40.0)
    assert (cluster.device.memory_bytes, cluster.device.linear_per_s, cluster.device.layer_overhead_s) == (
        250,
        100,
        0.5,
    )
    assert cluster.device.masked_attention == 1.0  # a mask makes nothing faster
    assert (cluster.link.bytes_per_s, cluster.link.ring_bytes_per_s, cluster.link.latency_s) == (4, 8, 0.25)
    assert "4 processes" in cluster.device.source["linear_per_s"]


def test_one_worker_has_an_assumed_link(ranks: list[int]) -> None:
    cluster = measure(MachineProfile(device="cpu", workers=1))
    assert ranks == [1]
    assert cluster.link.name == "loopback"
    assert "alone" in cluster.device.source["linear_per_s"]


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (MachineProfile(workers=5), "num_workers=5 does not suit 4 cores; use 1 to 4"),
        (MachineProfile(workers=0), "use 1 to 4"),
        (MachineProfile(device="cuda"), "no CUDA device"),
        (MachineProfile(device="tpu"), "device=tpu cannot be profiled"),
    ],
)
def test_what_the_machine_lacks_is_refused(profile: MachineProfile, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        measure(profile)


@pytest.mark.usefixtures("ranks")
def test_the_command_writes_what_planning_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "machine.json"
    assert run(["profile", "-o", str(file), "--num-workers", "2"]) == 0
    assert "overhead of a layer" in capsys.readouterr().out
    cluster = read_cluster(file)
    assert make_cluster(str(file), num_devices=2, devices_per_node=2) == cluster
    assert run(["profile", "--budget", "0"]) == 2
    assert run(["profile", "-o", str(tmp_path / "missing" / "machine.json")]) == 2


def test_a_rank_measures_every_rate_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rates, "FOR_CPU", SMALL)
    bench = Bench(device="cpu", dtype=torch.float32, each_s=0.001, others=False)
    found = bench.measure()
    assert set(found) == set(RATES)
    assert min(found.values()) > 0
    assert mean([{"a": 1.0}, {"a": 3.0}]) == {"a": 2.0}


@pytest.mark.slow
def test_two_processes_measure_together() -> None:
    if inspect_machine().cores < 2:
        pytest.skip("needs two cores")
    cluster = measure(MachineProfile(device="cpu", workers=2, budget_s=0.5))
    assert cluster.link.name == "measured"
    assert min(cluster.link.bytes_per_s, cluster.link.ring_bytes_per_s, cluster.link.latency_s) > 0
