"""What a simulated run comes to: throughput, waiting, idle ranks, money."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipedit.plan.durations import FETCH
from pipedit.plan.simulator import SimulatedRun

_QUANTILES = (50, 90, 95, 99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds from arrival to the last frame, over all requests."""

    mean_s: float
    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float
    max_s: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency":
        ordered = sorted(seconds)
        ranks = {f"p{percent}_s": quantile(ordered, percent / 100) for percent in _QUANTILES}
        return cls(mean_s=math.fsum(ordered) / len(ordered), max_s=ordered[-1], **ranks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupUse:
    """How a group's ranks, all replicas together, spent the makespan. `busy_s` by kind of work, summed over ranks."""

    ranks: int
    busy_s: Mapping[str, float]
    busy_share: float

    @property
    def idle_share(self) -> float:
        return 1.0 - self.busy_share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """`makespan_s`: from the first arrival to the last frame. `hand_over_s` and `hand_over_bytes`: fetching
    conditioning and latents, over all requests; every rank that waits for it counts. `peak_queue`: requests that had
    come and not begun. `cost_per_video` in the currency of the price; None without one."""

    requests: int
    makespan_s: float
    throughput_per_s: float
    latency: Latency
    first_video_s: float  # from the first arrival
    longest_wait_s: float  # from a request's arrival to the beginning of its work
    groups: Mapping[str, GroupUse]
    utilisation: float  # busy share of all ranks
    hand_over_s: float
    hand_over_bytes: int
    peak_queue: int
    num_devices: int
    cost_per_video: float | None

    def as_json(self) -> dict[str, Any]:
        groups = {name: {**dataclasses.asdict(use), "idle_share": use.idle_share} for name, use in self.groups.items()}
        return {**dataclasses.asdict(self), "groups": groups}


def summarize(run: SimulatedRun, *, price_per_hour: float | None = None, num_devices: int | None = None) -> Outcome:
    """`price_per_hour`: of one device. `num_devices`: those that are paid for; None: the ranks of the run. The run
    must have had a request."""
    assert run.lives, "a run without requests has no outcome"
    start_s = run.lives[0].arrival.at_s
    done_s = [life.done_s for life in run.lives]
    makespan_s = max(done_s) - start_s
    groups = {name: _group_use(run, name, ranks, makespan_s) for name, ranks in run.group_ranks.items()}
    devices = sum(run.group_ranks.values()) if num_devices is None else num_devices
    busy_s = sum(sum(use.busy_s.values()) for use in groups.values())
    handed = [use for use in run.uses if use.what == FETCH]
    paid = None if price_per_hour is None else price_per_hour * devices * makespan_s / 3600
    return Outcome(
        requests=len(run.lives),
        makespan_s=makespan_s,
        throughput_per_s=len(run.lives) / makespan_s if makespan_s else 0.0,
        latency=Latency.of([life.latency_s for life in run.lives]),
        first_video_s=min(done_s) - start_s,
        longest_wait_s=max(life.begun_s - life.arrival.at_s for life in run.lives),
        groups=groups,
        utilisation=busy_s / (makespan_s * devices) if makespan_s else 0.0,
        hand_over_s=sum(use.rank_seconds for use in handed),
        hand_over_bytes=sum(use.payload_bytes for use in handed),
        peak_queue=run.peak_queue,
        num_devices=devices,
        cost_per_video=None if paid is None else paid / len(run.lives),
    )


def _group_use(run: SimulatedRun, name: str, ranks: int, makespan_s: float) -> GroupUse:
    busy_s = {use.what: use.rank_seconds for use in run.uses if use.group == name and use.rank_seconds}
    share = sum(busy_s.values()) / (makespan_s * ranks) if makespan_s else 0.0
    return GroupUse(ranks=ranks, busy_s=busy_s, busy_share=share)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed."""
    assert ordered and 0 < share <= 1, share
    return ordered[math.ceil(share * len(ordered)) - 1]
