"""The lanes of a timeline picture: what each rank did in each role, as boxes."""

import dataclasses
from collections.abc import Iterator

from pipedit.core.spans import Span
from pipedit.core.units import format_bytes, format_seconds
from pipedit.plan.merging import Box, merge_narrow
from pipedit.plan.picture import Line, Rectangle, Shape, Text, is_dark, shorten, text_width
from pipedit.plan.timeline import Lane, covered_s
from pipedit.plan.timeline_plot import BAND, BRACKET, INK, LEFT, MARGIN, PAPER, RIGHT, SOFT_INK, WIDTH, Plot, percent

_ROW, _STRIP, _LANE_GAP, _RANK_GAP = 24.0, 15.0, 5.0, 12.0  # heights
_LABEL_SIZE, _NAME_SIZE = 11.0, 10.0
_RANK_LABEL = 58.0  # what "rank 12" needs

WorkBox = Box[tuple[str, str]]  # keyed by kind of work and request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lanes:
    """Background and foreground apart, because the grid lies between them."""

    bands: tuple[Shape, ...]
    marks: tuple[Shape, ...]
    bottom: float


def lay_out_lanes(plot: Plot, top: float) -> Lanes:
    """Lanes from `top` down, ranks a little further apart than the roles of one rank."""
    bands: list[Shape] = []
    marks: list[Shape] = []
    strip = _STRIP if len(plot.timeline.request_ids) > 1 else 0.0
    bottom, previous = top, None
    for lane in plot.timeline.lanes:
        is_first = lane.rank != previous
        gap = 0.0 if previous is None else (_RANK_GAP if is_first else _LANE_GAP)
        boxes_top, height = bottom + gap + strip, _ROW * len(lane.rows)
        bands.append(Rectangle(x=LEFT, y=boxes_top, width=RIGHT - LEFT, height=height, fill=BAND, radius=3))
        marks += _texts(lane, plot, boxes_top + height / 2, is_first=is_first)
        if strip:
            marks += _request_strip(lane, plot, boxes_top)
        for number, row in enumerate(lane.rows):
            marks += _row(row, plot, boxes_top + number * _ROW)
        bottom, previous = boxes_top + height, lane.rank
    return Lanes(bands=tuple(bands), marks=tuple(marks), bottom=bottom)


def _texts(lane: Lane, plot: Plot, middle: float, *, is_first: bool) -> Iterator[Shape]:
    """Rank and role on the left, how busy the rank was in this role on the right."""
    has_rank = lane.rank >= 0  # a negative rank is the process that drives the workers: its role says enough
    if is_first and has_rank:
        yield Text(x=MARGIN, y=middle + 4.5, text=f"rank {lane.rank}", size=13, fill=INK, bold=True)
    role = shorten(lane.role, 12, LEFT - MARGIN - 10 - (_RANK_LABEL if has_rank else 0))
    yield Text(x=LEFT - 10, y=middle + 4, text=role, size=12, fill=SOFT_INK, anchor="end")
    makespan_s = plot.timeline.makespan_s
    share = covered_s(lane.spans) / makespan_s if makespan_s else 0.0
    yield Text(x=WIDTH - MARGIN, y=middle + 4, text=percent(share), size=12, fill=INK, anchor="end")


def _request_strip(lane: Lane, plot: Plot, bottom: float) -> Iterator[Shape]:
    """A bracket with the request's name above each stretch of work for it."""
    for box in merge_narrow(lane.spans, plot.edges, lambda span: span.request_id, join_same=True):
        if not box.key:
            continue
        right = max(box.right - 1.5, box.left + 1)
        yield Line(x1=box.left, y1=bottom - 1.5, x2=right, y2=bottom - 1.5, stroke=BRACKET, width=1.5)
        names = (box.key, box.key[:8] + "…")
        name = next((name for name in names if text_width(name, _NAME_SIZE) <= box.width), "")
        if name:
            yield Text(x=box.left, y=bottom - 5, text=name, size=_NAME_SIZE, fill=SOFT_INK)


def _row(row: tuple[Span, ...], plot: Plot, top: float) -> Iterator[Shape]:
    for box in merge_narrow(row, plot.edges, lambda span: (span.what, span.request_id)):
        fill = plot.fill(*box.key)
        seam = 1.0 if box.width > 4 else 0.0  # between neighbours that are wide enough to show it
        width = max(box.width - seam, 0.8)
        yield Rectangle(
            x=box.left,
            y=top + 1,
            width=width,
            height=_ROW - 2,
            fill=fill,
            radius=2.0 if width > 6 else 0.0,
            hint=_hint(box, plot.timeline.start_s),
        )
        label = _label(box, width - 6)
        if label:
            ink = PAPER if is_dark(fill) else INK
            middle, base = box.left + width / 2, top + _ROW / 2 + 4
            yield Text(x=middle, y=base, text=label, size=_LABEL_SIZE, fill=ink, anchor="middle")


def _label(box: WorkBox, room: float) -> str:
    """The longest of "step 3", "3" and nothing that fits; "40 x step" for what was merged."""
    what, index, count = box.key[0], box.spans[0].index, len(box.spans)
    if count == 1:
        texts = [what] if index is None else [f"{what} {index}", str(index)]
    else:
        texts = [f"{count} × {what}"] if all(span.what == what for span in box.spans) else []
    return next((text for text in texts if text_width(text, _LABEL_SIZE) <= room), "")


def _hint(box: WorkBox, origin_s: float) -> str:
    first, count = box.spans[0], len(box.spans)
    name = first.what if first.index is None else f"{first.what} {first.index}"
    start_s, end_s = first.start_s - origin_s, max(span.end_s for span in box.spans) - origin_s
    payload_bytes = sum(span.payload_bytes for span in box.spans)
    parts = (
        f"{count} short spans, mostly {box.key[0]}" if count > 1 else name,
        "" if first.block is None or count > 1 else f"block {first.block}",
        box.key[1],
        f"{format_seconds(end_s - start_s)}, from {format_seconds(start_s)} to {format_seconds(end_s)}",
        format_bytes(payload_bytes) if payload_bytes else "",
    )
    return " · ".join(part for part in parts if part)
