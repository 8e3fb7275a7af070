"""A block schedule as text: which block is at which step on which stage in which slot, what it receives and keeps."""

import itertools
from collections.abc import Iterable, Iterator

from pipedit.core.blocks import BlockPlan, Dependency, Kind, Op, Source
from pipedit.plan.block_simulation import simulate_order, time_order

_WHERE = {Source.OWN: "all", Source.PREDECESSOR: "last", Source.SUCCESSOR: "first"}


def describe(plan: BlockPlan, depth: int, order: Iterable[Op]) -> str:
    """The whole table of a plan that ends, with its sizes and its idle slots in front."""
    ops = tuple(order)
    run = simulate_order(ops, plan, depth)
    numbers = (
        f"{run.makespan_s:.0f} slots, of which a stage is idle in {run.idle_s[0]:.0f} "
        f"({run.idle_within_s[0]:.0f} between its first and its last op), {run.utilisation:.1%} used; "
        f"first block after {run.finished_s[0]:.0f}; blocks in flight: at most {run.most_in_flight}; "
        f"entries kept: at most {run.most_pending}"
    )
    return "\n".join([_sizes(plan, depth), numbers, *table_lines(plan, depth, ops)]) + "\n"


def table_lines(plan: BlockPlan, depth: int, order: Iterable[Op]) -> Iterator[str]:
    """A line for each slot of equal length, lazily. An op moves on by a stage in every slot; what it receives and keeps
    stands where it enters."""
    width = max(len("stage 00"), len(str(Op(plan.num_blocks or 100_000, plan.num_steps))))
    stages = "  ".join(f"stage {stage}".ljust(width) for stage in range(depth))
    yield f"slot   {stages}  {'receives'.ljust(_received_width(plan))}  keeps"
    ring: list[Op | None] = [None] * depth  # by stage
    for slot, entering in enumerate(_by_slot(plan, depth, order)):
        ring = [entering, *ring[:-1]]
        cells = "  ".join(("-" if op is None else str(op)).ljust(width) for op in ring)
        received = kept = ""
        if entering is not None:
            received = "; ".join(_received(d) for d in plan.dependencies(entering))
            kept = "; ".join(_kept(d) for d in plan.hand_overs(entering) if d.kind == Kind.FEATURES)
        yield f"{slot:>4}   {cells}  {received.ljust(_received_width(plan))}  {kept}".rstrip()


def _by_slot(plan: BlockPlan, depth: int, order: Iterable[Op]) -> Iterator[Op | None]:
    """What enters the first stage in each slot, until the last op has left the last stage."""
    slot = 0
    for timed in time_order(order, plan, depth):
        yield from itertools.repeat(None, int(timed.starts_s[0]) - slot)
        yield timed.op
        slot = int(timed.starts_s[0]) + 1
    yield from itertools.repeat(None, depth - 1)


def _sizes(plan: BlockPlan, depth: int) -> str:
    assert plan.num_blocks is not None
    last = plan.num_blocks - 1
    sizes = [plan.latents_of(0)] if last == 0 else [plan.latents_of(0), plan.latents_of(1), plan.latents_of(last)]
    shown = ", ".join(str(size) for size in sizes[:2]) + (", ..." if last > 2 else "") + f", {sizes[-1]}" * (last > 1)
    return (
        f"{plan.output_latents} latent frames in {plan.num_blocks} blocks ({shown}), context {plan.context_latents} "
        f"({plan.prefix} prefix), {plan.num_steps} steps, {depth} stages"
    )


def _received(dependency: Dependency) -> str:
    if dependency.source == Source.OWN:
        return "own result"
    return f"{dependency.kind} of {dependency.maker} ({_WHERE[dependency.source]} {dependency.latents})"


def _kept(dependency: Dependency) -> str:
    return f"{_WHERE[dependency.source]} {dependency.latents} for {dependency.user}"


def _received_width(plan: BlockPlan) -> int:
    """Of the longest entry, about: its own result and a part of each neighbour."""
    part = len(f"; features of {Op(plan.num_blocks or 100_000, plan.num_steps)} (first {plan.context_latents})")
    return len("own result") + (2 * part if plan.context_latents else 0)
