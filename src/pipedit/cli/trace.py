"""`pipedit trace`: a timeline as a picture and as numbers."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from pipedit.cli.console import session_of
from pipedit.cli.options import JsonFlag, default, option
from pipedit.core.errors import InvalidRequestError
from pipedit.core.units import format_bytes, format_seconds
from pipedit.plan.timeline import Stage, Timeline, stage_table
from pipedit.plan.trace_file import read_trace


def trace(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", hidden=True)],
    output: Annotated[
        str | None,
        option(
            "--output",
            "-o",
            metavar="PICTURE",
            help=f"Where to draw it, .svg or .png. {default('FILE with the ending .svg')}",
        ),
    ] = None,
    as_json: JsonFlag = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.", show_default=False, metavar="")
    ] = (False),
) -> None:
    """Draw the timeline of a run as a picture and print the time of each stage.

    FILE is what pipedit generate --trace wrote. A picture that exists is replaced.
    """
    session = session_of(context)
    session.terminal.quiet = quiet
    if not Path(file).name:
        raise InvalidRequestError([f'"{file}" names no file; give the one that pipedit generate --trace wrote'])
    picture = output if output is not None else str(Path(file).with_suffix(".svg"))
    timeline = _draw(file, picture)
    session.report.update(_report(timeline), picture=picture)
    if not as_json:
        session.terminal.table(_table(timeline))
    session.terminal.say(f"drawn in {picture}")


def _draw(file: str, picture: str) -> Timeline:
    """Reads the trace and draws it. Raises InvalidRequestError with what is wrong with either file."""
    from pipedit.media import check_picture, save_picture

    problems = check_picture(picture)
    try:
        timeline = read_trace(file)
    except InvalidRequestError as error:
        raise InvalidRequestError([*error.problems, *problems]) from error
    if problems:
        raise InvalidRequestError(problems)
    save_picture(timeline, picture)
    return timeline


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
