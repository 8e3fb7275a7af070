"""Whether an order of DualParal's ops is legal, and how far each block has come. The rules are in core.blocks."""

from collections.abc import Iterable

from pipedit.core.blocks import BlockPlan, Op

_MAX_PROBLEMS = 5


class Progress:
    """How far each block has come, following ops one by one. Its memory grows with the blocks in flight alone."""

    def __init__(self, plan: BlockPlan) -> None:
        self._plan = plan
        self._finished = 0  # blocks 0 .. this - 1 have done all their steps
        self._steps: dict[int, int] = {}  # of later blocks

    @property
    def finished(self) -> int:
        """How many blocks, counted from the beginning of the video, are done without a gap."""
        return self._finished

    @property
    def begun(self) -> int:
        """One more than the newest block that has begun."""
        return max(self._steps, default=self._finished - 1) + 1

    def steps_done(self, block: int) -> int:
        return self._plan.num_steps if block < self._finished else self._steps.get(block, 0)

    def problem(self, op: Op) -> str | None:
        """Why `op` cannot come now, or None."""
        done = self.steps_done(op.block)
        if not self._plan.has(op):
            return f"{op} does not exist"
        if op.step < done:
            return f"{op} comes twice"
        for dependency in self._plan.dependencies(op):
            if self.steps_done(dependency.maker.block) <= dependency.maker.step:
                return f"{op} comes before {dependency.maker}, whose {dependency.kind} it needs"
        return None

    def advance(self, op: Op) -> None:
        """Takes note that `op` has been done. It must be one without a `problem`."""
        self._steps[op.block] = op.step + 1
        while self._steps.get(self._finished) == self._plan.num_steps:
            del self._steps[self._finished]
            self._finished += 1


def check_order(order: Iterable[Op], plan: BlockPlan) -> list[str]:
    """What is wrong with an order, the first few problems: ops before what they need, twice, or left out. Of an endless
    plan any beginning is right."""
    progress, problems = Progress(plan), []
    for op in order:
        if problem := progress.problem(op):
            problems.append(problem)
            if len(problems) == _MAX_PROBLEMS:
                return problems
        else:
            progress.advance(op)
    problems += [
        f"block {block} ends after {progress.steps_done(block)} of {plan.num_steps} steps"
        for block in range(progress.finished, plan.num_blocks or 0)
        if progress.steps_done(block) < plan.num_steps
    ]
    return problems[:_MAX_PROBLEMS]
