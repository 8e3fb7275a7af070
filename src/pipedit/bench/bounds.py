"""What could be reached at best, and how near a measurement came: arithmetic on seconds, round by round."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pipedit.bench.sampling import Spread, ratio


def ideal_seconds(compute_s: float, communication_s: float) -> float:
    """Everything hidden: nothing can be faster than the longer of the two."""
    return max(compute_s, communication_s)


def hidden_seconds(compute_s: float, attention_s: float, communication_s: float) -> float:
    """A whole model where exchanges hide under attention and under nothing else: `attention_s` is part of
    `compute_s`."""
    return compute_s - attention_s + max(attention_s, communication_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """What the variants are held against: seconds of the computing alone, one of each round, and of the transfer
    alone."""

    compute_s: Sequence[float]
    communication_s: float

    @property
    def ideal_s(self) -> list[float]:
        return [ideal_seconds(compute, self.communication_s) for compute in self.compute_s]

    @property
    def ratio(self) -> Spread:
        """Communication : compute, as it was."""
        return Spread.of([self.communication_s / compute for compute in self.compute_s])


def judge(seconds: Mapping[str, Sequence[float]], floor: Floor, baselines: Mapping[str, str]) -> dict[str, Any]:
    """JSON-ready figures of a variant: seconds, `speed_up` over each of the `baselines` (key in the report: variant),
    share of the ideal speed-up, and exposed communication, which is what it took longer than the computing."""
    figures = {}
    for name, taken in seconds.items():
        exposed = [one - compute for one, compute in zip(taken, floor.compute_s, strict=True)]
        figures[name] = {
            "seconds": dataclasses.asdict(Spread.of(taken)),
            "speed_up": {
                key: dataclasses.asdict(ratio(seconds[baseline], taken)) for key, baseline in baselines.items()
            },
            "share_of_ideal": dataclasses.asdict(ratio(floor.ideal_s, taken)),
            "exposed_s": dataclasses.asdict(Spread.of(exposed)),
        }
    return figures
