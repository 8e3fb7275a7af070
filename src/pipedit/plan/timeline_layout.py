"""Where everything on a picture of timelines goes. Pure geometry: shapes out, no file format, no fonts measured.

Several timelines stand above each other on a common time scale, so that predicted and measured ones can be compared.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from pipedit.core.units import format_seconds
from pipedit.plan.picture import Line, Picture, Rectangle, Shape, Text, shorten, text_width
from pipedit.plan.time_axis import ticks
from pipedit.plan.timeline import Timeline
from pipedit.plan.timeline_blocks import lay_out_blocks
from pipedit.plan.timeline_lanes import lay_out_lanes
from pipedit.plan.timeline_plot import GRID, INK, LEFT, MARGIN, PAPER, SOFT_INK, WIDTH, Plot, kind_colours, percent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One timeline with its headings. What is left empty is taken from the timeline's metadata and numbers."""

    timeline: Timeline
    title: str = ""
    subtitle: str = ""


def lay_out(panels: Sequence[Panel]) -> Picture:
    """Stacks the panels. A colour means the same work everywhere, and a pixel the same time."""
    timelines = [panel.timeline for panel in panels]
    duration_s = max((timeline.makespan_s for timeline in timelines), default=0.0)
    kinds = kind_colours(timelines)
    shapes: list[Shape] = []
    bottom = MARGIN
    for number, panel in enumerate(panels):
        if number:
            bottom += 18
            shapes.append(Line(x1=MARGIN, y1=bottom, x2=WIDTH - MARGIN, y2=bottom, stroke=GRID))
            bottom += 18
        plot = Plot(timeline=panel.timeline, duration_s=duration_s, kinds=kinds)
        added, bottom = _panel(panel, plot, bottom)
        shapes += added
    height = bottom + MARGIN - 6
    paper = Rectangle(x=0, y=0, width=WIDTH, height=height, fill=PAPER, radius=10)
    title = "; ".join(_title(panel) for panel in panels)
    return Picture(width=WIDTH, height=height, title=title, shapes=(paper, *shapes))


def _panel(panel: Panel, plot: Plot, top: float) -> tuple[list[Shape], float]:
    """Headings, lanes, axis and legend from `top` down, and where they end."""
    heading, top = _heading(panel, top)
    if not plot.timeline.spans:
        text = Text(x=MARGIN, y=top + 14, text="no work was recorded", size=13, fill=SOFT_INK)
        return [*heading, text], top + 24
    lanes = lay_out_lanes(plot, top + 8)
    blocks = lay_out_blocks(plot, lanes.bottom)
    column = Text(x=WIDTH - MARGIN, y=top + 4, text="busy", size=11, fill=SOFT_INK, anchor="end")
    axis = _axis(plot, top + 8, blocks.bottom)
    legend, bottom = _legend(plot, blocks.bottom + 46)
    return [*heading, column, *lanes.bands, *blocks.bands, *axis, *lanes.marks, *blocks.marks, *legend], bottom


def _heading(panel: Panel, top: float) -> tuple[list[Shape], float]:
    width = WIDTH - 2 * MARGIN
    title = Text(x=MARGIN, y=top + 16, text=shorten(_title(panel), 19, width, bold=True), size=19, fill=INK, bold=True)
    subtitle = panel.subtitle or _summary(panel.timeline)
    if not subtitle:
        return [title], top + 36
    line = Text(x=MARGIN, y=top + 38, text=shorten(subtitle, 13, width), size=13, fill=SOFT_INK)
    return [title, line], top + 60


def _title(panel: Panel) -> str:
    return panel.title or str(panel.timeline.metadata.get("title", "")) or "Timeline"


def _summary(timeline: Timeline) -> str:
    if not timeline.spans:
        return ""
    workers = [occupancy for occupancy in timeline.rank_occupancy() if occupancy.ranks[0] >= 0]
    idle_s, available_s = sum(worker.idle_s for worker in workers), sum(worker.available_s for worker in workers)
    parts = (
        _count(len(timeline.request_ids), "request"),
        _count(len(workers), "worker"),
        format_seconds(timeline.makespan_s),
        f"{percent(idle_s / available_s)} idle" if available_s else "",
    )
    return " · ".join(part for part in parts if part)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}" if number else ""


def _axis(plot: Plot, top: float, bottom: float) -> Iterator[Shape]:
    for tick in ticks(plot.duration_s):
        x = plot.x(tick.at_s)
        yield Line(x1=x, y1=top, x2=x, y2=bottom + 6, stroke=GRID)
        yield Text(x=x, y=bottom + 20, text=tick.label, size=11, fill=SOFT_INK, anchor="middle")


def _legend(plot: Plot, top: float) -> tuple[list[Shape], float]:
    """One entry for each kind of work: how often, how long on average and in total. Wraps."""
    shapes: list[Shape] = []
    if sum(rank >= 0 for rank in plot.timeline.ranks) > 1:
        shapes.append(Text(x=LEFT - 10, y=top, text="sums over ranks", size=11, fill=SOFT_INK, anchor="end"))
    x, y = LEFT, top
    for what, colour in plot.kinds.items():
        durations_s = [span.duration_s for span in plot.timeline.spans if span.what == what]
        if not durations_s:
            continue
        count, total_s = len(durations_s), sum(durations_s)
        each = f"{count} × {format_seconds(total_s / count)} = " if count > 1 else ""
        numbers = each + format_seconds(total_s)
        numbers_at = 18 + text_width(what, 12, bold=True) + 8
        width = numbers_at + text_width(numbers, 12) + 24
        if x > LEFT and x + width > WIDTH - MARGIN:
            x, y = LEFT, y + 20
        shapes.append(Rectangle(x=x, y=y - 10, width=12, height=12, fill=colour, radius=3))
        shapes.append(Text(x=x + 18, y=y, text=what, size=12, fill=INK, bold=True))
        shapes.append(Text(x=x + numbers_at, y=y, text=numbers, size=12, fill=SOFT_INK))
        x += width
    return shapes, y + 8
