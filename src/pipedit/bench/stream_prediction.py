"""What the simulator says of streams before they run, and how far it is off.

Durations come from rounds of the same arrangement, and the prediction is held against other rounds, which lie between
them: so the machine may drift, and nothing is compared with what it was made from.
"""

import dataclasses
import statistics
from collections.abc import Sequence

from pipedit.bench.streams import Stream
from pipedit.core.placement import Placement
from pipedit.core.spans import Span
from pipedit.plan.jobs import Work
from pipedit.plan.measured_durations import MeasuredDurations, gap_s
from pipedit.plan.pools import Pool, Service
from pipedit.plan.scheduler import Policy
from pipedit.plan.simulator import Arrival, simulate

_LATER_S = 1e6  # when any stream is over


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Makespans in seconds, medians over the rounds that are compared. `error`: relative to the measured one."""

    makespan_s: float
    measured_makespan_s: float
    error: float


def rounds_used(rounds: int) -> dict[str, list[int]]:
    """Which rounds (the first one is 1) say how long work takes, and which are predicted. For JSON."""
    return {
        "durations_from_rounds": list(range(1, rounds + 1, 2)),
        "compared_with_rounds": list(range(2, rounds + 1, 2)),
    }


def predict(placement: Placement, policy: Policy, work: Work, rounds: Sequence[Stream]) -> Prediction:
    """Durations are means over all spans of the odd rounds; the even ones are predicted. At least two rounds, of
    requests that are all like `work`, in an engine that ran one stream before (to warm up)."""
    used = rounds_used(len(rounds))
    spans: list[Span] = [span for number in used["durations_from_rounds"] for span in rounds[number - 1].spans]
    compared = used["compared_with_rounds"]
    pool = Pool(
        placement=placement,
        services={"it": Service(work=work, durations=MeasuredDurations.of(spans))},
        policy=policy,
    )
    predicted = _makespans_s(pool, len(rounds[0].done_s), streams=1 + len(rounds), round_trip_s=gap_s(spans))
    makespan_s = statistics.median(predicted[number] for number in compared)
    measured_s = statistics.median(rounds[number - 1].makespan_s for number in compared)
    return Prediction(makespan_s=makespan_s, measured_makespan_s=measured_s, error=makespan_s / measured_s - 1)


def _makespans_s(pool: Pool, count: int, *, streams: int, round_trip_s: float) -> list[float]:
    """Of streams one after the other, as the measured engine had them: what is tried out in one (help) is settled in
    those after it."""
    arrivals = [Arrival(at_s=number * _LATER_S, kind="it") for number in range(streams) for _ in range(count)]
    lives = simulate([pool], arrivals, round_trip_s=round_trip_s).lives
    return [
        max(life.done_s for life in lives[number * count : (number + 1) * count]) - number * _LATER_S
        for number in range(streams)
    ]
