"""Which attention heads idle decoders take in a step, if any. Pure: it is told how long steps took and has no clock.

PipeDiT (section 3.3) lets idle decoders help whenever they can, which costs its small shapes up to 82 s in ten prompts.
Here help has to pay: it is tried on the first steps of a shape and kept only if those were shorter.
"""

import dataclasses
import enum
from collections.abc import Hashable, Sequence

from pipedit.core.parallel import ParallelConfig
from pipedit.core.shares import split_evenly

WARM_UP = 1  # samples of each choice that do not count: buffers are made, chunk counts tried
SAMPLES = 2  # of each choice that do; the shorter one counts: what disturbs a step makes it longer
MARGIN = 0.97  # what the time with help must be below, times that without: more than noise


class AcoMode(enum.StrEnum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


def shares_with_help(heads: int, denoisers: int, helpers: int) -> list[tuple[int, ...]]:
    """Ways to deal the heads to a Ulysses group and its helpers, the group's members first.

    The even one, as in the paper, and one where helpers take half of that: what a helper computes must come through its
    own link, so it may be worth less than a denoiser. Every helper has a head in each.
    """
    if helpers == 0 or heads < denoisers + helpers:
        return []
    even = split_evenly(heads, denoisers + helpers)
    half = tuple(-(-share // 2) for share in even[denoisers:])
    fewer = (*split_evenly(heads - sum(half), denoisers), *half)
    return list(dict.fromkeys([even, fewer]))


def helper_groups(idle: Sequence[int], config: ParallelConfig) -> tuple[tuple[int, ...], ...]:
    """Deals idle ranks to the Ulysses groups, as many to each; empty groups where there are too few. Rings are not
    helped: there, every group's keys pass through every rank."""
    groups = config.cfg_degree
    each = len(idle) // groups if config.ring_degree == 1 else 0
    return tuple(tuple(idle[group * each : (group + 1) * each]) for group in range(groups))


@dataclasses.dataclass(kw_only=True)
class _Trial:
    times: list[list[float]]
    best: int | None = None


class AcoGate:
    """Chooses for each step, from what earlier steps of the same key took. Choice 0 is no help."""

    def __init__(self, mode: AcoMode) -> None:
        self._mode = mode
        self._trials: dict[Hashable, _Trial] = {}

    def choose(self, key: Hashable, choices: int) -> int:
        """`choices` counts no help as one."""
        if choices == 1 or self._mode is AcoMode.OFF:
            return 0
        if self._mode is AcoMode.ON:
            return 1
        trial = self._trials.setdefault(key, _Trial(times=[[] for _ in range(choices)]))
        if trial.best is not None:
            return trial.best
        return min(range(choices), key=lambda choice: len(trial.times[choice]))

    def note(self, key: Hashable, choice: int, seconds: float) -> None:
        """A step with this choice took so long."""
        trial = self._trials.get(key)
        if trial is None or trial.best is not None:
            return
        trial.times[choice].append(seconds)
        if all(len(times) >= WARM_UP + SAMPLES for times in trial.times):
            shortest = [min(times[WARM_UP:]) for times in trial.times]
            best = min(range(len(shortest)), key=shortest.__getitem__)
            trial.best = best if shortest[best] < MARGIN * shortest[0] else 0

    def decided(self, key: Hashable) -> int | None:
        """What was settled on for this key; None while it is being tried."""
        trial = self._trials.get(key)
        return None if trial is None else trial.best


@dataclasses.dataclass(frozen=True, kw_only=True)
class Help:
    """What the gate has chosen for a step, and under which key to note how long it took."""

    key: Hashable
    choice: int
