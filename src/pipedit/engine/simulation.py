"""From a workload and a cluster to what the simulator runs: models opened, requests checked, engines arranged.

Reads configs only. Who does what where that is left open: plan.planner decides.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pipedit.core.blocks import Prefix, Storage
from pipedit.core.errors import CheckpointError, InsufficientMemoryError, InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.core.units import format_bytes
from pipedit.engine.placing import asked_of
from pipedit.engine.settings import DecodeMode, EngineSettings, Strategy, strategy_problems
from pipedit.models.by_name import PlannableModel, find_model, is_same_model
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.arrangements import Arrangement, Kind
from pipedit.plan.block_arrangement import BlockArrangement
from pipedit.plan.block_predict import BlockDurations, BlockVideo, block_pool, worker_needs
from pipedit.plan.cluster_file import ClusterFile, ReplicaSpec
from pipedit.plan.degrees import degree_problems
from pipedit.plan.estimate import DurationsOf
from pipedit.plan.hardware import Cluster
from pipedit.plan.planned_video import PlannedVideo
from pipedit.plan.planner import make_plan, pool_of, predicted_by
from pipedit.plan.pools import Pool
from pipedit.plan.predict import Predictor
from pipedit.plan.simulator import Arrival
from pipedit.plan.workload import Stream

T = TypeVar("T")
_PLANNED_WITH = 64  # requests at most: more of the same mix would not change who should do what
_MANY_COMMANDS = 200_000  # beyond so many, phases are simulated in a few pieces instead of step by step
_FEW_PIECES = 3
_OF_BLOCKS = ("block_size", "context", "prefix", "context_storage", "dualparal_compat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engines:
    """`pool.count` engines that are alike, and how they are arranged."""

    model: str
    arrangement: Arrangement | BlockArrangement
    pool: Pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """Everything that a simulation needs. `grain`: see Policy."""

    cluster: Cluster
    engines: tuple[Engines, ...]
    arrivals: tuple[Arrival, ...]
    grain: int
    price_per_hour: float | None

    @property
    def pools(self) -> list[Pool]:
        return [engines.pool for engines in self.engines]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    """Requests of one model that are alike. `in_blocks`: the same videos, made block by block."""

    name: str
    video: PlannedVideo
    in_blocks: Callable[[], BlockVideo]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Wish:
    """Engines that somebody wants for a model, `count` of them (None: as many as there is room for)."""

    model: str
    settings: EngineSettings
    count: int | None
    label: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Demand:
    """What is asked of each model: its kinds of request, and the kind of each stream."""

    kinds: Mapping[str, Sequence[_Kind]]
    of_stream: Sequence[str]


def prepare(
    streams: Sequence[Stream],
    cluster_file: ClusterFile,
    settings: Mapping[str, Any] | None = None,
    *,
    grain: int | None = None,
) -> Scenario:
    """`settings`, as of EngineSettings, win over those of the file's replicas. Raises InvalidRequestError with every
    problem of the requests and of the replicas; InsufficientMemoryError if nothing of what was asked for fits."""
    names, device_type = _model_names(streams), "cpu" if cluster_file.device == "cpu" else "cuda"
    problems: list[str] = []
    demand = attempt(problems, lambda: _demand(streams, names, device_type))
    cluster = attempt(problems, cluster_file.cluster)
    wishes = attempt(problems, lambda: _wishes(cluster_file, names, settings or {}))
    if demand is None or cluster is None or wishes is None:
        raise InvalidRequestError(problems)
    predictor = Predictor(cluster=cluster)
    durations_of = predicted_by(predictor)
    arranged = [
        _in_stages(wish, demand.kinds[wish.model], cluster)
        if wish.settings.is_blockwise
        else _arrange(wish, demand.kinds[wish.model], cluster, durations_of)
        for wish in wishes
    ]
    counts = _counts(wishes, [arrangement.num_workers for arrangement in arranged], cluster)
    if grain is None:
        grain = _grain(demand, arranged)
    engines = tuple(
        _pipelines(wish, arrangement, demand.kinds[wish.model], predictor, count=count)
        if isinstance(arrangement, BlockArrangement)
        else _engines(wish, arrangement, demand.kinds[wish.model], durations_of, count=count, grain=grain)
        for wish, arrangement, count in zip(wishes, arranged, counts, strict=True)
    )
    return Scenario(
        cluster=cluster,
        engines=engines,
        arrivals=tuple(_arrivals(streams, demand)),
        grain=grain,
        price_per_hour=_price(cluster_file, cluster),
    )


# -- what is asked for --------------------------------------------------------------------------------------------


def attempt(problems: list[str], make: Callable[[], T]) -> T | None:
    """What `make` returns; where its input is wrong, None, and the problems are added."""
    try:
        return make()
    except InvalidRequestError as error:
        problems += error.problems
        return None


def _model_names(streams: Sequence[Stream]) -> list[str]:
    """As the first stream of each spells it."""
    names: list[str] = []
    for stream in streams:
        if not any(is_same_model(name, stream.model) for name in names):
            names.append(stream.model)
    return names


def _demand(streams: Sequence[Stream], names: Sequence[str], device_type: str) -> _Demand:
    opened = {name: _open(name, device_type) for name in names}
    counts: Counter[tuple[str, VideoRequest]] = Counter()
    of_stream: list[str] = []
    problems: list[str] = []
    for stream in streams:
        name = next(name for name in names if is_same_model(name, stream.model))
        model, found = opened[name]
        problems += [f"{stream.source}: {problem}" for problem in found]
        if model is not None:
            request = model.complete(stream.request)
            problems += [f"{stream.source}: {problem}" for problem in model.problems(request)]
            counts[name, request] += stream.count
            of_stream.append(_kind_name(name, request))
    if problems:
        raise InvalidRequestError(problems)
    kinds: dict[str, list[_Kind]] = {name: [] for name in names}
    for (name, request), count in counts.items():
        model, _ = opened[name]
        assert model is not None
        in_blocks = functools.partial(model.in_blocks, request, count)
        kind = _Kind(name=_kind_name(name, request), video=model.planned(request, count), in_blocks=in_blocks)
        kinds[name].append(kind)
    return _Demand(kinds=kinds, of_stream=of_stream)


def _open(name: str, device_type: str) -> tuple[PlannableModel | None, list[str]]:
    """The model, or why there is none."""
    try:
        return find_model(name, device_type=device_type), []
    except InvalidRequestError as error:
        return None, list(error.problems)
    except CheckpointError as error:
        return None, str(error).splitlines()


def _kind_name(model: str, request: VideoRequest) -> str:
    scales = [f"{scale:g}" for scale in (request.guidance_scale, request.true_cfg_scale) if scale is not None]
    size = f"{request.width}x{request.height}x{request.num_frames}"
    return f"{model} {size}, {request.num_inference_steps} steps, guidance {' and '.join(scales)}"


def _arrivals(streams: Sequence[Stream], demand: _Demand) -> Iterator[Arrival]:
    for stream, kind in zip(streams, demand.of_stream, strict=True):
        for at_s in stream.times_s():
            yield Arrival(at_s=at_s, kind=kind, priority=stream.priority)


def _grain(demand: _Demand, arranged: Sequence[Arrangement | BlockArrangement]) -> int:
    """Step by step, as the engine does it, unless that would take too long."""
    videos = [kind.video for kinds in demand.kinds.values() for kind in kinds]
    steps = max(video.cost.num_steps for video in videos)
    commands = sum(video.count * (video.cost.num_steps + video.chunks_with(1)) for video in videos)
    if commands <= _MANY_COMMANDS:
        return 1
    helped = any(arrangement.aco is not AcoMode.OFF for arrangement in arranged)
    return -(-steps // _FEW_PIECES) if helped else 0


# -- who runs it --------------------------------------------------------------------------------------------------


def _wishes(cluster_file: ClusterFile, models: Sequence[str], settings: Mapping[str, Any]) -> list[_Wish]:
    """One for each entry of the file that serves a model of the workload. Without entries, one is made up."""
    wishes: list[_Wish] = []
    problems: list[str] = []
    for number, spec in enumerate(cluster_file.replicas or (ReplicaSpec(),), start=1):
        label = f"replicas[{number}]" if cluster_file.replicas else "replicas"
        names = [name for name in models if spec.model is None or is_same_model(name, spec.model)]
        if spec.model is None and len(models) > 1:
            problems.append(f"{label}: the workload has several models ({', '.join(models)}); say which one they serve")
        elif names:
            engine = _settings({**spec.settings, **settings}, cluster_file)
            wishes.append(_Wish(model=names[0], settings=engine, count=spec.count, label=label))
            problems += [f"{label}: {problem}" for problem in _setting_problems(wishes[-1], cluster_file)]
    if not problems:
        served = {wish.model for wish in wishes}
        problems += [f"no replicas serve {name}; the cluster file needs some" for name in models if name not in served]
    if problems:
        raise InvalidRequestError(problems)
    return wishes


def _settings(given: dict[str, Any], cluster_file: ClusterFile) -> EngineSettings:
    if "denoise_workers" not in given or "decode_workers" not in given:
        given.setdefault("num_workers", min(cluster_file.devices_per_node, cluster_file.num_devices))
    return EngineSettings.of(**given)


def _setting_problems(wish: _Wish, cluster_file: ClusterFile) -> list[str]:
    settings, devices = wish.settings, cluster_file.num_devices
    problems = strategy_problems(settings) or degree_problems(settings.wanted, settings.num_denoisers)
    if not settings.is_blockwise:
        plain = EngineSettings(num_workers=1)
        given = [name for name in _OF_BLOCKS if getattr(settings, name) != getattr(plain, name)]
        problems += [f"{name} needs strategy dualparal" for name in given]
    if not problems and settings.num_workers > devices:
        problems.append(f"each needs {settings.num_workers} devices, and the cluster has {devices}")
    return problems


def kinds_of(settings: EngineSettings) -> frozenset[Kind]:
    """The arrangements that the settings leave open on hardware that is only described."""
    if settings.strategy == Strategy.AUTO:
        return frozenset(Kind)
    if settings.strategy == Strategy.DISAGGREGATED:
        return frozenset({Kind.DISAGGREGATED})
    is_serial = settings.decode == DecodeMode.SERIAL
    return frozenset(
        kind
        for kind in Kind
        if kind.is_colocated and kind.is_serial == is_serial and kind.is_offloaded == settings.offload
    )


def _arrange(wish: _Wish, kinds: Sequence[_Kind], cluster: Cluster, durations_of: DurationsOf) -> Arrangement:
    total = sum(kind.video.count for kind in kinds)
    plan = make_plan(
        [_fewer(kind.video, total) for kind in kinds],
        wish.settings.num_workers,
        available_bytes=cluster.device.memory_bytes,
        durations_of=durations_of,
        asked=asked_of(wish.settings, kinds_of(wish.settings)),
    )
    if plan.best is not None:
        return plan.best.arrangement
    reasons = [f"{wish.label}: {refusal.what}: {refusal.reason}" for refusal in plan.refusals]
    raise InsufficientMemoryError("\n".join(reasons or [f"{wish.label}: nothing that was asked for can run"]))


def _fewer(video: PlannedVideo, total: int) -> PlannedVideo:
    """In the same mix, but so few that planning takes no longer than it must."""
    return dataclasses.replace(video, count=max(1, round(video.count * min(1.0, _PLANNED_WITH / total))))


def _in_stages(wish: _Wish, kinds: Sequence[_Kind], cluster: Cluster) -> BlockArrangement:
    """For the first kind; the others differ in their blocks alone."""
    problems, available = [], cluster.device.memory_bytes
    for video in (kind.in_blocks() for kind in kinds):
        way, layers = _pipeline_of(wish.settings, video), len(video.cost.forward.layers)
        if way.stages > layers:
            raise InvalidRequestError([f"{wish.label}: {way.stages} stages cannot share {layers} layers"])
        needed = max(need.needed_bytes for need in worker_needs(way, video))
        if needed > available:
            problems.append(
                f"{wish.label}: {video.request.num_frames} frames of {video.request.width}x{video.request.height}, "
                f"{way.describe()}: a worker needs about {format_bytes(needed)}, {format_bytes(available)} are there"
            )
    if problems:
        raise InsufficientMemoryError("\n".join(problems))
    return _pipeline_of(wish.settings, kinds[0].in_blocks())


def _pipeline_of(settings: EngineSettings, video: BlockVideo) -> BlockArrangement:
    plan = video.plan(
        block_latents=settings.block_size,
        context_latents=settings.context_latents,
        prefix=Prefix(settings.prefix),
        compat=settings.dualparal_compat,
    )
    return BlockArrangement(
        plan=plan,
        stages=settings.num_denoisers,
        decode_worker=settings.num_workers > settings.num_denoisers,
        storage=Storage(settings.context_storage),
        encode_on=settings.encode_on,
    )


def _pipelines(
    wish: _Wish, arrangement: BlockArrangement, kinds: Sequence[_Kind], predictor: Predictor, *, count: int
) -> Engines:
    pools = []
    for kind in kinds:
        video = kind.in_blocks()
        durations = BlockDurations(predictor, video, _pipeline_of(wish.settings, video))
        pools.append(block_pool(durations, kind.name, count))
    services = {name: service for pool in pools for name, service in pool.services.items()}
    return Engines(model=wish.model, arrangement=arrangement, pool=dataclasses.replace(pools[0], services=services))


def _counts(wishes: Sequence[_Wish], each: Sequence[int], cluster: Cluster) -> list[int]:
    """How many engines of each, which need so many devices: those that are open share what is left."""
    fixed = sum((wish.count or 0) * workers for wish, workers in zip(wishes, each, strict=True))
    if fixed > cluster.num_devices:
        raise InvalidRequestError([f"the replicas need {fixed} devices, and the cluster has {cluster.num_devices}"])
    num_open = sum(wish.count is None for wish in wishes)
    share = (cluster.num_devices - fixed) // max(num_open, 1)
    counts = [
        share // workers if wish.count is None else wish.count for wish, workers in zip(wishes, each, strict=True)
    ]
    problems = [
        f"{wish.label}: each needs {workers} devices, and {share} are left for them"
        for wish, workers, count in zip(wishes, each, counts, strict=True)
        if not count
    ]
    if problems:
        raise InvalidRequestError(problems)
    return counts


def _engines(
    wish: _Wish,
    arrangement: Arrangement,
    kinds: Sequence[_Kind],
    durations_of: DurationsOf,
    *,
    count: int,
    grain: int,
) -> Engines:
    pool = pool_of(arrangement, [kind.video for kind in kinds], durations_of)
    services = {kind.name: pool.services[str(number)] for number, kind in enumerate(kinds)}
    policy = dataclasses.replace(pool.policy, grain=grain)
    return Engines(
        model=wish.model,
        arrangement=arrangement,
        pool=dataclasses.replace(pool, services=services, policy=policy, count=count),
    )


def _price(cluster_file: ClusterFile, cluster: Cluster) -> float | None:
    return cluster.device.price_per_hour if cluster_file.price_per_hour is None else cluster_file.price_per_hour
