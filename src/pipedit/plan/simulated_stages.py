"""The ranks of an engine that makes videos block by block, in virtual time: commands in, and when they end.

Each stage is given its commands alone, and they wait for each other inside them: when a command ends may be known only
when others have been given theirs. Knows no scheduler and no agenda.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan, Op, Prefix
from pipedit.core.placement import Placement, Role
from pipedit.core.spans import Span
from pipedit.plan.block_clock import RESULTS_SLACK, RingClock
from pipedit.plan.block_orders import order_of
from pipedit.plan.durations import DECODE, STEP, Piece
from pipedit.plan.pools import Service


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """A command that was done at `at_s`, and what its rank says of it. `has_frames`: some of the video came with it."""

    at_s: float
    command: messages.Command
    event: messages.Event
    has_frames: bool = False


@dataclasses.dataclass(kw_only=True)
class _AtWork:
    """A stage inside a command: `number` is the next op, and none begins before `from_s`."""

    command: messages.DenoiseBlocks
    number: int
    from_s: float
    end_s: float = 0.0


class _Video:
    """How far the stages are with a video."""

    def __init__(self, plan: BlockPlan, depth: int, service: Service) -> None:
        assert service.ring is not None, "nobody says what the stages take"
        assert plan.num_blocks is not None, "an endless video has no end to simulate"
        self.plan, self.depth = plan, depth
        self.clock = RingClock(plan, depth, service.ring)
        self.ops: Sequence[Op] = tuple(order_of(plan, depth))
        self._number_of: dict[int, int] = {}  # block -> number of the last op that the first stage has run of it
        self._applied = 0  # results, from the first one on, that the first stage has taken

    def note(self, number: int) -> None:
        """The first stage has run this op. It has waited for the results that the op needs, and for old ones."""
        op = self.ops[number]
        needed = [op.block, *([op.block - 1] if self.plan.prefix is Prefix.RERUN else [])]
        by_need = max(self._number_of.get(block, -1) for block in needed) + 1
        self._applied = max(self._applied, by_need, number - self.depth - RESULTS_SLACK)
        self._number_of[op.block] = number

    def finished(self, done: int) -> int:
        """Blocks that the first stage knows to be finished when it has run so many ops; at the end it waits for all."""
        applied = done if done == len(self.ops) else self._applied
        return sum(op.step == self.plan.num_steps - 1 for op in self.ops[:applied])

    @property
    def end_s(self) -> float | None:
        """When the last result is back; None: not known yet."""
        assert self.plan.num_blocks is not None
        return self.clock.result_at(Op(self.plan.num_blocks - 1, self.plan.num_steps - 1))


class SimulatedStages:
    """`take` each command that the scheduler gives, when it gives it. `busy_s` and `payload_bytes`: by rank and kind of
    work; `spans` only if they are to be kept."""

    def __init__(self, placement: Placement, *, first_rank: int = 0, keep_spans: bool = False) -> None:
        self._placement, self._first_rank, self._keeps_spans = placement, first_rank, keep_spans
        self._stage_of = {rank: stage for stage, rank in enumerate(placement.denoisers)}
        self._at_work: dict[int, _AtWork] = {}  # by stage
        self._videos: dict[str, _Video] = {}
        self.busy_s: defaultdict[tuple[int, str], float] = defaultdict(float)
        self.payload_bytes: defaultdict[tuple[int, str], int] = defaultdict(int)
        self.spans: list[Span] = []

    def take(self, command: messages.Command, now_s: float, service: Service) -> list[Ended]:
        """Every command of which it is known now when it ends: this one, or others that have waited for it."""
        (rank,) = command.ranks
        pieces = service.durations.pieces(command)
        end_s = self._note_pieces(command, rank, now_s, pieces)
        match command:
            case messages.DenoiseBlocks():
                if command.request_id not in self._videos:
                    self._videos[command.request_id] = _Video(command.blocks, len(self._stage_of), service)
                at_work = _AtWork(command=command, number=command.first, from_s=end_s)
                self._at_work[self._stage_of[rank]] = at_work
                return list(self._advance(self._videos[command.request_id]))
            case messages.DecodeBlock():
                decoded = messages.BlockDecoded(request_id=command.request_id, rank=rank, block=command.block)
                if command.block + 1 == command.blocks.num_blocks:
                    del self._videos[command.request_id]
                has_frames = any(piece.what == DECODE for piece in pieces)
                return [Ended(at_s=end_s, command=command, event=decoded, has_frames=has_frames)]
        assert isinstance(command, messages.Encode), command
        return [Ended(at_s=end_s, command=command, event=messages.Encoded(request_id=command.request_id, rank=rank))]

    def _advance(self, video: _Video) -> Iterator[Ended]:
        """Everything inside commands of which the time is known now."""
        is_open = True
        while is_open:
            is_open = False
            for stage in sorted(self._at_work):
                at_work = self._at_work[stage]
                is_open |= self._run(video, stage, at_work)
                if (ended := self._ended(video, stage, at_work)) is not None:
                    del self._at_work[stage]
                    yield ended

    def _run(self, video: _Video, stage: int, at_work: _AtWork) -> bool:
        """Whether it has come any further."""
        first, stop = at_work.number, at_work.command.first + at_work.command.count
        while at_work.number < stop:
            op = video.ops[at_work.number]
            passes = video.clock.run(stage, op, at_work.from_s)
            if passes is None:
                break
            if stage == 0:
                video.note(at_work.number)
            self._note_passes(at_work.command.request_id, stage, op, passes)
            at_work.end_s = passes[-1][1]
            at_work.number += 1
        return at_work.number > first

    def _ended(self, video: _Video, stage: int, at_work: _AtWork) -> Ended | None:
        command, at_s = at_work.command, at_work.end_s
        done = command.first + command.count
        if at_work.number < done:
            return None
        if stage == 0 and done == len(video.ops):  # it brings back what is still on its way
            if video.end_s is None:
                return None
            at_s = max(at_s, video.end_s)
        finished = video.finished(done) if stage == 0 else 0
        event = messages.BlocksDone(request_id=command.request_id, rank=command.ranks[0], done=done, finished=finished)
        return Ended(at_s=at_s, command=command, event=event)

    # -- what is recorded ---------------------------------------------------------------------------------------

    def _note_passes(self, request_id: str, stage: int, op: Op, passes: Sequence[tuple[float, float]]) -> None:
        rank = self._placement.denoisers[stage]
        self.busy_s[rank, STEP] += sum(end_s - start_s for start_s, end_s in passes)
        if self._keeps_spans:
            self.spans += [
                self._span(request_id, rank, Role.DENOISER, STEP, times_s, index=op.step, block=op.block)
                for times_s in passes
            ]

    def _note_pieces(self, command: messages.Command, rank: int, start_s: float, pieces: Sequence[Piece]) -> float:
        """When they end."""
        block = command.block if isinstance(command, messages.DecodeBlock) else None
        for piece in pieces:
            end_s = start_s + piece.seconds
            self.busy_s[rank, piece.what] += piece.seconds
            self.payload_bytes[rank, piece.what] += piece.payload_bytes
            if self._keeps_spans:
                index = block if piece.what == DECODE else None
                span = self._span(
                    command.request_id, rank, _ROLES[type(command)], piece.what, (start_s, end_s), index=index,
                    block=index, payload_bytes=piece.payload_bytes,
                )  # fmt: skip
                self.spans.append(span)
            start_s = end_s
        return start_s

    def _span(
        self,
        request_id: str,
        rank: int,
        role: Role,
        what: str,
        times_s: tuple[float, float],
        *,
        index: int | None = None,
        block: int | None = None,
        payload_bytes: int = 0,
    ) -> Span:
        return Span(
            request_id=request_id,
            rank=self._first_rank + rank,
            role=role,
            what=what,
            start_s=times_s[0],
            end_s=times_s[1],
            index=index,
            block=block,
            payload_bytes=payload_bytes,
        )


_ROLES: dict[type[messages.Command], Role] = {
    messages.Encode: Role.ENCODER,
    messages.DenoiseBlocks: Role.DENOISER,
    messages.DecodeBlock: Role.DECODER,
}
