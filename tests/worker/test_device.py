"""Names of devices, and how much memory is free where limits are set."""

from pathlib import Path

import pytest

from pipedit.worker.device import _group_rooms, _peak_resident, available_bytes, device_problems, peak_bytes


@pytest.mark.parametrize(
    "device", ["cuda:00", "cuda:", "cuda:\u0663", "cuda:-1", "cuda:1 ", "cpu:0", "gpu", "auto:1", ""]
)
def test_names_that_mean_no_device(device: str) -> None:
    (problem,) = device_problems(device, "auto")
    assert "is not known" in problem


def test_auto_and_cpu_are_devices() -> None:
    assert device_problems("auto", "float32") == device_problems("cpu", "bfloat16") == []
    assert "not supported on the cpu" in device_problems("cpu", "float16")[0]


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_limits_of_control_groups_version_2(tmp_path: Path) -> None:
    assert list(_group_rooms(tmp_path)) == []  # no such system
    write(tmp_path / "proc" / "self", cgroup="0::/jobs/mine\n")
    top = tmp_path / "sys" / "fs" / "cgroup"
    write(top / "jobs" / "mine", memory__max="max\n", memory__current="700\n", memory__stat="inactive_file 50\n")
    statistics = "anon 500\ninactive_file 50\nactive_file 150\n"
    write(top / "jobs", memory__max="1000\n", memory__current="700\n", memory__stat=statistics)
    assert list(_group_rooms(tmp_path)) == [500]
    write(top, memory__max="600\n", memory__current="900\n", memory__stat="")  # as inside a container
    assert list(_group_rooms(tmp_path)) == [500, 0]


def test_limits_of_control_groups_version_1(tmp_path: Path) -> None:
    write(tmp_path / "proc" / "self", cgroup="5:cpu:/a\n4:memory:/a\n")
    files = {
        "memory__limit_in_bytes": "1000\n",
        "memory__usage_in_bytes": "400\n",
        "memory__stat": "total_inactive_file 100\n",
    }
    write(tmp_path / "sys" / "fs" / "cgroup" / "memory", **files)
    assert list(_group_rooms(tmp_path)) == [700]


def test_the_peak_of_memory_is_read_where_the_system_tells_it(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmPeak:\t  900 kB\nVmHWM:\t     123 kB\nVmRSS:\t 100 kB\n")
    assert _peak_resident(status) == 123 * 1024
    elsewhere = _peak_resident(tmp_path / "no such file")
    assert elsewhere > 0.9 * peak_bytes("cpu") > 2**20


def test_a_limit_makes_less_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipedit.worker.device._group_rooms", lambda _root: iter([12345]))
    assert available_bytes("cpu") == 12345
