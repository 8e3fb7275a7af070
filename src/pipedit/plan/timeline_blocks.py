"""The blocks of a video on a timeline picture: a row for each, from noise to clean, and then decoded. Where they are
made one behind the other, that is a staircase."""

from collections.abc import Iterable, Iterator

from pipedit.core.spans import Span
from pipedit.plan.durations import DECODE, STEP
from pipedit.plan.picture import Rectangle, Shape, Text, mix
from pipedit.plan.timeline_lanes import Lanes
from pipedit.plan.timeline_plot import BAND, INK, LEFT, MARGIN, PAPER, RIGHT, SOFT_INK, Plot

_GAP, _HEIGHT, _HIGHEST_ROW = 14.0, 240.0, 12.0
_MOST_BLOCKS = 200  # more could not be told apart
_NARROW = 1.5  # pixels: narrower steps are drawn together
_PALE = 0.8  # how much white the first step has

_Times = dict[tuple[str, int], dict[int, tuple[float, float]]]  # request and block -> step -> from when to when


def lay_out_blocks(plot: Plot, top: float) -> Lanes:
    """Rows from `top` down; nothing where nothing was made in blocks, or in too many."""
    spans = [span for span in plot.timeline.spans if span.block is not None]
    count = 1 + max((span.block or 0 for span in spans), default=-1)
    if not 0 < count <= _MOST_BLOCKS:
        return Lanes(bands=(), marks=(), bottom=top)
    top += _GAP
    row = min(_HIGHEST_ROW, _HEIGHT / count)
    band = Rectangle(x=LEFT, y=top, width=RIGHT - LEFT, height=row * count, fill=BAND, radius=3)
    marks = [*_texts(count, top, row), *_steps(spans, plot, top, row), *_decodes(spans, plot, top, row)]
    return Lanes(bands=(band,), marks=tuple(marks), bottom=top + row * count)


def _texts(count: int, top: float, row: float) -> Iterator[Shape]:
    middle = top + row * count / 2
    yield Text(x=MARGIN, y=middle + 1, text="blocks", size=13, fill=INK, bold=True)
    yield Text(x=MARGIN, y=middle + 15, text="noise to clean", size=11, fill=SOFT_INK)
    if count > 1 and row * count > 40:
        yield Text(x=LEFT - 10, y=top + 9, text="0", size=10, fill=SOFT_INK, anchor="end")
        yield Text(x=LEFT - 10, y=top + row * count - 1, text=str(count - 1), size=10, fill=SOFT_INK, anchor="end")


def _steps(spans: Iterable[Span], plot: Plot, top: float, row: float) -> Iterator[Shape]:
    """Each step lasts until the block's next one begins, the last one until it is through all stages."""
    found = _step_times(spans)
    last = max((step for steps in found.values() for step in steps), default=0)
    for (request_id, block), steps in found.items():
        begins = [(plot.x(start_s - plot.timeline.start_s), step) for step, (start_s, _) in sorted(steps.items())]
        end = plot.x(max(end_s for _, end_s in steps.values()) - plot.timeline.start_s)
        left, step = begins[0]
        for right, next_step in [*begins[1:], (end, last)]:
            if right - left < _NARROW and right < end:
                continue
            pale = _PALE * (1 - step / last) if last else 0.0
            fill = mix(plot.fill(STEP, request_id), PAPER, pale)
            yield _box(left, right, block, top, row, fill, f"block {block} · step {step}")
            left, step = right, next_step


def _step_times(spans: Iterable[Span]) -> _Times:
    """On all stages together."""
    found: _Times = {}
    for span in spans:
        if span.what == STEP and span.block is not None and span.index is not None:
            steps = found.setdefault((span.request_id, span.block), {})
            start_s, end_s = steps.get(span.index, (span.start_s, span.end_s))
            steps[span.index] = min(start_s, span.start_s), max(end_s, span.end_s)
    return found


def _decodes(spans: Iterable[Span], plot: Plot, top: float, row: float) -> Iterator[Shape]:
    for span in spans:
        if span.what == DECODE and span.block is not None:
            (left, right), fill = plot.edges(span), plot.fill(DECODE, span.request_id)
            yield _box(left, right, span.block, top, row, fill, f"block {span.block} · decode")


def _box(left: float, right: float, block: int, top: float, row: float, fill: str, hint: str) -> Rectangle:
    seam = min(1.0, row / 4)
    return Rectangle(
        x=left, y=top + block * row + seam / 2, width=max(right - left, 0.8), height=row - seam, fill=fill, hint=hint
    )
