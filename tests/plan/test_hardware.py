"""Hardware by name and from files, and the time of exchanges on it."""

import dataclasses
import json
from pathlib import Path

import pytest

from pipedit.core.errors import InvalidRequestError
from pipedit.plan.cluster_file import read_cluster_file
from pipedit.plan.device_profile import DeviceProfile, Rate
from pipedit.plan.hardware import (
    Cluster,
    Device,
    Link,
    device_of,
    find_device,
    find_link,
    known_devices,
    known_links,
    make_cluster,
    read_cluster,
    write_cluster,
    write_device,
)

NUMBERS = (
    "memory_bytes",
    "linear_per_s",
    "attention_per_s",
    "convolution_per_s",
    "memory_bytes_per_s",
    "host_bytes_per_s",
)


def test_what_the_planner_needs_is_known() -> None:
    assert set(known_devices()) >= {"a6000", "l40", "rtx4090", "h100", "h200", "b200", "cpu"}
    assert set(known_links()) >= {
        "nvlink-bridge", "nvlink4", "nvlink5", "pcie4", "pcie5", "infiniband", "loopback",
    }  # fmt: skip


@pytest.mark.parametrize("name", known_devices())
def test_every_number_says_where_it_comes_from(name: str) -> None:
    device = find_device(name.upper())
    assert device.name == name
    for field in (*NUMBERS, "layer_overhead_s", "masked_attention"):
        assert getattr(device, field) > 0
        assert device.source[field]
    assert make_cluster(name, num_devices=2).link.name in known_links()


@pytest.mark.parametrize("name", known_links())
def test_every_rate_of_a_link_says_where_it_comes_from(name: str) -> None:
    link = find_link(name)
    assert link.ring_bytes_per_s >= link.bytes_per_s > 0
    assert {"bytes_per_s", "latency_s"} <= set(link.source)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(InvalidRequestError, match=r"device 'h1000' is not known; use a6000, .*did you mean h100"):
        find_device("h1000")
    with pytest.raises(InvalidRequestError, match=r"link 'pcie' is not known.*or a file"):
        find_link("pcie")


def test_a_device_comes_back_from_its_file(tmp_path: Path) -> None:
    device = find_device("l40")
    write_device(device, tmp_path / "mine.json")
    assert find_device(str(tmp_path / "mine.json")) == device


def test_a_cluster_comes_back_from_its_file(tmp_path: Path) -> None:
    cluster = make_cluster("h100", num_devices=16)
    write_cluster(cluster, tmp_path / "mine.json")
    assert read_cluster(tmp_path / "mine.json") == cluster


def test_a_cluster_file_may_name_its_parts(tmp_path: Path) -> None:
    content = {"format": 1, "kind": "cluster", "device": "h100", "link": "nvlink4", "num_devices": 8}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    assert read_cluster(tmp_path / "mine.json").link == find_link("nvlink4")


def test_a_measured_cluster_stands_for_its_device(tmp_path: Path) -> None:
    measured = make_cluster("cpu", num_devices=2)
    write_cluster(measured, tmp_path / "mine.json")
    assert make_cluster(str(tmp_path / "mine.json"), num_devices=2) == measured
    assert make_cluster(str(tmp_path / "mine.json"), "pcie5").link == find_link("pcie5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "lacks"),
        ({"linear_per_s": 0}, "linear_per_s=0 should be a number above 0"),
        ({"linear_per_s": "fast"}, "linear_per_s='fast' should be a number above 0"),
        ({"linear_per_sec": 1}, "linear_per_sec is not known; did you mean linear_per_s"),
        ({"memory_bytes": None}, "memory_bytes=None should be a number"),
    ],
)
def test_bad_device_files_are_refused_in_a_sentence(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    write_device(find_device("l40"), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InvalidRequestError, match=message):
        find_device(str(path))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1, "kind": "cluster"}', '{"format": 1, "kind": "cluster", "device": 3}']
)
def test_bad_cluster_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(InvalidRequestError, match="not a"):
        read_cluster(tmp_path / "mine.json")


def test_impossible_clusters_are_refused() -> None:
    device, link = find_device("h100"), find_link("nvlink4")
    with pytest.raises(InvalidRequestError, match="num_devices=0 must be at least 1"):
        Cluster(device=device, num_devices=0, link=link)
    with pytest.raises(InvalidRequestError, match="no node_link"):
        Cluster(device=device, num_devices=16, link=link)


LINK = Link(name="near", title="", bytes_per_s=100.0, latency_s=1.0, neighbour_bytes_per_s=200.0)
FAR = Link(name="far", title="", bytes_per_s=10.0, latency_s=2.0)
CLUSTER = Cluster(
    device=find_device("h100"), num_devices=8, link=LINK, devices_per_node=4, node_link=FAR, node_host_bytes_per_s=40.0
)


def test_exchanges() -> None:
    assert CLUSTER.exchange_s(1000, 1) == CLUSTER.exchange_s(0, 4) == CLUSTER.pass_on_s(1000, 1) == 0
    assert CLUSTER.exchange_s(1000, 4) == pytest.approx(1 + 10)
    assert CLUSTER.pass_on_s(1000, 4) == pytest.approx(1 + 5)
    assert CLUSTER.exchange_s(700, 8) == pytest.approx(2 + 400 / 10)  # 4 of 7 partners are in the other machine
    assert CLUSTER.pass_on_s(1000, 8) == pytest.approx(2 + 100)


def test_devices_share_the_way_to_host_memory() -> None:
    assert CLUSTER.host_copy_s(40, 4) == pytest.approx(4)
    assert CLUSTER.host_copy_s(40, 8) == pytest.approx(4)  # two machines
    fast = dataclasses.replace(CLUSTER, node_host_bytes_per_s=None)
    assert fast.host_copy_s(40, 4) == pytest.approx(40 / fast.device.host_bytes_per_s)


def test_a_measured_profile_becomes_a_device() -> None:
    rates = [("linear", 100.0), ("attention", 50.0)]
    profile = DeviceProfile(
        device="abacus",
        memory_bytes=1024,
        rates=tuple(Rate(kind=k, dtype="float32", shape={}, operations_per_s=r) for k, r in rates),
        source={},
    )
    device = device_of(profile)
    assert (device.title, device.attention_per_s, device.convolution_per_s) == ("abacus", 50.0, 100.0)
    assert "measured" in device.source["linear_per_s"]
    assert "assumed" in device.source["host_bytes_per_s"]
    assert isinstance(device, Device)
    with pytest.raises(InvalidRequestError, match="no linear rate"):
        device_of(dataclasses.replace(profile, rates=()))


def test_what_profile_writes_serves_as_a_cluster_file(tmp_path: Path) -> None:
    cluster = make_cluster("cpu", num_devices=2)
    write_cluster(cluster, tmp_path / "here.json")
    found = read_cluster_file(tmp_path / "here.json")
    assert found.cluster() == cluster
    assert found.replicas == ()
