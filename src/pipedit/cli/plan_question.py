"""What `pipedit plan` was asked, checked: every problem at once. Reads configs and data files, computes nothing."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipedit.core.errors import CheckpointError, InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.core.units import GIB
from pipedit.models.adapter import ModelAdapter
from pipedit.models.planned_videos import planned_video
from pipedit.models.published_configs import PUBLISHED
from pipedit.models.registry import KNOWN_MODELS, open_model, open_published
from pipedit.models.validation import check_request
from pipedit.plan.cluster_file import read_cluster_file
from pipedit.plan.degrees import MOST_WORKERS
from pipedit.plan.hardware import Cluster, known_devices, make_cluster
from pipedit.plan.planned_video import PlannedVideo

_DEFAULT_GPUS = 8
_MOST_PROMPTS = 10**6
_CPU = "cpu"

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
    """`tiled`: the same videos with the VAE in spatial tiles; none where they are asked for like that. `given`: what
    the user said of the videos, as fields of VideoRequest."""

    model: str
    videos: tuple[PlannedVideo, ...]
    tiled: tuple[PlannedVideo, ...]
    cluster: Cluster
    available_bytes: int
    given: Mapping[str, Any]
    tiling: bool


def ask(
    model: str | None, given: Mapping[str, Any], machine: Machine, *, prompts: int, top: int, tiling: bool
) -> Question:
    """Raises InvalidRequestError with everything that is wrong."""
    problems = _count_problems(prompts, top, machine)
    cluster = _collect(problems, lambda: find_cluster(machine))
    adapter = _collect(problems, lambda: open_for_planning(model))
    request = None if adapter is None else _request(adapter, given, problems)
    if problems or cluster is None or adapter is None or request is None:
        raise InvalidRequestError(problems)
    precision = adapter.default_precision(_CPU if cluster.device.name == _CPU else "cuda")
    whole, tiled = (
        planned_video(request, adapter, precision, tiling=in_tiles, count=prompts) for in_tiles in (tiling, True)
    )
    memory = cluster.device.memory_bytes if machine.memory_gib is None else int(machine.memory_gib * GIB)
    return Question(
        model=str(model),
        videos=(whole,),
        tiled=() if tiling else (tiled,),
        cluster=cluster,
        available_bytes=memory,
        given=given,
        tiling=tiling,
    )


def open_for_planning(name: str | None) -> ModelAdapter:
    """Published models are known without their files; else a folder or a hub id."""
    aliases = {model.hub_id: model.alias for model in KNOWN_MODELS}
    if name is None:
        raise InvalidRequestError([f"--model is missing; give {', '.join(PUBLISHED)}, a folder or a hub id"])
    if aliases.get(name, name.lower()) in PUBLISHED:
        return open_published(name)
    try:
        return open_model(name)
    except CheckpointError as error:
        raise InvalidRequestError(str(error).splitlines()) from error


def find_cluster(machine: Machine) -> Cluster:
    if machine.cluster is not None:
        beside = {"--gpu": machine.gpu, "--gpus": machine.gpus, "--link": machine.link}
        if clashing := [flag for flag, value in beside.items() if value is not None]:
            raise InvalidRequestError([f"--cluster says it all; leave {' and '.join(clashing)} out"])
        read = read_cluster_file(Path(machine.cluster))
        return make_cluster(
            read.device, read.link, num_devices=read.num_devices, devices_per_node=read.devices_per_node,
            node_link=read.node_link,
        )  # fmt: skip
    if machine.gpu is None:
        raise InvalidRequestError([f"--gpu is missing; give {', '.join(known_devices())}, or a --cluster file"])
    return make_cluster(machine.gpu, machine.link, num_devices=machine.gpus or _DEFAULT_GPUS)


def _request(adapter: ModelAdapter, given: Mapping[str, Any], problems: list[str]) -> VideoRequest | None:
    """Complete; problems are added to the others."""
    request = adapter.complete(VideoRequest(prompt="any", **given))
    if (request.true_cfg_scale or 0) > 1 and request.negative_prompt is None:
        request = dataclasses.replace(request, negative_prompt="")  # which costs as much as any other
    found = check_request(request, adapter)
    problems += found
    return None if found else request


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
