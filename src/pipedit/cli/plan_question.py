"""What `pipedit plan` was asked, checked: every problem at once. Reads configs and data files, computes nothing."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipedit.core.errors import CheckpointError, InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.core.units import GIB
from pipedit.engine.hardware import cluster_of
from pipedit.models.by_name import PlannableModel, find_model, known_names
from pipedit.plan.cluster_file import read_cluster_file
from pipedit.plan.degrees import MOST_WORKERS
from pipedit.plan.hardware import Cluster, known_devices, make_cluster, read_cluster
from pipedit.plan.planned_video import PlannedVideo

CPU = "cpu"
_DEFAULT_GPUS = 8
_MOST_PROMPTS = 10**6

_Made = TypeVar("_Made")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The flags that say where it would run; None: not given."""

    gpu: str | None = None
    gpus: int | None = None
    link: str | None = None
    cluster: str | None = None
    memory_gib: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """`given`: what the user said of the videos, as fields of VideoRequest. `tiling`: their VAE decodes in tiles."""

    name: str
    model: PlannableModel
    request: VideoRequest
    count: int
    cluster: Cluster
    available_bytes: int
    given: Mapping[str, Any]
    tiling: bool

    def planned(self, request: VideoRequest) -> PlannedVideo:
        """Videos like this one instead."""
        video = self.model.planned(request, self.count)
        return video.tiled if self.tiling and video.tiled is not None else video

    @property
    def videos(self) -> list[PlannedVideo]:
        return [self.planned(self.request)]


def ask(
    name: str | None, given: Mapping[str, Any], machine: Machine, *, prompts: int, top: int, tiling: bool
) -> Question:
    """Raises InvalidRequestError with everything that is wrong."""
    problems = _count_problems(prompts, top, machine)
    cluster = _collect(problems, lambda: _find_cluster(machine))
    device_type = "cpu" if cluster is not None and cluster.device.name == CPU else "cuda"
    model = _collect(problems, lambda: _find_model(name, device_type))
    request = None if model is None else model.complete(VideoRequest(prompt="", **given))
    if model is not None and request is not None:
        problems += model.problems(request)
    if problems:
        raise InvalidRequestError(problems)
    assert cluster is not None and model is not None and request is not None and name is not None
    memory = _device_bytes(cluster) if machine.memory_gib is None else int(machine.memory_gib * GIB)
    return Question(
        name=name,
        model=model,
        request=request,
        count=prompts,
        cluster=cluster,
        available_bytes=memory,
        given=given,
        tiling=tiling,
    )


def _find_model(name: str | None, device_type: str) -> PlannableModel:
    if name is None:
        raise InvalidRequestError([f"--model is missing; give {', '.join(known_names())}, a folder or a hub id"])
    try:
        return find_model(name, device_type=device_type)
    except CheckpointError as error:
        raise InvalidRequestError(str(error).splitlines()) from error


def _find_cluster(machine: Machine) -> Cluster:
    if machine.cluster is not None:
        beside = {"--gpu": machine.gpu, "--link": machine.link}
        if clashing := [flag for flag, value in beside.items() if value is not None]:
            raise InvalidRequestError([f"--cluster says that too; leave {' and '.join(clashing)} out"])
        return _read_cluster(machine.cluster, machine.gpus)
    if machine.gpu is None:
        raise InvalidRequestError([f"--gpu is missing; give {', '.join(known_devices())}, or a --cluster file"])
    return make_cluster(machine.gpu, machine.link, num_devices=_DEFAULT_GPUS if machine.gpus is None else machine.gpus)


def _device_bytes(cluster: Cluster) -> int:
    """For each worker: on a CPU they share what there is."""
    if cluster.device.name != CPU:
        return cluster.device.memory_bytes
    return cluster.device.memory_bytes // min(cluster.num_devices, cluster.devices_per_node)


def _read_cluster(path: str, num_devices: int | None) -> Cluster:
    """What `pipedit profile` has written, or a file that names devices and links, with another number of devices if one
    is given."""
    if is_written_cluster(path):
        return read_cluster(Path(path)) if num_devices is None else cluster_of(path, num_devices)
    file = read_cluster_file(path)
    return (file if num_devices is None else dataclasses.replace(file, num_devices=num_devices)).cluster()


def is_written_cluster(path: str) -> bool:
    """Whether the file says that it holds everything itself. What cannot be read is left to others to complain of."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "kind" in content


def _count_problems(prompts: int, top: int, machine: Machine) -> list[str]:
    problems = []
    if not 1 <= prompts <= _MOST_PROMPTS:
        problems.append(f"--prompts {prompts} must be between 1 and {_MOST_PROMPTS}")
    if top < 1:
        problems.append(f"--top {top} must be at least 1")
    if machine.gpus is not None and not 1 <= machine.gpus <= MOST_WORKERS:
        problems.append(f"--gpus {machine.gpus} must be between 1 and {MOST_WORKERS}")
    if machine.memory_gib is not None and not 0 < machine.memory_gib < 10**6:
        problems.append(f"--memory {machine.memory_gib} must be a number of GiB above 0")
    return problems


def _collect(problems: list[str], make: Callable[[], _Made]) -> _Made | None:
    """What it makes, or None and its problems."""
    try:
        return make()
    except InvalidRequestError as error:
        problems += error.problems
        return None
