"""When the ops of a block plan run on a ring of stages: one stage at a time, in any order in which it can be known.

Each stage takes the same ops in the same order and begins one as soon as it is free and has what the op needs: the
hidden states of the stage before, on the first stage the results (see core.blocks.Kind). Features never have to be
waited for, since every stage runs the maker before the user. Transfers run beside the work and do not hold their sender
up, but on one hop they follow each other.
"""

import collections
import dataclasses
from collections.abc import Callable

from pipedit.core.blocks import BlockPlan, Kind, Op

RESULTS_SLACK = 2  # results that a first stage leaves on their way, beyond one for each stage

SecondsOf = Callable[[int, Op], float]  # stage, op


def one_slot(_stage: int, _op: Op) -> float:
    """All stages take equally long for everything: seconds are then slots."""
    return 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingTimes:
    """How long the stages of a ring take. `hand_over_s`: from the end of a pass on one stage to its arrival on the
    next; `result_s`: the same from the last stage to the first (None: as long). An op is `passes` forward passes of
    equal length, each of which is handed over as it is done. `results_ahead`: so many ops the first stage begins at
    most before it waits for the result of the oldest (None: it waits for those that it needs only).
    """

    seconds_of: SecondsOf = one_slot
    hand_over_s: float = 0
    result_s: float | None = None
    passes: int = 1
    results_ahead: int | None = None


class RingClock:
    """Ask with `run`, for each stage its ops in order. Constant memory for endless orders."""

    def __init__(self, plan: BlockPlan, depth: int, times: RingTimes) -> None:
        self._plan, self._depth, self._times = plan, depth, times
        self._hand_over_s = times.hand_over_s if depth > 1 else 0
        self._result_s = 0 if depth == 1 else times.hand_over_s if times.result_s is None else times.result_s
        self._free_s: list[float] = [0] * depth
        self._hop_free_s: list[float] = [0] * depth  # of the hop that leaves the stage
        self._coming: list[collections.deque[list[float]]] = [collections.deque() for _ in range(depth)]  # by pass
        self._results: dict[int, tuple[int, float]] = {}  # block -> its last step, and when that result was or is back
        self._returned: collections.deque[float] = collections.deque()  # results that nobody has waited for yet
        self._ahead = 0  # ops begun whose results nobody has waited for

    def run(self, stage: int, op: Op, not_before_s: float = 0) -> list[tuple[float, float]] | None:
        """From when to when each pass of the stage's next op runs. None: what it waits for is not known yet; ask again
        then."""
        arrivals = self._inputs(op) if stage == 0 else self._hidden(stage)
        if arrivals is None:
            return None
        now_s = max(self._free_s[stage], not_before_s)
        pass_s = self._times.seconds_of(stage, op) / self._times.passes
        passes = []
        for arrival_s in arrivals:
            start_s = max(now_s, arrival_s)
            now_s = start_s + pass_s
            passes.append((start_s, now_s))
        self._free_s[stage] = now_s
        if stage + 1 < self._depth:
            self._coming[stage + 1].append([self._sent(stage, end_s) for _, end_s in passes])
        else:
            self._give_back(op, now_s + self._result_s)
        return passes

    def result_at(self, op: Op) -> float | None:
        """When the result of a block's latest op is back on the first stage. None: not known yet."""
        step, at_s = self._results.get(op.block, (-1, 0.0))
        return at_s if step == op.step else None

    def forget(self, block: int) -> None:
        """Nobody asks for this block's results any more."""
        self._results.pop(block, None)

    def _inputs(self, op: Op) -> list[float] | None:
        """When the first stage has everything that an op needs, for each pass."""
        times_s = [0.0]
        for needed in self._plan.dependencies(op):
            if needed.kind is Kind.RESULT:
                step, at_s = self._results.get(needed.maker.block, (-1, 0.0))
                assert step <= needed.maker.step, f"{op} is out of turn"
                if step < needed.maker.step:
                    return None
                times_s.append(at_s)
        most = self._times.results_ahead
        if most is not None and self._ahead >= most:
            if not self._returned:
                return None
            times_s.append(self._returned.popleft())
            self._ahead -= 1
        self._ahead += most is not None
        return [max(times_s)] * self._times.passes

    def _hidden(self, stage: int) -> list[float] | None:
        return self._coming[stage].popleft() if self._coming[stage] else None

    def _sent(self, stage: int, leave_s: float) -> float:
        self._hop_free_s[stage] = max(leave_s, self._hop_free_s[stage]) + self._hand_over_s
        return self._hop_free_s[stage]

    def _give_back(self, op: Op, at_s: float) -> None:
        self._results[op.block] = op.step, at_s
        if self._times.results_ahead is not None:
            self._returned.append(at_s)
