"""The one reader of spans: numbers, lanes and tables from what workers or the simulator recorded.

Pictures are made elsewhere (`timeline_layout`), files too (`trace_file`). Knows no clock: spans say it all.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from pipedit.core.placement import Role
from pipedit.core.spans import Span

_ROLE_ORDER = {role.value: position for position, role in enumerate(Role)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Occupancy:
    """How busy some ranks were, with everything or in one role. Overlapping spans on a rank count once."""

    ranks: tuple[int, ...]
    role: str | None  # None: all roles together
    busy_s: float  # summed over the ranks
    available_s: float  # the makespan times the number of ranks

    @property
    def idle_s(self) -> float:
        return self.available_s - self.busy_s

    @property
    def busy_share(self) -> float:
        return self.busy_s / self.available_s if self.available_s else 0.0

    @property
    def idle_share(self) -> float:
        return 1.0 - self.busy_share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the stage table: all spans of one kind of work in one role, over all ranks.

    `share` is the part of the makespan in which at least one rank did this work: parallel ranks do not count twice.
    """

    role: str
    what: str
    count: int
    total_s: float
    mean_s: float
    min_s: float
    max_s: float
    share: float
    payload_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lane:
    """What one rank did in one role, in rows without overlap: work that ran at the same time lies in several rows."""

    rank: int
    role: str
    rows: tuple[tuple[Span, ...], ...]

    @property
    def spans(self) -> tuple[Span, ...]:
        return tuple(sorted((span for row in self.rows for span in row), key=_start))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """Spans of one run, in the order given, and what is known of the run (JSON values, such as model and strategy)."""

    spans: tuple[Span, ...]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        assert all(span.start_s <= span.end_s for span in self.spans), "a span ends before it starts"

    @functools.cached_property
    def start_s(self) -> float:
        return min((span.start_s for span in self.spans), default=0.0)

    @functools.cached_property
    def end_s(self) -> float:
        return max((span.end_s for span in self.spans), default=0.0)

    @property
    def makespan_s(self) -> float:
        """From the first start to the last end."""
        return self.end_s - self.start_s

    @functools.cached_property
    def request_ids(self) -> tuple[str, ...]:
        """Requests in order of their first span. Work for no request (an empty id, such as loading) is left out."""
        ordered = sorted(self.spans, key=_start)
        return tuple(dict.fromkeys(span.request_id for span in ordered if span.request_id))

    @functools.cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({span.rank for span in self.spans}, key=_rank_key))

    @functools.cached_property
    def lanes(self) -> tuple[Lane, ...]:
        """Ordered by rank, then by role: encoder, denoiser, decoder, others by name."""
        groups: dict[tuple[int, str], list[Span]] = defaultdict(list)
        for span in self.spans:
            groups[span.rank, span.role].append(span)
        keys = sorted(groups, key=lambda key: (_rank_key(key[0]), _role_key(key[1])))
        return tuple(Lane(rank=rank, role=role, rows=_rows(groups[rank, role])) for rank, role in keys)

    def rank_occupancy(self) -> tuple[Occupancy, ...]:
        """How busy each rank was, in all its roles together."""
        return tuple(self._occupancy((rank,), None) for rank in self.ranks)

    def role_occupancy(self) -> tuple[Occupancy, ...]:
        """How busy the ranks of each role were in that role."""
        roles = sorted({span.role for span in self.spans}, key=_role_key)
        return tuple(self._occupancy(self._ranks_of(role), role) for role in roles)

    def _ranks_of(self, role: str) -> tuple[int, ...]:
        return tuple(sorted({span.rank for span in self.spans if span.role == role}, key=_rank_key))

    def _occupancy(self, ranks: tuple[int, ...], role: str | None) -> Occupancy:
        chosen = [span for span in self.spans if role is None or span.role == role]
        busy_s = sum(covered_s(span for span in chosen if span.rank == rank) for rank in ranks)
        return Occupancy(ranks=ranks, role=role, busy_s=busy_s, available_s=self.makespan_s * len(ranks))


def covered_s(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of the spans was under way."""
    total, reached = 0.0, float("-inf")
    for span in sorted(spans, key=_start):
        total += max(0.0, span.end_s - max(span.start_s, reached))
        reached = max(reached, span.end_s)
    return total


def stage_table(timeline: Timeline) -> list[Stage]:
    """One row for each (role, what), by role and then by first start."""
    groups: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in sorted(timeline.spans, key=_start):
        groups[span.role, span.what].append(span)
    keys = sorted(groups, key=lambda key: _role_key(key[0]))  # stable: within a role, the order of first starts stays
    return [_stage(role, what, groups[role, what], timeline.makespan_s) for role, what in keys]


def _stage(role: str, what: str, spans: list[Span], makespan_s: float) -> Stage:
    durations_s = [span.duration_s for span in spans]
    total_s = sum(durations_s)
    return Stage(
        role=role,
        what=what,
        count=len(spans),
        total_s=total_s,
        mean_s=total_s / len(spans),
        min_s=min(durations_s),
        max_s=max(durations_s),
        share=covered_s(spans) / makespan_s if makespan_s else 0.0,
        payload_bytes=sum(span.payload_bytes for span in spans),
    )


def _rows(spans: list[Span]) -> tuple[tuple[Span, ...], ...]:
    """Packs spans into as few rows as possible so that none overlaps its neighbour: each takes the first free row."""
    rows: list[list[Span]] = []
    for span in sorted(spans, key=_start):
        free = (row for row in rows if row[-1].end_s <= span.start_s)
        row = next(free, None)
        if row is None:
            rows.append([span])
        else:
            row.append(span)
    return tuple(tuple(row) for row in rows)


def _start(span: Span) -> tuple[float, float]:
    """Sorts by start, and the longer of two that start together first, so that nested work lies below its parent."""
    return span.start_s, -span.end_s


def _rank_key(rank: int) -> tuple[bool, int]:
    """Workers first; a negative rank is the process that drives them."""
    return rank < 0, rank


def _role_key(role: str) -> tuple[int, str]:
    return _ROLE_ORDER.get(role, len(_ROLE_ORDER)), role
