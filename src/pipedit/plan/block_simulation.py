"""What follows from an order of ops on a ring of stages: times for all of them, idle stages, blocks in flight. When an
op begins and ends is the business of block_clock."""

import dataclasses
import heapq
from collections.abc import Iterable, Iterator

from pipedit.core.blocks import BlockPlan, Kind, Op
from pipedit.core.placement import Role
from pipedit.core.spans import Span
from pipedit.plan.block_clock import RingClock, RingTimes, SecondsOf, one_slot
from pipedit.plan.durations import STEP


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TimedOp:
    """Starts and ends by stage. At `result_s` the result is back on the first stage."""

    op: Op
    starts_s: tuple[float, ...]
    ends_s: tuple[float, ...]
    result_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedOrder:
    """A whole run, from 0 to `makespan_s`, when the last result is back. Tuples are by stage, `finished_s` by block.

    `most_in_flight`: blocks that had begun and whose last result was not back. `most_pending`: keys and values, one
    entry for each neighbour, that a stage kept for ops to come.
    """

    ops: tuple[TimedOp, ...]
    makespan_s: float
    busy_s: tuple[float, ...]
    finished_s: tuple[float, ...]
    most_in_flight: int
    most_pending: int

    @property
    def idle_s(self) -> tuple[float, ...]:
        """Over the whole run, so with the depth - 1 slots in which the pipeline runs full and empty."""
        return tuple(self.makespan_s - busy_s for busy_s in self.busy_s)

    @property
    def idle_within_s(self) -> tuple[float, ...]:
        """Between the first and the last op of each stage."""
        first, last = self.ops[0], self.ops[-1]
        return tuple(b - a - busy_s for a, b, busy_s in zip(first.starts_s, last.ends_s, self.busy_s, strict=True))

    @property
    def utilisation(self) -> float:
        """Work done over work that all stages could have done."""
        return sum(self.busy_s) / (self.makespan_s * len(self.busy_s)) if self.makespan_s else 0.0


def time_order(
    order: Iterable[Op], plan: BlockPlan, depth: int, seconds_of: SecondsOf = one_slot, hand_over_s: float = 0
) -> Iterator[TimedOp]:
    """Each op of a legal order with its times, lazily: endless orders take constant memory. `hand_over_s` passes from
    the end of an op on one stage to its arrival on the next, and from the last stage to the first."""
    clock = RingClock(plan, depth, RingTimes(seconds_of=seconds_of, hand_over_s=hand_over_s))
    for op in order:
        starts_s, ends_s = [], []
        for stage in range(depth):
            passes = clock.run(stage, op)
            assert passes is not None, f"{op} is out of turn"
            starts_s.append(passes[0][0])
            ends_s.append(passes[-1][1])
        result_s = clock.result_at(op)
        assert result_s is not None
        yield TimedOp(op=op, starts_s=tuple(starts_s), ends_s=tuple(ends_s), result_s=result_s)
        if op.step == plan.num_steps - 1:  # the result that nobody needs any more
            clock.forget(op.block - 1 if plan.context_latents else op.block)


def simulate_order(
    order: Iterable[Op], plan: BlockPlan, depth: int, seconds_of: SecondsOf = one_slot, hand_over_s: float = 0
) -> SimulatedOrder:
    """A run of a whole order from beginning to end (see `time_order`)."""
    assert plan.num_blocks is not None, "an endless plan has no end to simulate"
    ops = tuple(time_order(order, plan, depth, seconds_of, hand_over_s))
    finished = {timed.op.block: timed.result_s for timed in ops if timed.op.step == plan.num_steps - 1}
    busy_s = (sum(timed.ends_s[stage] - timed.starts_s[stage] for timed in ops) for stage in range(depth))
    return SimulatedOrder(
        ops=ops,
        makespan_s=max(timed.result_s for timed in ops),
        busy_s=tuple(busy_s),
        finished_s=tuple(finished[block] for block in range(plan.num_blocks)),
        most_in_flight=_most_in_flight(ops, plan),
        most_pending=max(pending_entries((timed.op for timed in ops), plan)),
    )


def pending_entries(order: Iterable[Op], plan: BlockPlan) -> Iterator[int]:
    """After each op, how many entries of keys and values a stage keeps for ops to come (the same on all stages)."""
    pending = 0
    for op in order:
        pending += sum(d.kind == Kind.FEATURES for d in plan.hand_overs(op))
        pending -= sum(d.kind == Kind.FEATURES for d in plan.dependencies(op))
        yield pending


def spans(ops: Iterable[TimedOp], request_id: str, first_rank: int = 0) -> Iterator[Span]:
    """What a worker on each stage would record: its steps, by step and block."""
    for timed in ops:
        for stage, (start_s, end_s) in enumerate(zip(timed.starts_s, timed.ends_s, strict=True)):
            yield Span(
                request_id=request_id,
                rank=first_rank + stage,
                role=Role.DENOISER,
                what=STEP,
                start_s=start_s,
                end_s=end_s,
                index=timed.op.step,
                block=timed.op.block,
            )


def _most_in_flight(ops: Iterable[TimedOp], plan: BlockPlan) -> int:
    in_flight = most = 0
    finishing: list[float] = []
    for timed in ops:
        while finishing and finishing[0] <= timed.starts_s[0]:
            heapq.heappop(finishing)
            in_flight -= 1
        in_flight += timed.op.step == 0
        most = max(most, in_flight)
        if timed.op.step == plan.num_steps - 1:
            heapq.heappush(finishing, timed.result_s)
    return most
