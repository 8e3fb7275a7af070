"""Predicted against measured: the same run from two timelines, subtracted. Loading and writing are left out."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from pipedit.core.placement import Role
from pipedit.core.spans import Span
from pipedit.plan.durations import DECODE, ENCODE, FETCH, HELP, ONLOAD, STEP
from pipedit.plan.timeline import Timeline, covered_s

HELPED_STEP = "step with help"
_ORDER = (ENCODE, FETCH, ONLOAD, STEP, HELPED_STEP, HELP, DECODE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindOfWork:
    """Spans of one kind on all ranks. `each_s` is their mean."""

    count: int
    each_s: float
    total_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What is compared. `idle`: the share of the makespan that a group's ranks had nothing to do, by group."""

    makespan_s: float
    kinds: Mapping[str, KindOfWork]
    idle: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """`predicted` and `measured` of one run."""

    predicted: Summary
    measured: Summary

    @property
    def makespan_error(self) -> float | None:
        return relative_error(self.predicted.makespan_s, self.measured.makespan_s)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of work of either, in the order of a request's life."""
        found = self.predicted.kinds.keys() | self.measured.kinds.keys()
        return tuple(sorted(found, key=lambda what: (_ORDER.index(what) if what in _ORDER else len(_ORDER), what)))

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.predicted.idle, *self.measured.idle]))

    def error(self, what: str) -> float | None:
        """Of the mean duration of a kind of work; None where one side has none of it."""
        predicted, measured = self.predicted.kinds.get(what), self.measured.kinds.get(what)
        if predicted is None or measured is None:
            return None
        return relative_error(predicted.each_s, measured.each_s)

    def idle_error(self, group: str) -> float | None:
        """Predicted minus measured, as a share of the makespan."""
        predicted, measured = self.predicted.idle.get(group), self.measured.idle.get(group)
        return None if predicted is None or measured is None else predicted - measured

    def as_json(self) -> dict[str, Any]:
        return {
            "makespan_error": self.makespan_error,
            "errors": {what: self.error(what) for what in self.kinds},
            "idle_errors": {group: self.idle_error(group) for group in self.groups},
            "predicted": dataclasses.asdict(self.predicted),
            "measured": dataclasses.asdict(self.measured),
        }


def compare(predicted: Timeline, measured: Timeline) -> Comparison:
    return Comparison(predicted=summarize(of_requests(predicted)), measured=summarize(of_requests(measured)))


def relative_error(predicted: float, measured: float) -> float | None:
    """How much more was predicted than measured, as a share of that."""
    return predicted / measured - 1 if measured else None


def of_requests(timeline: Timeline) -> Timeline:
    """Only what workers did for requests: what happens before the first and beside them is not predicted."""
    spans = tuple(span for span in timeline.spans if span.request_id and span.rank >= 0)
    return dataclasses.replace(timeline, spans=spans)


def summarize(timeline: Timeline) -> Summary:
    kinds: dict[str, list[float]] = defaultdict(list)
    helped = {(span.request_id, span.index) for span in timeline.spans if span.what == HELP}
    for span in timeline.spans:
        is_helped = span.what == STEP and (span.request_id, span.index) in helped
        kinds[HELPED_STEP if is_helped else span.what].append(span.duration_s)
    return Summary(
        makespan_s=timeline.makespan_s,
        kinds={
            what: KindOfWork(count=len(seconds), each_s=statistics.fmean(seconds), total_s=sum(seconds))
            for what, seconds in kinds.items()
        },
        idle={name: _idle_share(timeline, ranks) for name, ranks in groups_of(timeline).items()},
    )


def groups_of(timeline: Timeline) -> dict[str, frozenset[int]]:
    """Ranks by what they do: those that denoise, those that decode, others; or "all", where some do both."""
    by_role: dict[str, set[int]] = defaultdict(set)
    for span in timeline.spans:
        by_role[span.role].add(span.rank)
    denoisers, decoders = frozenset(by_role[Role.DENOISER]), frozenset(by_role[Role.DECODER])
    everyone = frozenset(timeline.ranks)
    if denoisers & decoders:
        return {"all": everyone}
    groups = {"denoise": denoisers, "decode": decoders, "encode": everyone - denoisers - decoders}
    return {name: ranks for name, ranks in groups.items() if ranks}


def _idle_share(timeline: Timeline, ranks: Collection[int]) -> float:
    by_rank: dict[int, list[Span]] = {rank: [] for rank in ranks}
    for span in timeline.spans:
        if span.rank in by_rank:
            by_rank[span.rank].append(span)
    available_s = timeline.makespan_s * len(ranks)
    busy_s = sum(covered_s(spans) for spans in by_rank.values())
    return max(0.0, 1 - busy_s / available_s) if available_s else 0.0
