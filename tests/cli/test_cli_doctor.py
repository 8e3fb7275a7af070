"""`pipedit doctor`: its checks one by one, and as a whole on this machine."""

import dataclasses
import sys

import pytest
from packaging.requirements import Requirement

from pipedit.cli import doctor
from pipedit.worker.machine import Accelerator, Machine, inspect_machine
from tests.cli.running import Cli

GPU = Accelerator(index=0, name="NVIDIA H100", capability="9.0", memory_bytes=80 * 2**30, free_bytes=79 * 2**30)
MACHINE = Machine(
    system="Linux",
    processor="a processor",
    cores=8,
    memory_bytes=32 * 2**30,
    available_bytes=16 * 2**30,
    torch="2.13.0",
    torch_cuda="13.0",
    torch_threads=8,
    driver="580.65",
    accelerators=(GPU, dataclasses.replace(GPU, index=1)),
    peers=((True, True), (True, True)),
)


def found(machine: Machine) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor._machine_checks(machine)}


def test_this_machine_can_generate(cli: Cli) -> None:
    ran = cli("doctor", "--model", cli.model)
    assert ran.code == 0
    for part in ("torch", "diffusers", "libx264", "memory", "downloads", "ready", "can generate"):
        assert part in ran.out


def test_json_and_exit_code_for_a_model_that_does_not_exist(cli: Cli) -> None:
    ran = cli("doctor", "--model", "tinny", "--json")
    assert ran.code == 1
    document = ran.document
    assert document["works"] is False
    (failed,) = [check for check in document["checks"] if check["status"] == "fail"]
    assert "did you mean tiny?" in failed["found"]
    assert document["machine"]["torch"]


def test_torch_that_does_not_load_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    ran = cli("doctor", "--model", cli.model, "--json")
    assert ran.code == 1
    assert ran.document["machine"] is None
    (failed,) = [check for check in ran.document["checks"] if check["status"] == "fail"]
    assert (failed["name"], "pip install" in failed["advice"]) == ("torch", True)


@pytest.mark.parametrize(
    ("requirement", "status", "said"),
    [
        ("numpy>=1", doctor.OK, ""),
        ("numpy>=99", doctor.FAIL, "but >=99 is needed"),
        ("no-such-package>=1", doctor.FAIL, "missing"),
    ],
)
def test_packages(requirement: str, status: str, said: str) -> None:
    check = doctor._package_check(Requirement(requirement))
    assert check.status == status
    assert said in check.found
    assert (check.advice == f"pip install '{requirement}'") == (status == doctor.FAIL)


def test_the_package_declares_what_is_checked() -> None:
    names = {requirement.name for requirement in doctor._requirements()}
    assert {"torch", "diffusers", "transformers", "av"} <= names
    assert "pytest" not in names  # extras are not needed to generate


def test_gpus_and_their_links() -> None:
    checks = found(MACHINE)
    assert all(check.status == doctor.OK for check in checks.values())
    assert "79.0 GiB free of 80.0 GiB" in checks["cuda:0"].found
    apart = dataclasses.replace(MACHINE, peers=((True, False), (False, True)))
    assert found(apart)["links"].status == doctor.WARN
    assert "0-1" in found(apart)["links"].found
    assert "links" not in found(dataclasses.replace(MACHINE, accelerators=(GPU,), peers=((True,),)))


def test_a_driver_that_torch_cannot_use_is_worth_a_warning() -> None:
    without = dataclasses.replace(MACHINE, accelerators=(), peers=())
    assert found(dataclasses.replace(without, driver=None))["CUDA"].status == doctor.OK
    blind = found(without)["CUDA"]
    assert (blind.status, "sees no GPU" in blind.found) == (doctor.WARN, True)
    cpu_build = found(dataclasses.replace(without, torch_cuda=None))["CUDA"]
    assert (cpu_build.status, "pytorch.org" in cpu_build.advice) == (doctor.WARN, True)


def test_too_many_threads_are_worth_a_warning() -> None:
    assert found(dataclasses.replace(MACHINE, torch_threads=64))["processor"].status == doctor.WARN


def test_the_offline_variables_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    assert doctor._offline_variables() == ["HF_HUB_OFFLINE"]
    assert "HF_HUB_OFFLINE is set" in doctor._cache_check().found


def test_the_machine_tells_about_itself() -> None:
    machine = inspect_machine()
    assert machine.cores >= 1
    assert 0 < machine.available_bytes <= machine.memory_bytes
    assert len(machine.peers) == len(machine.accelerators)
