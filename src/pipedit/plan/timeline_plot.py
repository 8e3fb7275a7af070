"""What all parts of a timeline picture agree on: its columns, its time scale and its colours."""

import dataclasses
import functools
from collections.abc import Iterable

from pipedit.core.spans import Span
from pipedit.plan.picture import mix
from pipedit.plan.timeline import Timeline

WIDTH, MARGIN = 1200.0, 28.0
_LABELS, _BUSY = 136.0, 58.0  # columns left and right of the plot
LEFT, RIGHT = MARGIN + _LABELS, WIDTH - MARGIN - _BUSY
INK, SOFT_INK, PAPER, BAND, GRID, BRACKET = "#1e293b", "#64748b", "#ffffff", "#f3f5f8", "#dfe5ec", "#9fb0c3"
_KIND_COLOURS = {
    "load": "#94a3b8",
    "encode": "#a45fb8",
    "fetch": "#c9604a",
    "onload": "#b5873c",
    "step": "#3b78c9",
    "help": "#5aa9e6",
    "decode": "#ea9a35",
    "write": "#35a27b",
    "exchange": "#d1497a",
}
_MORE_COLOURS = ("#7c8f2e", "#5e7ce2", "#4c9a9a", "#8d6e63", "#b0479b", "#6b8fa3")
_TINTS = (0.0, 0.36, 0.18)  # how much white the boxes of neighbouring requests get, in turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """One timeline on the common scale. `duration_s` is what the full width stands for, `kinds` are the colours."""

    timeline: Timeline
    duration_s: float
    kinds: dict[str, str]

    def x(self, since_start_s: float) -> float:
        return LEFT + (since_start_s / self.duration_s if self.duration_s else 0.0) * (RIGHT - LEFT)

    def edges(self, span: Span) -> tuple[float, float]:
        start_s = self.timeline.start_s
        return self.x(span.start_s - start_s), self.x(span.end_s - start_s)

    @functools.cached_property
    def _request_numbers(self) -> dict[str, int]:
        return {request_id: number for number, request_id in enumerate(self.timeline.request_ids)}

    def fill(self, what: str, request_id: str) -> str:
        """The colour of the kind of work, lightened in turn so that neighbouring requests differ."""
        number = self._request_numbers.get(request_id, 0)
        return mix(self.kinds[what], PAPER, _TINTS[number % len(_TINTS)])


def kind_colours(timelines: Iterable[Timeline]) -> dict[str, str]:
    """A colour for every kind of work that occurs, in the order of the legend. Known kinds keep theirs always."""
    present = {span.what for timeline in timelines for span in timeline.spans}
    known = {what: colour for what, colour in _KIND_COLOURS.items() if what in present}
    others = sorted(present - known.keys())
    return known | {what: _MORE_COLOURS[number % len(_MORE_COLOURS)] for number, what in enumerate(others)}


def percent(share: float) -> str:
    return f"{share * 100:.0f} %"
