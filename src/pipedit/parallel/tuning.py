"""Which number of chunks is fastest: measured on the first calls of a shape, then kept.

A model calls attention once a layer with the same shape, so the candidates are timed in turn, layer after layer, under
the same conditions. Chunks must beat plain Ulysses clearly to be chosen: so it is never much slower.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROUNDS = 6  # the first of each candidate warms up and does not count
MARGIN = 0.97  # what a candidate's time must be below, times that of the first (plain) one: more than noise


@dataclasses.dataclass(kw_only=True)
class _Trial:
    calls: int = 0
    times: list[list[Callable[[], float]]] = dataclasses.field(default_factory=list)
    best: int | None = None


class Stopwatch:
    """Time from `start` to `stop` of work on a device, read later: on CUDA nothing is waited for in between."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._is_cuda, self._clock = device.type == "cuda", clock
        self._start: Any = self._mark()

    def _mark(self) -> Any:
        if not self._is_cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> Callable[[], float]:
        """Reads the seconds; on CUDA it waits for the work."""
        start, end = self._start, self._mark()
        if not self._is_cuda:
            return lambda: float(end - start)

        def read() -> float:
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000

        return read


class Tuner:
    """Deals candidates 0 .. count - 1 to the calls of each key, and settles on one. All ranks of a group ask in the
    same order, and `agree` (the largest of each value over the group) makes them settle on the same."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._device, self._clock = device, clock
        self._trials: dict[Any, _Trial] = {}

    def choose(self, key: Any, count: int) -> int:
        """The candidate for the next call of this key."""
        trial = self._trials.setdefault(key, _Trial(times=[[] for _ in range(count)]))
        if trial.best is not None:
            return trial.best
        return trial.calls % count

    def is_settled(self, key: Any) -> bool:
        trial = self._trials.get(key)
        return trial is not None and trial.best is not None

    def best(self, key: Any) -> int | None:
        trial = self._trials.get(key)
        return None if trial is None else trial.best

    def start(self) -> Stopwatch:
        return Stopwatch(self._device, self._clock)

    def forget(self) -> None:
        """After something failed, on every rank: some may have counted a call that others have not, and would go on
        with other candidates than they."""
        self._trials.clear()

    def finish(self, key: Any, watch: Stopwatch, agree: Callable[[Sequence[float]], Sequence[float]]) -> bool:
        """After the call: notes its time; after the last round decides, and says so with True."""
        trial = self._trials[key]
        if trial.best is not None:
            return False
        count = len(trial.times)
        candidate, round_ = trial.calls % count, trial.calls // count
        if round_ > 0:
            trial.times[candidate].append(watch.stop())
        trial.calls += 1
        if trial.calls < ROUNDS * count:
            return False
        medians = agree([statistics.median(read() for read in times) for times in trial.times])
        trial.best = decide(medians)
        trial.times = []
        return True


def decide(seconds: Sequence[float]) -> int:
    """The fastest; but the first one (plain) unless it is clearly beaten."""
    best = min(range(len(seconds)), key=lambda candidate: seconds[candidate])
    return best if seconds[best] < MARGIN * seconds[0] else 0
