"""`pipedit trace`: a timeline as a picture and as numbers; how far a predicted one is from the measured one."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from pipedit.cli.console import Session, session_of
from pipedit.cli.options import JsonFlag, default, option
from pipedit.core.errors import InvalidRequestError
from pipedit.core.units import format_bytes, format_seconds
from pipedit.plan.comparison import Comparison, KindOfWork, compare, of_requests
from pipedit.plan.timeline import Stage, Timeline, stage_table
from pipedit.plan.timeline_layout import Panel
from pipedit.plan.trace_file import read_trace


def trace(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", hidden=True)],
    output: Annotated[
        str | None,
        option(
            "--output",
            "-o",
            "--picture",
            metavar="PICTURE",
            help=f"Where to draw it, .svg or .png. {default('FILE with the ending .svg; with --compare, nowhere')}",
        ),
    ] = None,
    predicted: Annotated[
        str | None,
        option(
            "--compare",
            metavar="PREDICTED",
            help="A trace of pipedit simulate: print how far it is from FILE, by kind of work, and draw it above.",
        ),
    ] = None,
    as_json: JsonFlag = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.", show_default=False, metavar="")
    ] = (False),
) -> None:
    """Draw the timeline of a run as a picture and print the time of each stage.

    FILE is what pipedit generate --trace or pipedit simulate --trace wrote. A picture that exists is replaced.
    """
    session = session_of(context)
    session.terminal.quiet = quiet
    if not Path(file).name:
        raise InvalidRequestError([f'"{file}" names no file; give the one that pipedit generate --trace wrote'])
    if predicted is not None:
        _compare(session, predicted, file, output, as_json=as_json)
        return
    picture = output if output is not None else str(Path(file).with_suffix(".svg"))
    (timeline,) = _read(file, picture=picture)
    _draw(session, [Panel(timeline=timeline)], picture)
    session.report.update(_report(timeline), picture=picture)
    if not as_json:
        session.terminal.table(_table(timeline))


def _read(*files: str, picture: str | None) -> list[Timeline]:
    """Raises InvalidRequestError with what is wrong with any of the files, and with the picture's name."""
    from pipedit.media import check_picture

    timelines: list[Timeline] = []
    problems: list[str] = []
    for file in files:
        try:
            timelines.append(read_trace(file))
        except InvalidRequestError as error:
            problems += error.problems
    problems += [] if picture is None else check_picture(picture)
    if problems:
        raise InvalidRequestError(problems)
    return timelines


def _draw(session: Session, panels: list[Panel], picture: str) -> None:
    from pipedit.media import save_picture

    save_picture(panels, picture)
    session.terminal.say(f"drawn in {picture}")


# -- predicted and measured ---------------------------------------------------------------------------------------


def _compare(session: Session, predicted: str, measured: str, picture: str | None, *, as_json: bool) -> None:
    timelines = dict(zip(("predicted", "measured"), _read(predicted, measured, picture=picture), strict=True))
    comparison = compare(timelines["predicted"], timelines["measured"])
    session.report.update(comparison.as_json(), picture=picture)
    if not as_json:
        session.terminal.table(_comparison_table(comparison))
    if picture is not None:
        panels = [Panel(timeline=of_requests(timeline), title=title) for title, timeline in timelines.items()]
        _draw(session, panels, picture)


def _comparison_table(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("predicted", "measured", "error", "predicted", "measured"):
        table.add_column(name, justify="right", no_wrap=True)
    predicted, measured = comparison.predicted, comparison.measured
    for what in comparison.kinds:
        sides = (predicted.kinds.get(what), measured.kinds.get(what))
        table.add_row(what, *map(_each, sides), signed_percent(comparison.error(what)), *map(_count, sides))
    makespans = (format_seconds(predicted.makespan_s), format_seconds(measured.makespan_s))
    table.add_row("makespan", *makespans, signed_percent(comparison.makespan_error))
    for group in comparison.groups:
        name = "ranks idle" if group == "all" else f"{group} ranks idle"
        idle = [_percent(side.idle.get(group)) for side in (predicted, measured)]
        table.add_row(name, *idle, _points(comparison.idle_error(group)))
    return table


def _each(kind: KindOfWork | None) -> str:
    return "" if kind is None else format_seconds(kind.each_s)


def _count(kind: KindOfWork | None) -> str:
    return "" if kind is None else f"{kind.count} × = {format_seconds(kind.total_s)}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}".replace("%", " %")


def signed_percent(share: float | None) -> str:
    return "" if share is None else f"{share:+.1%}".replace("%", " %")


def _points(share: float | None) -> str:
    return "" if share is None else f"{share * 100:+.1f} points"


# -- one timeline -------------------------------------------------------------------------------------------------


def _report(timeline: Timeline) -> dict[str, Any]:
    occupancy = [
        {"rank": rank.ranks[0], "busy_s": rank.busy_s, "idle_s": rank.idle_s} for rank in timeline.rank_occupancy()
    ]
    return {
        "makespan_s": timeline.makespan_s,
        "stages": [dataclasses.asdict(stage) for stage in stage_table(timeline)],
        "ranks": occupancy,
        "metadata": dict(timeline.metadata),
    }


def _table(timeline: Timeline) -> Table:
    stages = stage_table(timeline)
    moved = any(stage.payload_bytes for stage in stages)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("role", footer="from first start to last end")
    table.add_column("work")
    for name in ("count", "total", "mean", "min", "max", "share"):
        footer = format_seconds(timeline.makespan_s) if name == "total" else ""
        table.add_column(name, justify="right", no_wrap=True, footer=footer)
    if moved:
        table.add_column("moved", justify="right", no_wrap=True)
    for stage in stages:
        table.add_row(*_cells(stage), *([format_bytes(stage.payload_bytes)] if moved else []))
    return table


def _cells(stage: Stage) -> list[str]:
    times = [format_seconds(value) for value in (stage.total_s, stage.mean_s, stage.min_s, stage.max_s)]
    return [stage.role, stage.what, str(stage.count), *times, f"{stage.share * 100:.0f} %"]
