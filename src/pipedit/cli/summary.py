"""What is told at the end: time per stage of each video, and what to try next. For people, on stderr."""

from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipedit.cli.render import STAGES, Result
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Role
from pipedit.core.units import format_bytes, format_seconds

_TRY_NEXT = (
    'pipedit generate "a blue square grows on a white background" --num-frames 49 --trace trace.json',
    "pipedit models   # the large models that the same command runs",
)


def summarize(results: Sequence[Result], *, load_s: float, memory: str = "") -> RenderableType:
    """One video: a row for each stage. Several: a row for each video. `memory`: see `peak_memory`."""
    held = [Text(memory, style="dim")] if memory else []
    if len(results) == 1:
        return Group(_facts(results[0]), *_sharing(results), _stage_rows(results[0], load_s), *held)
    loaded = Text(f"weights loaded in {format_seconds(load_s)}", style="dim") if load_s else Text()
    return Group(_video_rows(results), *_sharing(results), loaded, *held)


def peak_memory(peak_bytes: Mapping[int, int], roles: Callable[[int], tuple[Role, ...]]) -> str:
    """The most memory that a worker of each kind has held: "peak memory: 1.2 GB a denoiser, 0.4 GB an encoder and
    decoder". Empty where nobody measured."""
    kinds: dict[tuple[Role, ...], int] = {}
    for rank, held in sorted(peak_bytes.items()):
        kinds[roles(rank)] = max(held, kinds.get(roles(rank), 0))
    if not any(kinds.values()):
        return ""
    if len(kinds) == 1:
        return f"peak memory: {format_bytes(max(kinds.values()))} a worker"
    named = (f"{format_bytes(held)} {_article(' and '.join(kind))}" for kind, held in kinds.items())
    return f"peak memory: {', '.join(named)}"


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


def _sharing(results: Sequence[Result]) -> list[Text]:
    """How the workers shared the videos, where there were several: "2 workers: cfg 1 x ring 1 x ulysses 2, PipeSP
    auto". Videos with and without guidance may differ."""
    configs = dict.fromkeys(result.parallel for result in results if result.parallel.world_size > 1)
    return [Text(f"{config.world_size} workers: {config.describe()}{_pipelining(config)}") for config in configs]


def _pipelining(config: ParallelConfig) -> str:
    if config.ulysses_degree == 1:
        return ""
    return ", PipeSP off" if config.pipesp_chunks == 1 else f", PipeSP {config.pipesp_chunks}"


def _stage_rows(result: Result, load_s: float) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=True)
    for _ in range(3):
        table.add_column(justify="right" if table.columns else "left")
    table.add_column(style="dim")
    rows = {"load": load_s, **result.seconds} if load_s else result.seconds
    total_s = sum(rows.values())
    counts = {"denoise": result.request.num_inference_steps or 1}
    for stage in ("load", *STAGES):
        if stage in rows:
            each = f"{counts[stage]} x {format_seconds(rows[stage] / counts[stage])}" if stage in counts else ""
            table.add_row(stage, format_seconds(rows[stage]), _percent(rows[stage], total_s), each)
    table.add_row("total", format_seconds(total_s), "", "", style="bold")
    return table


def _video_rows(results: Sequence[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("video", overflow="fold")
    for name in (*STAGES, "total", "size", "seed"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        times = [format_seconds(result.seconds.get(stage, 0.0)) for stage in STAGES]
        total, size = format_seconds(result.total_s), format_bytes(result.size_bytes)
        table.add_row(result.job.output, *times, total, size, str(result.request.seed))
    return table


def _percent(part: float, whole: float) -> str:
    return f"{part / whole * 100:.0f} %" if whole else ""
