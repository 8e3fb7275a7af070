"""`pipedit doctor`: would generation work here, and if not, what to do about it."""

import dataclasses
import importlib.metadata
import os
import platform
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from pipedit.cli import errors
from pipedit.cli.console import session_of
from pipedit.cli.doctor_degrees import check_num_workers, degree_table, examine_degrees
from pipedit.cli.options import JsonFlag, option
from pipedit.core.errors import CheckpointError, InsufficientMemoryError, InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.core.units import GIB, format_bytes
from pipedit.core.version import __version__
from pipedit.models.adapter import ModelAdapter
from pipedit.models.registry import EMBEDDED, missing_weights, open_model, weight_problems

if TYPE_CHECKING:
    from pipedit.worker.machine import Machine

OK, WARN, FAIL = "ok", "warn", "fail"
_MARKS = {OK: Text("ok", style="green"), WARN: Text("warn", style="yellow"), FAIL: Text("fail", style="bold red")}
_SHOWN_PACKAGES = ("torch", "diffusers", "transformers", "av")  # the others are counted
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_OFF = ("", "0", "false", "no", "off")
_LITTLE_DISK_BYTES = 20 * GIB  # a 1.3B model with its text encoder takes about this much


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at. `advice` says what to do where the status is not ok."""

    group: str
    name: str
    status: str
    found: str
    advice: str = ""


def doctor(
    context: typer.Context,
    model: Annotated[str, option("--model", "-m", metavar="M", help="The model to look at.")] = EMBEDDED,
    num_workers: Annotated[
        int | None,
        option("--num-workers", "--num-gpus", metavar="N", help="Also list the ways in which N workers can share it."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Look at this machine: would generation work, and what to do if not.

    Exits with 0 if it would, with 1 if not.
    """
    session = session_of(context)
    check_num_workers(num_workers)
    machine, checks = examine(model, num_workers or 1)
    degrees = None if num_workers is None else examine_degrees(model, num_workers)
    works = all(check.status != FAIL for check in checks)
    session.report.update(
        works=works,
        checks=[dataclasses.asdict(check) for check in checks],
        machine=None if machine is None else dataclasses.asdict(machine),
    )
    if degrees is not None:
        session.report["degrees"] = degrees.as_json()
    if not as_json:
        session.terminal.table(_table(checks))
        if degrees is not None:
            session.terminal.table(degree_table(degrees))
        session.terminal.table(_verdict(checks, model))
    if not works:
        raise typer.Exit(errors.FAILED)


def examine(model: str, num_workers: int = 1) -> tuple["Machine | None", list[Check]]:
    """Everything about this machine and the model, for this many workers. Imports torch."""
    machine, checks = None, [*_software_checks()]
    try:
        from pipedit.worker.machine import inspect_machine

        machine = inspect_machine()
    except (ImportError, OSError) as error:
        advice = "install it again: pip install --force-reinstall torch"
        checks.append(Check(group="machine", name="torch", status=FAIL, found=f"does not load: {error}", advice=advice))
    else:
        checks += _machine_checks(machine)
        if num_workers > 1:
            checks.append(_workers_check(num_workers))
    checks += [_cache_check(), *_model_checks(model, num_workers, has_torch=machine is not None)]
    return machine, checks


# -- software -----------------------------------------------------------------------------------------------------


def _software_checks() -> Iterator[Check]:
    yield Check(group="software", name="pipedit", status=OK, found=__version__)
    yield Check(group="software", name="python", status=OK, found=platform.python_version())
    requirements = _requirements()
    if not requirements:
        advice = "install it: pip install --editable ."
        yield Check(group="software", name="packages", status=WARN, found="pipedit is not installed", advice=advice)
    packages = [_package_check(requirement) for requirement in requirements]
    shown = [check for check in packages if check.status != OK or check.name in _SHOWN_PACKAGES]
    yield from shown
    if others := len(packages) - len(shown):
        yield Check(group="software", name="others", status=OK, found=f"{others} packages as required")
    yield _encoder_check()


def _requirements() -> list[Requirement]:
    """What the installed package asks for, without its extras."""
    try:
        texts = importlib.metadata.requires("pipedit") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    requirements = [Requirement(text) for text in texts]
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def _package_check(requirement: Requirement) -> Check:
    advice = f"pip install {shlex.quote(str(requirement))}"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(group="software", name=requirement.name, status=FAIL, found="missing", advice=advice)
    if requirement.specifier.contains(version, prereleases=True):
        return Check(group="software", name=requirement.name, status=OK, found=version)
    found = f"{version}, but {requirement.specifier} is needed"
    return Check(group="software", name=requirement.name, status=FAIL, found=found, advice=advice)


def _encoder_check() -> Check:
    try:
        from pipedit.media.encoders import has_h264_encoder
    except (ImportError, OSError) as error:
        advice = "pip install --force-reinstall av"
        return Check(group="software", name="H.264", status=FAIL, found=f"PyAV does not load: {error}", advice=advice)
    if has_h264_encoder():
        return Check(group="software", name="H.264", status=OK, found="libx264")
    advice = "install PyAV's own build (pip install --force-reinstall --only-binary av av), or write .gif, .png or .npy"
    return Check(group="software", name="H.264", status=FAIL, found="FFmpeg without libx264", advice=advice)


# -- machine ------------------------------------------------------------------------------------------------------


def _machine_checks(machine: "Machine") -> Iterator[Check]:
    threads, cores = machine.torch_threads, machine.cores
    found = f"{machine.processor}, {cores} usable core{'' if cores == 1 else 's'}, torch takes {threads}"
    if threads > cores:
        advice = f"more threads than cores slow each other down: set OMP_NUM_THREADS={cores}"
        yield Check(group="machine", name="processor", status=WARN, found=found, advice=advice)
    else:
        yield Check(group="machine", name="processor", status=OK, found=found)
    found = f"{format_bytes(machine.available_bytes)} free of {format_bytes(machine.memory_bytes)}"
    yield Check(group="machine", name="memory", status=OK, found=found)
    yield _cuda_check(machine)
    for device in machine.accelerators:
        free = "free memory unknown" if device.free_bytes is None else f"{format_bytes(device.free_bytes)} free"
        found = f"{device.name}, {free} of {format_bytes(device.memory_bytes)}, compute capability {device.capability}"
        yield Check(group="machine", name=f"cuda:{device.index}", status=OK, found=found)
    if len(machine.accelerators) > 1:
        yield _links_check(machine.peers)


def _cuda_check(machine: "Machine") -> Check:
    driver = f", driver {machine.driver}" if machine.driver else ""
    if machine.accelerators:
        return Check(group="machine", name="CUDA", status=OK, found=f"{machine.torch_cuda}{driver}")
    if machine.driver is None:
        return Check(group="machine", name="CUDA", status=OK, found="no NVIDIA driver; the processor does the work")
    if machine.torch_cuda is None:
        advice = "there is an NVIDIA driver: install a CUDA build of torch, see pytorch.org/get-started"
        return Check(
            group="machine", name="CUDA", status=WARN, found=f"torch is built without it{driver}", advice=advice
        )
    advice = "the driver may be too old for it, or CUDA_VISIBLE_DEVICES hides the GPUs"
    found = f"torch is built for {machine.torch_cuda} but sees no GPU{driver}"
    return Check(group="machine", name="CUDA", status=WARN, found=found, advice=advice)


def _links_check(peers: Sequence[Sequence[bool]]) -> Check:
    lacking = [f"{i}-{j}" for i, row in enumerate(peers) for j, direct in enumerate(row) if i < j and not direct]
    if not lacking:
        return Check(group="machine", name="links", status=OK, found="every GPU reaches every other one directly")
    advice = "what they exchange goes through the host's memory: expect less from running in parallel"
    found = f"no direct link between GPUs {', '.join(lacking)}"
    return Check(group="machine", name="links", status=WARN, found=found, advice=advice)


def _workers_check(num_workers: int) -> Check:
    """Whether this many workers have a device each, or cores enough."""
    from pipedit.engine.settings import EngineSettings, setting_notes
    from pipedit.worker.device import worker_devices, worker_problems

    if problems := worker_problems("auto", num_workers):
        found, _, advice = problems[0].partition("; ")
        return Check(group="machine", name="workers", status=FAIL, found=found, advice=advice)
    if notes := setting_notes(EngineSettings(num_workers=num_workers)):
        found, _, advice = notes[0].partition(": ")
        return Check(group="machine", name="workers", status=WARN, found=found, advice=advice)
    devices = dict.fromkeys(worker_devices("auto", num_workers))
    found = f"{num_workers} on {', '.join(devices)}"
    return Check(group="machine", name="workers", status=OK, found=found)


# -- model --------------------------------------------------------------------------------------------------------


def _offline_variables() -> list[str]:
    return [name for name in _OFFLINE_VARIABLES if os.environ.get(name, "").lower() not in _OFF]


def _cache_check() -> Check:
    """The folder of downloaded models: where, how much room, whether downloading is switched off."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free_bytes = shutil.disk_usage(existing).free
    offline = "".join(f", {name} is set" for name in _offline_variables())
    found = f"{folder}, {format_bytes(free_bytes)} free{offline}"
    if offline:
        return Check(group="model", name="downloads", status=OK, found=found)
    if not os.access(existing, os.W_OK):
        advice = "large models cannot be downloaded: set HF_HUB_CACHE to a folder that is writable"
        return Check(group="model", name="downloads", status=WARN, found=f"{found}, not writable", advice=advice)
    if free_bytes < _LITTLE_DISK_BYTES:
        advice = "too little for most large models: set HF_HUB_CACHE to a folder on a larger disk"
        return Check(group="model", name="downloads", status=WARN, found=found, advice=advice)
    return Check(group="model", name="downloads", status=OK, found=found)


def _model_checks(name: str, num_workers: int, *, has_torch: bool) -> Iterator[Check]:
    try:
        adapter = open_model(name)
    except InvalidRequestError as error:
        yield from (Check(group="model", name=name, status=FAIL, found=problem) for problem in error.problems)
        return
    except CheckpointError as error:
        yield Check(group="model", name=name, status=FAIL, found=str(error))
        return
    yield from _weight_checks(name, adapter)
    if has_torch:
        yield _memory_check(adapter, num_workers)


def _weight_checks(name: str, adapter: ModelAdapter) -> Iterator[Check]:
    if problems := weight_problems(adapter):
        yield from (Check(group="model", name=name, status=FAIL, found=problem) for problem in problems)
    elif not missing_weights(adapter):
        yield Check(group="model", name=name, status=OK, found="ready")
    elif offline := _offline_variables():
        advice = f"unset {' and '.join(offline)}, or bring the files here"
        yield Check(group="model", name=name, status=FAIL, found="not downloaded", advice=advice)
    else:
        advice = "it comes with the first use, if the network allows"
        yield Check(group="model", name=name, status=WARN, found="not downloaded yet", advice=advice)


def _memory_check(adapter: ModelAdapter, num_workers: int) -> Check:
    """Whether the model's default video fits on the devices that "auto" takes."""
    from pipedit.engine.fitting import check_memory
    from pipedit.engine.settings import EngineSettings
    from pipedit.engine.sharing import choose_sharing
    from pipedit.plan.memory import Need, Room
    from pipedit.worker.device import worker_devices

    devices, settings = worker_devices("auto", num_workers), EngineSettings(num_workers=num_workers)
    precision = adapter.default_precision(devices[0].partition(":")[0])
    request = adapter.complete(VideoRequest(prompt=""))
    place = devices[0] if num_workers == 1 else f"{num_workers} workers ({', '.join(dict.fromkeys(devices))})"
    size = f"{request.num_frames} frames of {request.width}x{request.height} on {place}"
    try:
        shared = choose_sharing(request, adapter, settings)
        check_memory([request], adapter, devices, precision, sharing=lambda _request: shared)
    except (InvalidRequestError, InsufficientMemoryError) as error:
        found, _, advice = str(error).partition("; ")
        return Check(group="model", name="default size", status=FAIL, found=found, advice=advice)
    cost = adapter.cost(request, precision, decoders=shared.world_size)
    need = Need.of(cost, shared, num_workers=devices.count(devices[0]))
    needed = Room(available_bytes=0).needed(need)
    found = f"{size}: about {format_bytes(needed)} of memory, fits"
    return Check(group="model", name="default size", status=OK, found=found)


# -- what is shown ------------------------------------------------------------------------------------------------


def _table(checks: Sequence[Check]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    group = checks[0].group
    for check in checks:
        if check.group != group:
            table.add_row("", "", "")
            group = check.group
        table.add_row(_MARKS[check.status], check.name, check.found)
        if check.advice:
            table.add_row("", "", Text(check.advice, style="cyan"))
    return table


def _verdict(checks: Sequence[Check], model: str) -> Text:
    failures = sum(check.status == FAIL for check in checks)
    if not failures:
        return Text(f"\npipedit can generate with {model} here", style="green")
    things = "1 thing stands" if failures == 1 else f"{failures} things stand"
    return Text(f"\n{things} in the way of generating with {model} here", style="bold red")
