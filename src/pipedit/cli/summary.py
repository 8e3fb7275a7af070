"""What is told at the end: time per stage of each video, and what to try next. For people, on stderr."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipedit.cli.render import STAGES, Result
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Role
from pipedit.core.spans import Span
from pipedit.core.units import format_bytes, format_seconds
from pipedit.engine.settings import DecodeMode, EngineSettings, Strategy
from pipedit.plan.aco_gate import AcoMode

_NOT_ALWAYS = ("fetch", "onload", "save")
_TRY_NEXT = (
    'pipedit generate "a blue square grows on a white background" --num-frames 49 --trace trace.json',
    "pipedit models   # the large models that the same command runs",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """What is told of them: who did what (`division`, "" where all did everything), who shared the steps, and how much
    memory they held. `is_blockwise`: stages of a video overlap, and its steps are those of many blocks."""

    division: str = ""
    sharers: str = "workers"
    memory: str = ""
    is_blockwise: bool = False


def summarize(results: Sequence[Result], *, load_s: float, workers: Workers) -> RenderableType:
    """One video: a row for each stage. Several: a row for each video."""
    divided = [Text(workers.division)] if workers.division else []
    told = [*divided, *_sharing(results, workers.sharers)]
    held = [Text(workers.memory, style="dim")] if workers.memory else []
    if len(results) == 1:
        return Group(_facts(results[0]), *told, _stage_rows(results[0], load_s, workers.is_blockwise), *held)
    loaded = Text(f"weights loaded in {format_seconds(load_s)}", style="dim") if load_s else Text()
    return Group(_video_rows(results), *told, loaded, *held)


def describe_workers(settings: EngineSettings, division: str, spans: Iterable[Span], memory: str) -> Workers:
    """`settings` leave nothing open, and `division` says in words what they mean; `spans` are those of the run."""
    if settings.strategy == Strategy.DISAGGREGATED:
        told = f"{settings.num_workers} workers: {division}"
        told += "" if settings.aco == AcoMode.OFF else f"; idle decode workers {_help(spans)}"
        return Workers(division=told, sharers="denoise workers", memory=memory)
    if settings.is_blockwise:
        context = settings.context_latents
        seen = f"{context} of each neighbour" if context else "none of their neighbours"
        blocks = f"blocks of {settings.block_size} latent frames that see {seen} ({settings.prefix})"
        return Workers(division=f"dualparal, an approximation: {division}; {blocks}", memory=memory, is_blockwise=True)
    is_plain = settings.decode == DecodeMode.SPREAD and not settings.offload
    return Workers(division="" if is_plain else division, memory=memory)


def _help(spans: Iterable[Span]) -> str:
    """ "helped with 5 of 36 steps"."""
    units = [(span.what, span.request_id, span.index) for span in spans]
    steps, helped = ({unit for unit in units if unit[0] == what} for what in ("step", "help"))
    return f"helped with {len(helped)} of {len(steps)} steps"


def placement_as_json(settings: EngineSettings) -> dict[str, Any]:
    """Settings that leave nothing open: who does what."""
    names = ["num_workers", "strategy"]
    if settings.is_blockwise:
        names += ["denoise_workers", "decode_workers", "block_size", "context_latents", "prefix"]
        names += ["context_storage", "dualparal_compat"]
        return {name: getattr(settings, name) for name in names}
    if settings.strategy == Strategy.DISAGGREGATED:
        names += ["denoise_workers", "decode_workers", "encode_on", "aco"]
    else:
        names += ["decode", "offload"]
    return {name: getattr(settings, name) for name in names}


def peak_memory(peak_bytes: Mapping[int, int], roles: Callable[[int], tuple[Role, ...]]) -> str:
    """The most memory that a worker of each kind has held: "peak memory: 1.2 GB a denoiser; 0.4 GB an encoder and
    decoder". Empty where nobody measured."""
    kinds: dict[tuple[Role, ...], int] = {}
    for rank, held in sorted(peak_bytes.items()):
        kinds[roles(rank)] = max(held, kinds.get(roles(rank), 0))
    if not any(kinds.values()):
        return ""
    if len(kinds) == 1:
        return f"peak memory: {format_bytes(max(kinds.values()))} a worker"
    named = (f"{format_bytes(held)} {_article(_joined(kind))}" for kind, held in kinds.items())
    return f"peak memory: {'; '.join(named)}"


def _joined(names: Sequence[str]) -> str:
    """ "decoder", "encoder and decoder", "encoder, denoiser and decoder"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def try_next() -> RenderableType:
    first, second = _TRY_NEXT
    return Text.assemble(("try next: ", "bold cyan"), f"{first}\n          {second}")


def _facts(result: Result) -> Text:
    request = result.request
    assert request.fps is not None
    frames = f"{result.num_frames} frame{'' if result.num_frames == 1 else 's'}"
    length_s = result.num_frames / request.fps
    return Text(
        f"{frames} of {request.width}x{request.height} at {request.fps:g} fps, {length_s:.1f} s long, "
        f"{format_bytes(result.size_bytes)}, seed {request.seed}"
    )


def _sharing(results: Sequence[Result], sharers: str) -> list[Text]:
    """How workers shared each step, where there were several: "2 workers: cfg 1 x ring 1 x ulysses 2, PipeSP auto".
    Videos with and without guidance may differ."""
    configs = dict.fromkeys(result.parallel for result in results if result.parallel.world_size > 1)
    return [Text(f"{config.world_size} {sharers}: {config.describe()}{_pipelining(config)}") for config in configs]


def _pipelining(config: ParallelConfig) -> str:
    if config.ulysses_degree == 1:
        return ""
    return ", PipeSP off" if config.pipesp_chunks == 1 else f", PipeSP {config.pipesp_chunks}"


def _stage_rows(result: Result, load_s: float, is_blockwise: bool) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=True)
    for _ in range(3):
        table.add_column(justify="right" if table.columns else "left")
    table.add_column(style="dim")
    rows = {"load": load_s, **result.seconds} if load_s else result.seconds
    total_s = sum(rows.values())
    counts = {} if is_blockwise else {"denoise": result.request.num_inference_steps or 1}
    for stage in ("load", *STAGES):
        if stage in rows:
            each = f"{counts[stage]} x {format_seconds(rows[stage] / counts[stage])}" if stage in counts else ""
            table.add_row(stage, format_seconds(rows[stage]), _percent(rows[stage], total_s), each)
    table.add_row("total", format_seconds(total_s), "", "", style="bold")
    return table


def _video_rows(results: Sequence[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("video", overflow="fold")
    stages = _worth_a_column(results)
    for name in (*stages, "total", "size", "seed"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        times = [format_seconds(result.seconds.get(stage, 0.0)) for stage in stages]
        total, size = format_seconds(result.total_s), format_bytes(result.size_bytes)
        table.add_row(result.job.output, *times, total, size, str(result.request.seed))
    return table


def _worth_a_column(results: Sequence[Result]) -> list[str]:
    """The stages that every video has, and of the others those that take at least a hundredth of the time."""
    total_s = sum(result.total_s for result in results)
    spent_s = {stage: sum(result.seconds.get(stage, 0.0) for result in results) for stage in STAGES}
    return [stage for stage in STAGES if stage not in _NOT_ALWAYS or spent_s[stage] >= total_s / 100 > 0]


def _percent(part: float, whole: float) -> str:
    return f"{part / whole * 100:.0f} %" if whole else ""
