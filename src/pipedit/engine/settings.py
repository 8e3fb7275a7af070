"""How to run, as the user said it, and what can be wrong with that. Knows no requests."""

import dataclasses
import enum
import math
from typing import Any

from pipedit.core.blocks import BlockPlan, Prefix, Storage
from pipedit.core.errors import InvalidRequestError
from pipedit.core.parallel import AUTO
from pipedit.engine.hardware import hardware_problems
from pipedit.executor.launched import find_launch
from pipedit.models.adapter import ModelAdapter
from pipedit.models.registry import EMBEDDED, open_model
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.degrees import Wanted, degree_problems
from pipedit.worker.device import device_problems, resolve_device, worker_problems
from pipedit.worker.machine import usable_cores

DEFAULT_BLOCK_SIZE = 8  # latent frames


def default_num_workers() -> int:
    """As many as a launcher has started, else one. Raises InvalidRequestError where its variables make no sense."""
    launch = find_launch()
    return 1 if launch is None else launch.world_size


class Strategy(enum.StrEnum):
    """AUTO: chosen for the first requests and kept. DUALPARAL is never chosen: it makes another video."""

    AUTO = "auto"
    COLOCATED = "colocated"
    DISAGGREGATED = "disaggregated"
    DUALPARAL = "dualparal"


class DecodeMode(enum.StrEnum):
    """How colocated workers decode: all of them share each video, or one of them does and the others wait."""

    SPREAD = "spread"
    SERIAL = "serial"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How to run, as the user said it. Nothing here changes the video, except `dtype` and `vae_tiling`.

    `strategy`: every worker does everything ("colocated"), or `denoise_workers` denoise and `decode_workers` decode
    ("disaggregated"; they add up to `num_workers`). There, `encode_on` says which of the two groups encodes prompts
    ("denoise" or "decode"; None: by memory), and `aco` whether decoders that are idle help with attention. The degrees
    multiply to the workers that denoise; None: chosen for each request. `pipesp_chunks`: a number, or "auto" (see
    ParallelConfig). `offload`: weights stay in host memory and come to the device for their stage. `hardware`: what
    "auto" predicts with, a file that `pipedit profile` has written; without it nothing is predicted.

    "dualparal" makes long videos block by block, on `denoise_workers` stages of layers; the last one decodes too,
    unless `decode_workers` is 1. Only there, and another video for every value: `block_size` and `context` (of either
    neighbour; None: a whole block) in latent frames, `prefix` ("cache" or "rerun", see core.blocks),
    `context_storage` ("device", "host", or "int8", which rounds), `dualparal_compat` (the released code's conventions).
    """

    model: str = EMBEDDED
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    strategy: str = Strategy.AUTO
    denoise_workers: int | None = None
    decode_workers: int | None = None
    encode_on: str | None = None
    aco: str = AcoMode.AUTO
    decode: str = DecodeMode.SPREAD
    offload: bool = False
    block_size: int = DEFAULT_BLOCK_SIZE
    context: int | None = None
    prefix: str = Prefix.CACHE
    context_storage: str = Storage.DEVICE
    dualparal_compat: bool = False
    hardware: str | None = None
    ulysses_degree: int | None = None
    ring_degree: int | None = None
    cfg_degree: int | None = None
    pipesp_chunks: int | str = AUTO
    device: str = "auto"
    dtype: str = "auto"
    vae_tiling: bool = False
    compile_layers: bool = False

    @classmethod
    def of(cls, **given: Any) -> "EngineSettings":
        """Settings of which some are given (None: not). What follows from those is filled in: the third of three worker
        counts, and the strategy that alone gives them a meaning."""
        given = {name: value for name, value in given.items() if value is not None}
        denoise, decode = (_whole(given.get(name)) for name in ("denoise_workers", "decode_workers"))
        if denoise is not None and decode is not None and find_launch() is None:
            given.setdefault("num_workers", denoise + decode)
        settings = cls(**given)
        if settings.strategy == Strategy.AUTO and settings._for_two_groups:
            settings = dataclasses.replace(settings, strategy=Strategy.DISAGGREGATED)
        if settings.is_blockwise and denoise is None:
            stages = (_whole(settings.num_workers) or 1) - (decode or 0)
            return dataclasses.replace(settings, denoise_workers=max(stages, 1))
        if settings.strategy != Strategy.DISAGGREGATED:
            return settings
        workers = _whole(settings.num_workers) or 0
        if decode is None and denoise is not None and denoise < workers:
            return dataclasses.replace(settings, decode_workers=workers - denoise)
        if denoise is None and decode is not None and decode < workers:
            return dataclasses.replace(settings, denoise_workers=workers - decode)
        return settings

    @property
    def wanted(self) -> Wanted:
        return Wanted(
            cfg_degree=self.cfg_degree,
            ring_degree=self.ring_degree,
            ulysses_degree=self.ulysses_degree,
            pipesp_chunks=self.pipesp_chunks,
        )

    @property
    def context_latents(self) -> int:
        """Latent frames of either neighbour that a block sees."""
        if self.context is None and (size := _whole(self.block_size)) is not None:
            return size
        return self.context  # type: ignore[return-value]

    @property
    def is_blockwise(self) -> bool:
        """Whether videos are made block by block, on stages of layers."""
        return self.strategy == Strategy.DUALPARAL

    @property
    def is_placed(self) -> bool:
        """Whether it is known who does what."""
        return self.strategy in (Strategy.COLOCATED, Strategy.DUALPARAL) or (
            self.strategy == Strategy.DISAGGREGATED and self.denoise_workers is not None and self.encode_on is not None
        )

    @property
    def num_denoisers(self) -> int:
        """Workers that share each denoising step. As long as that is open: as few as make up the degrees where others
        are to decode, else all of them."""
        if self.denoise_workers is not None:
            return self.denoise_workers
        if self.strategy != Strategy.DISAGGREGATED or _whole(self.num_workers) is None:
            return self.num_workers
        fewest = math.prod(max(_whole(degree) or 1, 1) for degree in self.wanted.given.values())
        return max(min(fewest, self.num_workers - 1), 1)

    def degree_problems(
        self, heads: int | None = None, uses_guidance: bool | None = None, tokens: int | None = None
    ) -> list[str]:
        """Why the degrees cannot run on those who denoise; see plan.degrees."""
        if self.is_blockwise:
            return []  # see _stage_problems
        setting = "denoise_workers" if self.strategy == Strategy.DISAGGREGATED else "num_workers"
        return degree_problems(self.wanted, self.num_denoisers, heads, uses_guidance, tokens, setting=setting)

    @property
    def _for_two_groups(self) -> dict[str, Any]:
        """What is given that means something only where some workers denoise and others decode."""
        wishes = {
            "denoise_workers": self.denoise_workers,
            "decode_workers": self.decode_workers,
            "encode_on": self.encode_on,
            "aco='on'": True if self.aco == AcoMode.ON else None,
        }
        return {name: value for name, value in wishes.items() if value is not None}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def setting_problems(settings: EngineSettings, adapter: ModelAdapter | None = None) -> list[str]:
    """What is wrong with the settings besides the model's name, one sentence each; without the model's adapter, as far
    as can be told without it."""
    device = settings.device
    if device == "auto" and settings.dtype == "float16":
        device = resolve_device(device)  # only here it matters which: finding out imports torch
    problems = device_problems(device, settings.dtype)
    heads = None if adapter is None else adapter.heads
    wrong_sharing = strategy_problems(settings) or settings.degree_problems(heads)
    if not wrong_sharing and settings.is_blockwise and adapter is not None:
        wrong_sharing = _depth_problems(settings, adapter)
    if not problems and not wrong_sharing:
        problems += worker_problems(settings.device, workers_here(settings))
    return [*problems, *wrong_sharing, *hardware_problems(settings.hardware)]


def _depth_problems(settings: EngineSettings, adapter: ModelAdapter) -> list[str]:
    try:
        adapter.layer_split().ranges(settings.num_denoisers)
    except InvalidRequestError as error:
        return list(error.problems)
    return []


def strategy_problems(settings: EngineSettings) -> list[str]:
    """What is wrong with who does what."""
    problems = [
        f"{name}={value!r} is unknown; use {', '.join(words)}"
        for name, value, words in (
            ("strategy", settings.strategy, [*Strategy]),
            ("aco", settings.aco, [*AcoMode]),
            ("decode", settings.decode, [*DecodeMode]),
            ("encode_on", settings.encode_on or "denoise", ["denoise", "decode"]),
        )
        if value not in words
    ]
    if problems:
        return problems
    if settings.is_blockwise:
        return _stage_problems(settings)
    return _count_problems(settings) + _combination_problems(settings)


def _stage_problems(settings: EngineSettings) -> list[str]:
    """What is wrong with the stages and blocks of dualparal."""
    stages, decode, workers = settings.denoise_workers, settings.decode_workers, settings.num_workers
    problems = degree_problems(Wanted(), workers)
    problems += [
        f"{name} needs another strategy than dualparal"
        for name, is_given in (
            ("offload", settings.offload),
            ("aco='on'", settings.aco == AcoMode.ON),
            ("decode='serial'", settings.decode != DecodeMode.SPREAD),
            *((name, degree != 1) for name, degree in settings.wanted.given.items()),
        )
        if is_given
    ]
    if decode not in (None, 1):
        problems.append(f"decode_workers={decode!r}: in dualparal one worker decodes; use 1, or leave it out")
    elif not problems and (stages or 0) + (decode or 0) != workers:
        problems.append(
            f"denoise_workers={stages}{'' if decode is None else ' and decode_workers=1'} do not make {workers} workers"
        )
    if settings.context_storage not in [*Storage]:
        problems.append(f"context_storage={settings.context_storage!r} is unknown; use {', '.join(Storage)}")
    return [*problems, *_block_plan_problems(settings)]


def _block_plan_problems(settings: EngineSettings) -> list[str]:
    plan = BlockPlan(
        latents=None,
        block_latents=settings.block_size,
        context_latents=settings.context_latents,
        num_steps=1,
        prefix=settings.prefix,  # type: ignore[arg-type]
        compat=settings.dualparal_compat,
    )
    return plan.problems()


def _count_problems(settings: EngineSettings) -> list[str]:
    denoise, decode, workers = settings.denoise_workers, settings.decode_workers, settings.num_workers
    given = {"denoise_workers": denoise, "decode_workers": decode}
    problems = [
        f"{name}={value!r} must be a whole number of at least 1"
        for name, value in given.items()
        if value is not None and (_whole(value) is None or value < 1)
    ]
    if problems or settings.strategy != Strategy.DISAGGREGATED:
        return problems
    if problems := degree_problems(Wanted(), workers):
        return problems
    if workers < 2:
        return [f"disaggregated needs at least 2 workers, one to denoise and one to decode; num_workers={workers}"]
    if denoise is not None and decode is not None:
        sums = f"denoise_workers={denoise} and decode_workers={decode} make {denoise + decode}, not {workers} workers"
        return [sums] if denoise + decode != workers else []
    return [
        f"{name}={value} leaves none of {workers} workers to {others}"
        for (name, value), others in zip(given.items(), ("decode", "denoise"), strict=True)
        if value is not None and value >= workers
    ]


def _combination_problems(settings: EngineSettings) -> list[str]:
    """Settings that have no meaning together: they are refused rather than ignored."""
    problems = []
    if settings.strategy == Strategy.COLOCATED:
        problems += [f"{name} needs strategy disaggregated" for name in settings._for_two_groups]
    if settings.strategy == Strategy.DISAGGREGATED:
        if settings.offload:
            problems.append("offload needs strategy colocated: disaggregated workers hold only what they need")
        if settings.decode != DecodeMode.SPREAD:
            problems.append("decode='serial' needs strategy colocated")
        if settings.aco == AcoMode.ON and (_whole(settings.ring_degree) or 1) > 1:
            problems.append(f"aco='on' needs ring_degree=1, not {settings.ring_degree}: nobody can help a ring")
    return problems


def setting_notes(settings: EngineSettings) -> list[str]:
    """What will work but may disappoint. Imports torch."""
    num_workers, cores = workers_here(settings), usable_cores()
    if num_workers <= cores or resolve_device(settings.device) != "cpu":
        return []
    counted = "1 core" if cores == 1 else f"{cores} cores"
    return [f"{num_workers} workers share {counted}: they take turns, which is slower than fewer workers"]


def workers_here(settings: EngineSettings) -> int:
    """Workers on this machine: all of them, unless a launcher has started them on several."""
    launch = find_launch() if settings.num_workers > 1 else None
    if launch is None or launch.world_size != settings.num_workers:
        return settings.num_workers
    return launch.local_world_size


def open_adapter(settings: EngineSettings) -> ModelAdapter:
    """The model's adapter. Raises one InvalidRequestError with everything that is wrong with the settings."""
    try:
        adapter = open_model(settings.model)
    except InvalidRequestError as error:
        raise InvalidRequestError([*setting_problems(settings), *error.problems]) from error
    if problems := setting_problems(settings, adapter):
        raise InvalidRequestError(problems)
    return adapter
