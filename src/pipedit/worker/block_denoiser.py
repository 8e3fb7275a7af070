"""One stage's part of a video that is denoised block by block (DualParal, arXiv 2505.21070; see plan.block_schedule).

Every stage of the layer pipeline runs the same operations in the same order, so what is sent and received is known on
both ends. The first stage also holds the latents of the blocks in flight and brings results back to them.

Shape legend: C latent channels, f latent frames of a block, F of a window, H W latent size.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pipedit.core.blocks import BlockPlan, Kind, Op, Source
from pipedit.models.adapter import BlockStage
from pipedit.parallel.context_attention import ContextAttention, Keep, Take
from pipedit.parallel.stage_links import Parcel, StageLinks
from pipedit.plan.block_clock import RESULTS_SLACK
from pipedit.worker.run import Clock, synchronize

# What a block leaves: to its successor, and to its predecessor.
_TAIL, _HEAD = "tail", "head"

Latents = torch.Tensor  # [1, C, f, H, W] float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """What each forward pass sees of the neighbours, and leaves for them: arithmetic on a plan, in latent frames.
    Positions count within the window, so keys are turned by the distance between two windows."""

    plan: BlockPlan

    def prefix(self, block: int) -> int:
        """Frames of the predecessor that the window begins with, as latents."""
        return self.plan.window_latents(block) - self.plan.latents_of(block)

    def takes(self, op: Op, key: tuple[Any, ...]) -> tuple[Take, ...]:
        plan, found = self.plan, []
        for needed in plan.dependencies(op):
            if needed.kind is Kind.FEATURES:
                other = needed.maker.block
                if needed.source is Source.PREDECESSOR:
                    found.append(Take(entry=(*key, other, _TAIL), turned=-plan.window_latents(other)))
                else:
                    turned = plan.window_latents(op.block) - self.prefix(other)
                    found.append(Take(entry=(*key, other, _HEAD), turned=turned))
        return tuple(found)

    def keeps(self, op: Op, key: tuple[Any, ...], tokens_per_frame: int) -> tuple[Keep, ...]:
        plan, found = self.plan, []
        for left in plan.hand_overs(op):
            if left.kind is Kind.FEATURES:
                is_tail = left.source is Source.PREDECESSOR  # that is what this block is to the one after it
                first = plan.window_latents(op.block) - left.latents if is_tail else self.prefix(op.block)
                rows = first * tokens_per_frame, (first + left.latents) * tokens_per_frame
                entry = (*key, op.block, _TAIL if is_tail else _HEAD)
                found.append(Keep(entry=entry, first=rows[0], stop=rows[1]))
        return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedBlock:
    """Clean latents of the block's own frames, in float32."""

    block: int
    latents: Latents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """An operation that was run: from when to when each of its forward passes took, without the waiting for what comes
    in; and the blocks that were found finished before it."""

    op: Op
    passes: tuple[tuple[float, float], ...]
    finished: tuple[FinishedBlock, ...]


@dataclasses.dataclass(kw_only=True)
class _Block:
    """On the first stage: latents and noise scheduler of a block, and how many of its steps have been applied."""

    state: Any
    applied: int = 0


class BlockDenoiser:
    """`run` operations, in as many pieces as you like; after the last one, and before it is dropped, `drain`. In
    between, after `drain` too, `save` tells all that another one needs to go on from there, by `restore`.

    `state_of`: what a block is computed with, as the stage's `begin` returned it. `order` is the same on every stage.
    `noise`: of a block, for the first stage. `context` is the kernel of the stage's attentions, `links` lead to the
    other stages (`StageLinks()` where this one is alone). `depth`: the number of stages.
    """

    def __init__(
        self,
        stage: BlockStage,
        state_of: Callable[[int], Any],
        plan: BlockPlan,
        order: Iterator[Op],
        *,
        video: str,
        depth: int,
        links: StageLinks,
        context: ContextAttention,
        noise: Callable[[int], Latents],
        clock: Clock,
    ) -> None:
        self._stage, self._state_of, self._plan, self._order, self._clock = stage, state_of, plan, order, clock
        self._video, self._depth, self._links, self._context, self._noise = video, depth, links, context, noise
        self._windows = Windows(plan=plan)
        self._done = 0  # operations
        self._blocks: dict[int, _Block] = {}
        self._outstanding: collections.deque[Op] = collections.deque()  # run, and not applied yet
        self._here: collections.deque[torch.Tensor] = collections.deque()  # their results, where the stage is alone

    def run(self, count: int) -> Iterator[Ran]:
        """The next operations. Lazy."""
        ops = list(itertools.islice(self._order, count))
        coming = self._expected(ops)
        for op in ops:
            finished = self._prepare(op) if self._stage.first else ()
            passes = self._run(op, coming)
            self._done += 1
            yield Ran(op=op, passes=passes, finished=finished)

    @property
    def done(self) -> int:
        """Operations that were run, here or before the beginning (`restore`)."""
        return self._done

    def drain(self) -> tuple[FinishedBlock, ...]:
        """Brings back what is still on its way. The first stage waits until the others have come as far."""
        finished = []
        while self._outstanding:
            finished += self._apply_next()
        for end in (self._links.after, self._links.results_out):
            if end is not None:
                end.flush()
        return tuple(finished)

    def save(self) -> dict[str, Any]:
        """As a tree (see adapter.BlockStage), whose tensors are in use. All stages have run the same operations, and
        nothing is on its way."""
        assert not self._outstanding, "drain it first"
        synchronize(self._stage.device)  # what waits in host memory may still be on its way there
        waiting: list[Any] = sorted(self._context.entries, key=str)
        return {
            "done": self._done,
            "blocks": [
                {
                    "block": block,
                    "applied": held.applied,
                    "state": self._stage.save_block(self._state_of(block), held.state),
                }
                for block, held in self._blocks.items()
            ],
            "entries": [
                {"entry": list(name), "layers": self._context.save((video, *name))} for video, *name in waiting
            ],
        }

    def _saved(self, block: int, held: _Block) -> dict[str, Any]:
        state = self._stage.save_block(self._state_of(block), held.state)
        return {"block": block, "applied": held.applied, "state": state}

    def restore(self, saved: dict[str, Any], to_device: Callable[[Any], Any]) -> None:
        """Goes on where the one that was saved has been; none of its operations has been run here. `to_device` brings
        the tensors of a part of the tree there."""
        assert self._done == 0, "it has begun"
        self._done = saved["done"]
        collections.deque(itertools.islice(self._order, self._done), maxlen=0)
        for each in saved["blocks"]:
            state = self._stage.restore_block(self._state_of(each["block"]), to_device(each["state"]))
            self._blocks[each["block"]] = _Block(state=state, applied=each["applied"])
        for each in saved["entries"]:
            self._context.restore((self._video, *each["entry"]), to_device(each["layers"]))

    # -- the first stage: latents -----------------------------------------------------------------------------------

    def _prepare(self, op: Op) -> tuple[FinishedBlock, ...]:
        """Brings back the results that the operation stands on, and those that should be here by now."""
        finished: list[FinishedBlock] = []
        needed = {op.block: op.step}
        if self._windows.prefix(op.block):
            needed[op.block - 1] = op.step + 1
        while len(self._outstanding) > self._depth + RESULTS_SLACK or any(
            block in self._blocks and self._blocks[block].applied < steps for block, steps in needed.items()
        ):
            finished += self._apply_next()
        if op.step == 0:
            noise = self._noise(op.block)
            self._blocks[op.block] = _Block(state=self._stage.begin_block(self._state_of(op.block), noise))
        return tuple(finished)

    def _apply_next(self) -> list[FinishedBlock]:
        op = self._outstanding.popleft()
        prediction = self._here.popleft() if self._is_alone else self._result()
        block = self._blocks[op.block]
        self._stage.advance(self._state_of(op.block), block.state, op.step, prediction)
        block.applied += 1
        if block.applied < self._plan.num_steps:
            return []
        self._forget(op.block)
        return [FinishedBlock(block=op.block, latents=self._stage.latents(block.state))]

    def _forget(self, finished: int) -> None:
        """Blocks finish in order. One whose latents are the next window's prefix is needed until that one finishes."""
        self._blocks.pop(finished - 1, None)
        if not (self._plan.has_block(finished + 1) and self._windows.prefix(finished + 1)):
            del self._blocks[finished]

    def _result(self) -> torch.Tensor:
        assert self._links.results_in is not None
        (prediction,) = self._links.results_in.take()
        return prediction

    def _window(self, block: int) -> torch.Tensor:
        """[1, C, F, H, W] float32."""
        own, prefix = self._stage.latents(self._blocks[block].state), self._windows.prefix(block)
        if not prefix:
            return own
        before = self._stage.latents(self._blocks[block - 1].state)
        return torch.cat([before[:, :, -prefix:], own], dim=2)

    # -- every stage --------------------------------------------------------------------------------------------

    @property
    def _is_alone(self) -> bool:
        return self._stage.first and self._stage.last

    def _expected(self, ops: Sequence[Op]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Hidden states for each forward pass of the operations, one ahead being on its way."""
        inbox = self._links.before
        if inbox is None:
            return
        parcels = collections.deque(
            self._hidden(op.block, branch) for op in ops for branch in range(self._branches(op.block))
        )
        for _ in range(len(parcels)):
            while parcels and inbox.waiting < 2:
                inbox.expect(parcels.popleft())
            yield inbox.take()

    def _branches(self, block: int) -> int:
        return self._stage.num_branches(self._state_of(block))

    def _hidden(self, block: int, branch: int) -> Parcel:
        shapes = self._stage.hidden_shapes(self._state_of(block), branch, self._plan.window_latents(block))
        return Parcel(shapes=shapes, dtype=self._stage.hidden_dtype)

    def _run(self, op: Op, coming: Iterator[tuple[torch.Tensor, ...]]) -> tuple[tuple[float, float], ...]:
        window = (self._window(op.block),) if self._stage.first else None
        predictions, passes = [], []
        for branch in range(self._branches(op.block)):
            given = window if window is not None else next(coming)
            start_s = self._clock()
            out = self._forward(op, branch, given)
            if self._stage.last:
                predictions.append(out[0][:, :, self._windows.prefix(op.block) :])
            else:
                assert self._links.after is not None
                self._links.after.send(out)
            synchronize(self._stage.device)
            passes.append((start_s, self._clock()))
        if self._stage.first:
            self._outstanding.append(op)
            self._expect_result(op)
        if self._stage.last:
            self._hand_back(self._stage.guide(self._state_of(op.block), op.step, predictions))
        return tuple(passes)

    def _forward(self, op: Op, branch: int, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        key, state = (self._video, branch), self._state_of(op.block)
        tokens = self._stage.tokens_per_frame(state)
        self._context.begin(self._windows.takes(op, key), self._windows.keeps(op, key, tokens))
        out = self._stage.run(state, op.step, branch, self._plan.window_latents(op.block), given)
        self._context.finish()
        return out

    def _expect_result(self, op: Op) -> None:
        if self._links.results_in is not None:
            shape = self._stage.latents(self._blocks[op.block].state).shape
            self._links.results_in.expect(Parcel(shapes=(tuple(shape),), dtype=self._stage.hidden_dtype))

    def _hand_back(self, prediction: torch.Tensor) -> None:
        if self._is_alone:
            self._here.append(prediction)
        else:
            assert self._links.results_out is not None
            self._links.results_out.send((prediction,))
