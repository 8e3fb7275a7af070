"""What `pipedit plan` was asked, checked: every problem at once. Reads configs and data files, computes nothing."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipedit.core.blocks import Prefix, Storage
from pipedit.core.errors import CheckpointError, InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.core.units import GIB
from pipedit.engine.hardware import cluster_of
from pipedit.engine.settings import EngineSettings, Strategy, strategy_problems
from pipedit.models.by_name import PlannableModel, find_model, known_names
from pipedit.plan.arrangements import Kind
from pipedit.plan.block_planner import BlocksAsked
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
    """`given`: what the user said of the videos, as fields of VideoRequest. `tiling`: their VAE decodes in tiles.
    `kinds`: the exact ways to compare. `blocks`: videos made block by block are wanted beside them, like this; then
    `too_long` may say why the model cannot make one in one piece."""

    name: str
    model: PlannableModel
    request: VideoRequest
    count: int
    cluster: Cluster
    available_bytes: int
    given: Mapping[str, Any]
    tiling: bool
    kinds: frozenset[Kind] = frozenset(Kind)
    blocks: BlocksAsked | None = None
    too_long: str = ""

    def planned(self, request: VideoRequest) -> PlannedVideo:
        """Videos like this one instead."""
        video = self.model.planned(request, self.count)
        return video.tiled if self.tiling and video.tiled is not None else video

    @property
    def videos(self) -> list[PlannedVideo]:
        return [self.planned(self.request)]


def ask(
    name: str | None,
    given: Mapping[str, Any],
    machine: Machine,
    *,
    prompts: int,
    top: int,
    tiling: bool,
    strategy: str | None = None,
    blocks: Mapping[str, Any] | None = None,
) -> Question:
    """`blocks`: settings of dualparal, as of EngineSettings, None where not given. Raises InvalidRequestError with all
    that is wrong."""
    settings = EngineSettings(
        strategy=strategy or Strategy.AUTO,
        num_workers=1,
        denoise_workers=1 if strategy == Strategy.DUALPARAL else None,
        **{setting: value for setting, value in (blocks or {}).items() if value is not None},
    )
    problems = _count_problems(prompts, top, machine) + _strategy_problems(settings, blocks or {})
    cluster = _collect(problems, lambda: _find_cluster(machine))
    device_type = "cpu" if cluster is not None and cluster.device.name == CPU else "cuda"
    model = _collect(problems, lambda: _find_model(name, device_type))
    request = None if model is None else model.complete(VideoRequest(prompt="", **given))
    too_long: list[str] = []
    if model is not None and request is not None:
        too_long = model.problems(request)
        seen = _seen_at_once(request, settings, model.size_rules.frame_step) if not problems else request
        problems += model.problems(seen)
    if model is not None and request is not None and not problems and settings.is_blockwise:
        _collect(problems, lambda: model.in_blocks(request))
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
        kinds=frozenset(kind for kind in Kind if _admits(settings, kind)),
        blocks=_blocks_asked(settings, blocks or {}) if settings.is_blockwise else None,
        too_long="; ".join(too_long),
    )


def _strategy_problems(settings: EngineSettings, blocks: Mapping[str, Any]) -> list[str]:
    if settings.strategy not in [*Strategy]:
        return [f"--strategy {settings.strategy!r} is unknown; use {', '.join(Strategy)}"]
    if settings.is_blockwise:
        if blocks.get("prefix") is None and settings.dualparal_compat:
            settings = dataclasses.replace(settings, prefix=Prefix.RERUN)
        return strategy_problems(settings)
    flags = [f"--{setting.replace('_', '-')}" for setting, value in blocks.items() if value is not None]
    return [f"{' and '.join(flags)} needs --strategy dualparal"] if flags else []


def _seen_at_once(request: VideoRequest, settings: EngineSettings, frame_step: int) -> VideoRequest:
    """The request as the model sees it: block by block, no longer than a window. A length that is illegal stays."""
    frames, window = request.num_frames, settings.block_size + settings.context_latents
    if not settings.is_blockwise or frames is None or frames < 1 or (frames - 1) % frame_step:
        return request
    return dataclasses.replace(request, num_frames=min(frames, (window - 1) * frame_step + 1))


def _admits(settings: EngineSettings, kind: Kind) -> bool:
    """Whether a kind of exact arrangement may be taken. Beside dualparal, all of them may."""
    if settings.strategy == Strategy.COLOCATED:
        return kind.is_colocated
    return settings.strategy != Strategy.DISAGGREGATED or not kind.is_colocated


def _blocks_asked(settings: EngineSettings, given: Mapping[str, Any]) -> BlocksAsked:
    prefix, storage = given.get("prefix"), given.get("context_storage")
    return BlocksAsked(
        block_latents=settings.block_size,
        context_latents=settings.context_latents,
        prefix=None if prefix is None else Prefix(prefix),
        storage=None if storage is None else Storage(storage),
        compat=settings.dualparal_compat,
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
