"""Ranks as the block scheduler's tests see them: they do no work, but wait for each other inside their commands as real
stages do, keep what those keep, and complain about every command that a real one could not run."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan, Prefix
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.core.snapshots import Saving, Snapshot
from pipedit.plan.block_scheduler import BlockPolicy
from pipedit.plan.jobs import Work

REQUEST = VideoRequest(prompt="x")
ALL = 10**9  # more operations than there are
NEVER = -1  # the epoch before the first


def plan_of(blocks: int | None, steps: int, prefix: Prefix = Prefix.CACHE) -> BlockPlan:
    """So many blocks; the last one is shorter. None: endless."""
    latents = None if blocks is None else 2 * blocks - 1
    return BlockPlan(latents=latents, block_latents=2, context_latents=1, num_steps=steps, prefix=prefix)


def work_of(plan: BlockPlan, priority: int = 0) -> Work:
    return Work(num_steps=plan.num_steps, num_chunks=1, blocks=plan, priority=priority)


def published(plan: BlockPlan) -> Iterator[tuple[int, int]]:
    """(block, step), in iterations, each from the newest block to the oldest one in flight."""
    iteration = 0
    while True:
        newest = iteration if plan.num_blocks is None else min(iteration, plan.num_blocks - 1)
        oldest = max(0, iteration - plan.num_steps + 1)
        if oldest > newest:
            return
        yield from ((block, iteration - block) for block in range(newest, oldest - 1, -1))
        iteration += 1


class Order:
    """The list of operations of a plan, and what each stands on. Results come back in the order of the list."""

    def __init__(self, plan: BlockPlan) -> None:
        self._plan, self._coming = plan, published(plan)
        self._ops: list[tuple[int, int]] = []
        self._numbers: dict[tuple[int, int], int] = {}
        self._finished = [0]

    def needed(self, number: int) -> int:
        """So many results must be back before the first stage runs the operation of this number."""
        self._reach(number + 1)
        block, step = self._ops[number]
        needed = self._numbers[block, step - 1] + 1 if step > 0 else 0
        if self._plan.prefix is Prefix.RERUN and block > 0:
            needed = max(needed, self._numbers[block - 1, step] + 1)
        return needed

    def finished(self, results: int) -> int:
        """Blocks that are done when so many results are back."""
        self._reach(results)
        return self._finished[results]

    def _reach(self, count: int) -> None:
        while len(self._ops) < count:
            block, step = next(self._coming)
            self._numbers[block, step] = len(self._ops)
            self._ops.append((block, step))
            self._finished.append(self._finished[-1] + (step == self._plan.num_steps - 1))


order_of = functools.cache(Order)


@dataclasses.dataclass(kw_only=True)
class Video:
    """How far a request has come on the ranks. `given` and `run`: operations, for each stage."""

    given: list[int]
    run: list[int]
    epoch: int = NEVER
    results: int = 0  # back on the first stage
    told: int = 0  # finished blocks that the scheduler has heard of
    dropped: int = 0  # blocks that the first stage keeps no longer
    decoded: int = 0
    cancelled: bool = False
    failed: bool = False
    start: int = 0  # operations in the snapshot that it began with
    resume: Snapshot | None = None
    cut: int | None = None  # after so many operations the next snapshot is due


class BlockRanks:
    """`take` what the scheduler says, then `finish` it on each rank that can: this returns the rank's report.

    `ahead`: so many operations a stage may be ahead of the next one before its messages wait to be taken. `lag`: so
    many results the first stage leaves on their way, if it does not need them, before it waits. A rank that
    is `doomed` right after it took a command fails at it. What is inside a command happens as soon as it can: no answer
    depends on when it does. `saving` and `resume`: of the requests that are saved, and that begin with a snapshot.
    """

    def __init__(
        self,
        placement: Placement,
        plans: Mapping[str, BlockPlan],
        policy: BlockPolicy,
        *,
        ahead: int = 1,
        lag: int | None = None,
    ) -> None:
        self.placement, self.plans, self.policy, self.ahead = placement, plans, policy, ahead
        self.lag = len(placement.denoisers) + 2 if lag is None else lag
        self.stages, self.decoder = placement.denoisers, placement.decoders[0]
        self.in_flight: dict[int, messages.Command] = {}
        self.videos: dict[str, Video] = {}
        self.saving: dict[str, Saving] = {}
        self.resume: dict[str, Snapshot] = {}
        self.kept: set[tuple[int, str]] = set()
        self.fresh: set[int] = set()  # took a command, and nothing has happened since
        self._set_up()

    def _set_up(self) -> None:
        self.met = dict.fromkeys(self.stages, NEVER)  # the newest epoch in which the stage has come to meet the others
        self.left = dict.fromkeys(self.stages, NEVER)  # the newest one in which it has abandoned them
        self.doomed: dict[int, int] = {}  # rank -> the operation at which it fails (others than stages: any number)

    def work(self, request_id: str, priority: int = 0) -> Work:
        saving, resume = self.saving.get(request_id), self.resume.get(request_id)
        return dataclasses.replace(work_of(self.plans[request_id], priority), saving=saving, resume=resume)

    # -- commands -----------------------------------------------------------------------------------------------

    def take(self, command: messages.Command) -> None:
        (rank,) = command.ranks
        assert rank in self.placement.world and rank not in self.in_flight, f"{command} while {self.in_flight}"
        others = [c for c in self.in_flight.values() if c.request_id != command.request_id]
        if not isinstance(command, messages.Release):
            assert all(isinstance(other, messages.Release) for other in others), f"{command} while {others}"
        match command:
            case messages.Encode():
                self._take_encode(command, rank)
            case messages.DenoiseBlocks():
                self._take_blocks(command, rank)
            case messages.DecodeBlock():
                self._take_decode(command, rank)
            case messages.SaveBlocks():
                self._take_save(command, rank)
            case messages.Release():
                self._take_release(command, rank)
        self.in_flight[rank] = command
        self.fresh.add(rank)
        if not isinstance(command, messages.Release):
            self.kept.add((rank, command.request_id))

    def _take_encode(self, command: messages.Encode, rank: int) -> None:
        encoders = self.placement.encoders
        assert rank in (encoders if self.placement.encodes_locally else encoders[:1]), command
        assert (rank, command.request_id) not in self.kept, f"not forgotten: {command}"
        if not any(isinstance(other, messages.Encode) for other in self.in_flight.values()):
            self.videos[command.request_id] = self._begun(command.request_id)

    def _begun(self, request_id: str) -> Video:
        resume = self.resume.get(request_id)
        start, decoded = (0, 0) if resume is None else (resume.at, resume.decoded)
        video = Video(
            given=[start] * len(self.stages), run=[start] * len(self.stages), results=start, told=decoded,
            dropped=decoded, decoded=decoded, start=start, resume=resume,
        )  # fmt: skip
        self._plan_cut(request_id, video, start)
        return video

    def _plan_cut(self, request_id: str, video: Video, after: int) -> None:
        plan, saving = self.plans[request_id], self.saving.get(request_id)
        if saving is not None:
            cut = after + saving.every * self.policy.operations(plan)
            video.cut = cut if plan.num_operations is None or cut < plan.num_operations else None

    def _take_blocks(self, command: messages.DenoiseBlocks, rank: int) -> None:
        video, stage, plan = self.videos[command.request_id], self.stages.index(rank), self.plans[command.request_id]
        stop, total = command.first + command.count, plan.num_operations
        assert command.blocks == plan and not video.failed and command.request == REQUEST, command
        assert video.run[stage] == video.given[stage] == command.first < stop, f"{video} for {command}"
        if stage == 0:
            left = min((ALL if end is None else end) - command.first for end in (total, video.cut))
            assert not video.cancelled, f"begun after the cancel: {command}"
            assert video.told - video.decoded < self.policy.blocks_waiting, f"too many blocks wait: {video}"
            assert command.count == min(self.policy.operations(plan), left), command
            assert command.decoded == video.decoded, f"{video} for {command}"
            video.dropped = command.decoded
        else:
            assert stop <= video.given[0], f"the first stage may never do {command}"
        is_first = command.first == video.start
        assert command.resume == (video.resume.folder if video.resume is not None and is_first else None), command
        if is_first:
            self._check_conditioning(command, rank)
        self._check_epoch(command, video, rank)
        video.given[stage] = stop

    def _check_conditioning(self, command: messages.DenoiseBlocks, rank: int) -> None:
        local, at = self.placement.encodes_locally, command.conditioning_at
        assert (at is None) == local, command
        assert (rank if at is None else at, command.request_id) in self.kept, f"no conditioning for {command}"

    def _check_epoch(self, command: messages.DenoiseBlocks, video: Video, rank: int) -> None:
        is_first = command.first == video.start
        epoch = video.epoch = command.epoch if is_first and rank == self.stages[0] else video.epoch
        assert command.epoch == epoch, f"the others are in epoch {epoch}: {command}"
        assert epoch >= self.met[rank] and epoch > max(self.left.values()), f"links are gone: {command}, {self.left}"
        self.met[rank] = epoch if len(self.stages) > 1 else NEVER

    def _take_decode(self, command: messages.DecodeBlock, rank: int) -> None:
        video = self.videos[command.request_id]
        assert rank == self.decoder and command.latents_at == self.stages[0], command
        assert command.blocks == self.plans[command.request_id], command
        assert not video.failed and not video.cancelled, f"begun after the end: {command}"
        assert command.block == video.decoded, f"{video} for {command}"
        assert self._has_latents(command), f"{video} for {command}"
        goes_on = video.resume is not None and 0 < command.block == video.resume.decoded
        assert command.resume == (video.resume.folder if video.resume is not None and goes_on else None), command

    def _take_save(self, command: messages.SaveBlocks, rank: int) -> None:
        video, plan = self.videos[command.request_id], self.plans[command.request_id]
        assert rank in (*self.stages, self.decoder) and command.request == REQUEST and command.blocks == plan, command
        assert not video.failed and not video.cancelled, f"begun after the end: {command}"
        assert video.given == video.run == [command.at] * len(self.stages), f"not level: {video} for {command}"
        assert command.at == video.cut and command.decoded == video.decoded, f"{video} for {command}"
        assert command.path == self.saving[command.request_id].path(command.at), command
        others = [other for other in self.in_flight.values() if not isinstance(other, messages.Release)]
        assert all(isinstance(other, messages.SaveBlocks) for other in others), f"{command} while {others}"

    def _take_release(self, command: messages.Release, rank: int) -> None:
        video = self.videos[command.request_id]
        assert (rank, command.request_id) in self.kept, f"nothing to forget: {command}"
        assert command.failed == video.failed, f"{video} for {command}"
        if rank in self.stages and not video.failed:
            most = video.given[0]
            assert video.given == video.run == [most] * len(self.stages), f"messages are left over: {video}"

    def _has_latents(self, command: messages.DecodeBlock) -> bool:
        video = self.videos[command.request_id]
        finished = order_of(self.plans[command.request_id]).finished(video.results)
        return video.dropped <= command.block < finished and (self.stages[0], command.request_id) in self.kept

    # -- inside commands ----------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Everything that can happen inside commands happens."""
        self.fresh.clear()
        is_moving = True
        while is_moving:
            is_moving = False
            for stage, rank in enumerate(self.stages):
                command = self.in_flight.get(rank)
                if not isinstance(command, messages.DenoiseBlocks):
                    continue
                run = self.videos[command.request_id].run
                while not self._is_at_its_end(rank, command) and self._waits_for(rank, command) is None:
                    run[stage] += 1
                    is_moving = True

    def _is_at_its_end(self, rank: int, command: messages.DenoiseBlocks) -> bool:
        """It has run all operations that it is going to run."""
        run = self.videos[command.request_id].run[self.stages.index(rank)]
        return run == min(command.first + command.count, self.doomed.get(rank, run + 1))

    def _waits_for(self, rank: int, command: messages.DenoiseBlocks) -> int | None:
        """The rank without which this one cannot run its next operation, or end if that was the last one."""
        video, stage, last = self.videos[command.request_id], self.stages.index(rank), len(self.stages) - 1
        number, total = video.run[stage], self.plans[command.request_id].num_operations
        absent = [other for other in self.stages if last and self.met[other] != command.epoch]
        if absent:
            return absent[0]
        is_over = number == command.first + command.count
        if is_over and number != total:
            return None
        if stage > 0 and not is_over and video.run[stage - 1] <= number:
            return self.stages[stage - 1]
        if stage < last and video.run[stage + 1] < number - (0 if is_over else self.ahead - 1):
            return self.stages[stage + 1]
        if stage == 0 and not self._bring_back(command.request_id, None if is_over else number):
            return self.stages[last]
        return None

    def _bring_back(self, request_id: str, number: int | None) -> bool:
        """Applies the results that are needed for the operation; None: all. Returns whether they were there."""
        video = self.videos[request_id]
        needed = video.run[0]
        if number is not None:
            needed = max(order_of(self.plans[request_id]).needed(number), needed - self.lag)
        video.results = max(video.results, min(needed, video.run[-1]))
        return video.results >= needed

    # -- answers ------------------------------------------------------------------------------------------------

    def can_finish(self, rank: int) -> bool:
        """Whether the rank's command comes to an end, good or bad, with nobody else's help."""
        command = self.in_flight[rank]
        if not isinstance(command, messages.DenoiseBlocks):
            return True
        self._advance()
        if rank in self.doomed and self._is_at_its_end(rank, command):
            return True
        other = self._waits_for(rank, command)
        return other is None or self._has_left(other, command)

    def can_be_disturbed(self, rank: int) -> bool:
        """Whether what happened to others may make it fail, although it could come to a good end."""
        command = self.in_flight[rank]
        if isinstance(command, messages.DecodeBlock):
            return not self._has_latents(command)
        if not isinstance(command, messages.DenoiseBlocks):
            return False
        number, count = self.stages.index(rank), len(self.stages)
        neighbours = {self.stages[(number + side) % count] for side in (-1, 1)} - {rank}
        return any(self._has_left(other, command) for other in neighbours)

    def _has_left(self, other: int, command: messages.DenoiseBlocks) -> bool:
        return self.met[other] == self.left[other] == command.epoch

    def finish(self, rank: int) -> messages.Event:
        """The rank's answer. It must be able to give one."""
        assert self.can_finish(rank), f"{rank} waits in {self.in_flight}"
        self._advance()
        command = self.in_flight[rank]
        is_stuck = isinstance(command, messages.DenoiseBlocks) and self._waits_for(rank, command) is not None
        if rank in self.doomed or is_stuck:
            return self.fail(rank)
        del self.in_flight[rank]
        video, request_id = self.videos[command.request_id], command.request_id
        match command:
            case messages.Encode():
                return messages.Encoded(request_id=request_id, rank=rank)
            case messages.DenoiseBlocks():
                done = video.run[self.stages.index(rank)]
                if rank == self.stages[0]:
                    video.told = order_of(command.blocks).finished(video.results)
                told = video.told if rank == self.stages[0] else 0
                return messages.BlocksDone(request_id=request_id, rank=rank, done=done, finished=told)
            case messages.DecodeBlock():
                video.decoded += 1
                return messages.BlockDecoded(request_id=request_id, rank=rank, block=command.block)
            case messages.SaveBlocks():
                return self._saved(command, video, rank)
        assert isinstance(command, messages.Release)
        if command.failed:
            self._leave(rank)
        self._forget(rank, request_id)
        return messages.Released(request_id=request_id, rank=rank)

    def _saved(self, command: messages.SaveBlocks, video: Video, rank: int) -> messages.Event:
        told = 0
        if rank == self.stages[0]:
            video.results = command.at
            told = video.told = order_of(command.blocks).finished(command.at)
        if not any(isinstance(other, messages.SaveBlocks) for other in self.in_flight.values()):
            self._plan_cut(command.request_id, video, command.at)
        return messages.BlocksSaved(
            request_id=command.request_id, rank=rank, at=command.at, num_bytes=100 + rank, finished=told
        )

    def fail(self, rank: int) -> messages.Event:
        """The rank fails as far as it has come."""
        self._advance()
        command = self.in_flight.pop(rank)
        self.doomed.pop(rank, None)
        if isinstance(command, messages.Release):
            self._forget(rank, command.request_id)
        else:
            self.videos[command.request_id].failed = True
        self._leave(rank)  # whatever it was at
        error = RuntimeError("broken")
        return messages.CommandFailed(request_id=command.request_id, rank=rank, doing="trying", error=error)

    def doom(self, rank: int, operations: int = 0) -> None:
        """It will fail at what it has just begun, after so many operations."""
        assert rank in self.fresh, rank
        self.doomed[rank] = getattr(self.in_flight[rank], "first", 0) + operations

    def lose(self) -> None:
        """All of them die; fresh ones come."""
        for state in (self.in_flight, self.videos, self.kept, self.fresh):
            state.clear()
        self._set_up()

    def _forget(self, rank: int, request_id: str) -> None:
        self.kept.remove((rank, request_id))
        if not any(held == request_id for _, held in self.kept):
            del self.videos[request_id]

    def _leave(self, rank: int) -> None:
        if rank in self.stages:
            self.left[rank] = self.met[rank]
