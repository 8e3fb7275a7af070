"""In which order the ops of a block plan run: the published one, and one that leaves no stage idle that need not be.

Orders are lazy: those of endless plans are endless, in constant memory. Every stage runs the ops in the same order.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping

from pipedit.core.blocks import BlockPlan, Kind, Op

_Rank = Callable[[Op], tuple[int, int]]  # smaller goes first


def published_order(plan: BlockPlan) -> Iterator[Op]:
    """DualParal, section 3: iteration by iteration; in each a new block joins, and every block that is neither finished
    nor still to come makes one step, from the tail (newest) to the head (oldest)."""
    last = None if plan.num_blocks is None else plan.num_blocks - 1
    for iteration in itertools.count():
        newest = iteration if last is None else min(iteration, last)
        oldest = max(0, iteration - plan.num_steps + 1)
        if oldest > newest:
            return
        for block in range(newest, oldest - 1, -1):
            yield Op(block, iteration - block)


def eager_order(plan: BlockPlan, depth: int) -> Iterator[Op]:
    """List scheduling on a virtual ring of `depth` equal stages: in each slot the oldest block that is ready.

    Oldest first alone leaves holes at the end, where the newest blocks lag behind. The dependencies are their own
    mirror image (first block and step for last), and this rule leaves no holes at the beginning. So the last ops are
    ranked by a schedule that the same rule makes backwards from the end.

    With K blocks of T steps on N stages, none is idle between its first and its last op if K >= N, else (N - K)(T - 1)
    slots: no order does better. Where a block needs its predecessor's result (RERUN), this is the published order.
    """
    assert depth >= 1, depth
    tail = {} if plan.num_blocks is None else _tail(plan, plan.num_blocks, depth)

    def rank(op: Op) -> tuple[int, int]:
        place = tail.get(op)
        return (0, op.block) if place is None else (1, place)

    return _list_schedule(plan, depth, rank)


def order_of(plan: BlockPlan, depth: int) -> Iterator[Op]:
    """The order for `depth` stages: published with `compat`, else eager. Results are due a slot later than on a ring
    without links, so that they can be on their way while the first stage is at work."""
    return published_order(plan) if plan.compat else eager_order(plan, depth + 1 if depth > 1 else 1)


def _tail(plan: BlockPlan, num_blocks: int, depth: int) -> Mapping[Op, int]:
    """The last ops and their places, by a schedule from the end. So many that whatever the phase in which the order
    arrives there, it can be made good: two rounds for each stage, and the steps of as many blocks (without context)."""
    backwards = _list_schedule(plan, depth, lambda op: (0, op.block))
    count = depth * (2 * depth + plan.num_steps)
    return {
        Op(num_blocks - 1 - block, plan.num_steps - 1 - step): -number
        for number, (block, step) in enumerate(itertools.islice(backwards, count))
    }


def _list_schedule(plan: BlockPlan, depth: int, rank: _Rank) -> Iterator[Op]:
    """In each slot the ready op of the lowest rank begins on stage 0. A block enters after its predecessor."""
    begun = _Begun(plan, depth)
    waiting: list[tuple[int, Op]] = [(0, Op(0, 0))]  # by the slot from which on they are ready
    ready: list[tuple[tuple[int, int], Op]] = []
    slot = 0
    while waiting or ready:
        if not ready:
            slot = max(slot, waiting[0][0])
        while waiting and waiting[0][0] <= slot:
            op = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (rank(op), op))
        op = heapq.heappop(ready)[1]
        begun.note(op, slot)
        yield op
        for other in (Op(op.block - 1, op.step + 1), Op(op.block, op.step + 1), Op(op.block + 1, op.step)):
            if (from_slot := begun.ready_slot(other, after=op)) is not None:
                heapq.heappush(waiting, (from_slot, other))
        slot += 1


class _Begun:
    """Which ops have begun, and in which slot the last one of each block did. It forgets blocks that nobody needs."""

    def __init__(self, plan: BlockPlan, depth: int) -> None:
        self._plan = plan
        # A result is back when the op has been through all stages; features are there for the next op on the stage.
        self._delay = {Kind.RESULT: depth, Kind.FEATURES: 1}
        self._last: dict[int, tuple[int, int]] = {}  # block -> step, slot

    def note(self, op: Op, slot: int) -> None:
        self._last[op.block] = op.step, slot
        final = self._plan.num_steps - 1
        if op.step == final and self._slot(Op(op.block - 1, final), 0) is not None:
            del self._last[op.block - 1]  # nobody needs it any more

    def ready_slot(self, op: Op, *, after: Op) -> int | None:
        """From which slot on `op` can begin, now that `after` has begun; None: it needs others too, or not this."""
        if not self._plan.has(op):
            return None
        needs = [(d.maker, self._delay[d.kind]) for d in self._plan.dependencies(op)]
        if op.step == 0 and op.block > 0:
            needs.append((Op(op.block - 1, 0), 1))
        slots = [self._slot(maker, delay) for maker, delay in needs]
        is_user = any(maker == after for maker, _ in needs)
        return max(slot for slot in slots if slot is not None) if is_user and None not in slots else None

    def _slot(self, maker: Op, delay: int) -> int | None:
        step, slot = self._last.get(maker.block, (-1, 0))
        return slot + delay if step >= maker.step else None
