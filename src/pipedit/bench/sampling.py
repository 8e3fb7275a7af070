"""Interleaved timing: A B A B ..., so that a machine that drifts drifts for everybody. Pure Python."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Least, middle and greatest of several figures of one kind."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(min=min(values), median=statistics.median(values), max=max(values))


def interleave(variants: Mapping[str, Callable[[], float]], *, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each variant, round by round; `warm_up` rounds before are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        for name, run in variants.items():
            took = run()
            if number >= warm_up:
                seconds[name].append(took)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """ours / theirs, pair by pair of the same round: below 1 means that ours is faster."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])
