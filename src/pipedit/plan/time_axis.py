"""Round times for an axis, and how they are written."""

import dataclasses
import math

_MINUTE, _HOUR = 60.0, 3600.0
_ROUND_STEPS_S = (
    *(factor * 10.0**power for power in range(-6, 1) for factor in (1, 2, 5)),
    *(10.0, 15.0, 30.0, _MINUTE, 2 * _MINUTE, 5 * _MINUTE, 10 * _MINUTE, 15 * _MINUTE, 30 * _MINUTE),
    *(_HOUR, 2 * _HOUR, 6 * _HOUR, 12 * _HOUR, 24 * _HOUR),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tick:
    at_s: float
    label: str


def ticks(duration_s: float, *, at_most: int = 10) -> tuple[Tick, ...]:
    """Round times from 0 up to the duration, `at_most` + 1 of them, in one unit."""
    if duration_s <= 0:
        return (Tick(at_s=0.0, label="0 s"),)
    step_s = next((step for step in _ROUND_STEPS_S if duration_s / step <= at_most), None)
    if step_s is None:  # longer than `at_most` days
        step_s = 24 * _HOUR * math.ceil(duration_s / (24 * _HOUR * at_most))
    times_s = [count * step_s for count in range(int(duration_s / step_s * (1 + 1e-12)) + 1)]
    return tuple(Tick(at_s=at_s, label=_label(at_s, step_s, duration_s)) for at_s in times_s)


def _label(at_s: float, step_s: float, duration_s: float) -> str:
    """One unit for the whole axis: microseconds, milliseconds, seconds, min:s or h:min."""
    if duration_s < 1e-3:
        return f"{at_s * 1e6:.0f} µs"
    if duration_s < 1:
        return f"{at_s * 1e3:.{_decimals(step_s * 1e3)}f} ms"
    if duration_s < 2 * _MINUTE:
        return f"{at_s:.{_decimals(step_s)}f} s"
    if duration_s < 2 * _HOUR:
        return f"{int(at_s // _MINUTE)}:{int(at_s % _MINUTE):02d} min"
    return f"{int(at_s // _HOUR)}:{int(at_s % _HOUR // _MINUTE):02d} h"


def _decimals(step: float) -> int:
    """How many decimals tell multiples of the step apart."""
    return max(0, -math.floor(math.log10(step) + 1e-9))
