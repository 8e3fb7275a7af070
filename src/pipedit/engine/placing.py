"""Who does what: from the settings, and where they leave it open from the requests at hand. Rules: plan.planner."""

import dataclasses
from collections.abc import Sequence

from pipedit.core.placement import Placement, Role
from pipedit.core.request import VideoRequest
from pipedit.engine.hardware import cluster_of
from pipedit.engine.settings import DecodeMode, EngineSettings, Strategy
from pipedit.models.adapter import ModelAdapter, Precision
from pipedit.models.planned_videos import planned_videos
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.arrangements import Arrangement, Asked, Kind, arrangements
from pipedit.plan.block_arrangement import describe_pipeline
from pipedit.plan.block_scheduler import BlockScheduler
from pipedit.plan.choice import choose_placement
from pipedit.plan.estimate import DurationsOf
from pipedit.plan.planner import predicted_by
from pipedit.plan.predict import Predictor
from pipedit.plan.scheduler import Policy, RequestScheduler
from pipedit.plan.scheduling import Scheduler
from pipedit.worker.device import resolve_device

_ENCODERS = {"denoise": Role.DENOISER, "decode": Role.DECODER}


def placement_of(settings: EngineSettings) -> Placement:
    """Of settings that leave nothing open."""
    assert settings.is_placed, settings
    if settings.is_blockwise:
        stages, encode_on = settings.num_denoisers, settings.encode_on
        return Placement.pipeline(
            stages=stages,
            decoder=settings.num_workers > stages,
            encoder=None if encode_on is None else _ENCODERS[encode_on],
        )
    if settings.strategy == Strategy.COLOCATED:
        if settings.decode == DecodeMode.SERIAL:
            return Placement.serial_decode(settings.num_workers)
        return Placement.colocated(settings.num_workers)
    assert settings.denoise_workers is not None and settings.decode_workers is not None
    assert settings.encode_on is not None
    return Placement.disaggregated(
        denoise=settings.denoise_workers, decode=settings.decode_workers, encoder=_ENCODERS[settings.encode_on]
    )


def describe(settings: EngineSettings) -> str:
    """Who does what by settings that leave nothing open, such as "2 denoise, 1 encodes and decodes"."""
    placement = placement_of(settings)
    if settings.is_blockwise:
        return describe_pipeline(placement)
    is_serial = len(placement.decoders) < len(placement.denoisers)
    if placement.is_disaggregated:
        kind = Kind.DISAGGREGATED
    elif settings.offload:
        kind = Kind.OFFLOADED_SERIAL if is_serial else Kind.OFFLOADED
    else:
        kind = Kind.SERIAL if is_serial else Kind.COLOCATED
    return Arrangement(kind=kind, placement=placement, degrees=settings.wanted).describe()


def scheduler_of(settings: EngineSettings, placement: Placement) -> Scheduler:
    """Of settings that leave nothing open."""
    if settings.is_blockwise:
        return BlockScheduler(placement)
    return RequestScheduler(placement, policy_of(settings))


def policy_of(settings: EngineSettings) -> Policy:
    return Policy(aco=AcoMode(settings.aco))


def settle(
    settings: EngineSettings,
    adapter: ModelAdapter,
    requests: Sequence[VideoRequest],
    precision: Precision,
    *,
    available_bytes: int,
) -> tuple[EngineSettings, str]:
    """The settings with nothing left open, and why, in a sentence ("" where there was nothing to choose).

    `requests` are complete; what suits them best is taken. `available_bytes`: of memory for each worker.
    """
    if settings.is_placed:
        return settings, ""
    if settings.num_workers == 1:
        return dataclasses.replace(settings, strategy=Strategy.COLOCATED), ""
    videos = planned_videos(
        requests or [adapter.complete(VideoRequest(prompt=""))], adapter, precision, tiling=settings.vae_tiling
    )
    # With the degrees that requests will be run with.
    asked = dataclasses.replace(asked_of(settings, _kinds(settings)), default_degrees=True)
    if next(arrangements(settings.num_workers, videos, asked), None) is None:
        asked = dataclasses.replace(asked, aco=(AcoMode.OFF,))  # nobody can help; sharing.help_notes tells why
    choice = choose_placement(
        videos,
        settings.num_workers,
        available_bytes=available_bytes,
        durations_of=None if settings.hardware is None else _durations_of(settings),
        asked=asked,
    )
    return _settings_of(choice.arrangement, settings), choice.reason


def asked_of(settings: EngineSettings, kinds: frozenset[Kind]) -> Asked:
    """What the settings lay down for the planner; `kinds` are those that may be taken."""
    aco = {AcoMode.AUTO: (AcoMode.OFF, AcoMode.AUTO)}.get(AcoMode(settings.aco), (AcoMode(settings.aco),))
    return Asked(
        kinds=kinds,
        denoise_workers=settings.denoise_workers,
        decode_workers=settings.decode_workers,
        encoder=None if settings.encode_on is None else _ENCODERS[settings.encode_on],
        aco=aco,
        degrees=settings.wanted,
    )


def _kinds(settings: EngineSettings) -> frozenset[Kind]:
    """Those that the settings leave open. What was said of colocated workers speaks for them."""
    if settings.strategy == Strategy.DISAGGREGATED:
        return frozenset({Kind.DISAGGREGATED})
    is_serial = settings.decode == DecodeMode.SERIAL
    if settings.offload:
        return frozenset({Kind.OFFLOADED_SERIAL if is_serial else Kind.OFFLOADED})
    if is_serial:
        return frozenset({Kind.SERIAL})
    if resolve_device(settings.device) == "cpu":  # weights are in host memory anyway
        return frozenset({Kind.COLOCATED, Kind.SERIAL, Kind.DISAGGREGATED})
    return frozenset(Kind)


def _durations_of(settings: EngineSettings) -> DurationsOf:
    assert settings.hardware is not None
    return predicted_by(Predictor(cluster=cluster_of(settings.hardware, settings.num_workers)))


def _settings_of(arrangement: Arrangement, settings: EngineSettings) -> EngineSettings:
    """Degrees stay open: those that suit these requests may not suit the next ones."""
    kind, placement = arrangement.kind, arrangement.placement
    if kind is Kind.DISAGGREGATED:
        return dataclasses.replace(
            settings,
            strategy=Strategy.DISAGGREGATED,
            denoise_workers=len(placement.denoisers),
            decode_workers=len(placement.decoders),
            encode_on="denoise" if placement.encodes_locally else "decode",
            aco=AcoMode.ON if settings.aco == AcoMode.ON else arrangement.aco,
        )
    return dataclasses.replace(
        settings,
        strategy=Strategy.COLOCATED,
        decode=DecodeMode.SERIAL if kind.is_serial else DecodeMode.SPREAD,
        offload=kind.is_offloaded,
        aco=AcoMode.AUTO,
    )
