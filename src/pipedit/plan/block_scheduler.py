"""The scheduler of videos that are made block by block (DualParal): a state machine without I/O, like the request
scheduler (see scheduler.py), with the same questions and answers.

All stages run the same list of operations and meet inside them, so each gets its commands alone: the first stage is
given the next piece of the list as soon as it has done the one before, the others follow as fast as they can, and the
pipeline never runs empty between two commands. Whatever one stage was given the others are given too, even when the
video is cancelled meanwhile: they would wait for each other. After a failure they would wait for what never comes, so
each is told to let go as soon as it has no command.

Finished blocks are decoded in order while later ones are denoised. One video is under way at a time.

A video that is to be saved pauses now and then: the first stage is given nothing beyond the next cut, and when the
others are there too, and the decoder has done what it is at, all of them write down what they are at.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan
from pipedit.core.errors import WorkerDiedError
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.core.snapshots import Snapshot
from pipedit.plan.jobs import Job, Phase, Work
from pipedit.plan.scheduling import Advance
from pipedit.plan.waiting_line import WaitingLine


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPolicy:
    """`blocks_waiting`: finished blocks that may wait for the decoder; beyond that the first stage stops
    (back-pressure). `patience`: how often younger requests of higher priority may go first. `piece`: operations in one
    command (None: about one pass over the blocks in flight)."""

    blocks_waiting: int = 4
    patience: int = 8
    piece: int | None = None

    def __post_init__(self) -> None:
        counts = (self.blocks_waiting, self.patience, 1 if self.piece is None else self.piece)
        assert min(counts) >= 1, self  # else nothing would ever begin, or go on

    def operations(self, plan: BlockPlan) -> int:
        in_flight = plan.num_steps if plan.num_blocks is None else min(plan.num_steps, plan.num_blocks)
        return self.piece or in_flight


@dataclasses.dataclass(kw_only=True)
class BlockJob(Job):
    """`given` and `answered`: operations that each stage was told to run, and has run. Blocks are counted from 0 in
    time: so many have been `finished`, and so many `decoded`. All count what was done before the snapshot, if any, with
    which the job begins. `saved_at`: operations before the last snapshot; `saved`: of the one that is being made, the
    bytes of each file."""

    given: dict[int, int] = dataclasses.field(default_factory=dict)
    answered: dict[int, int] = dataclasses.field(default_factory=dict)
    finished: int = 0
    decoded: int = 0
    epoch: int = 0  # of its exchanges
    saved_at: int = 0
    saved: dict[int, int] = dataclasses.field(default_factory=dict)

    def begin_denoising(self, stages: Sequence[int]) -> None:
        self.move(Phase.ENCODED)
        self.move(Phase.DENOISING)
        self.given, self.answered = dict.fromkeys(stages, self.start), dict.fromkeys(stages, self.start)
        self.saved_at = self.start
        if self.work.resume is not None:
            self.finished = self.decoded = self.work.resume.decoded

    @property
    def start(self) -> int:
        """Operations that were run before this job began."""
        return 0 if self.work.resume is None else self.work.resume.at

    @property
    def plan(self) -> BlockPlan:
        assert self.work.blocks is not None
        return self.work.blocks

    @property
    def is_stopping(self) -> bool:
        """Nothing new is begun for it."""
        return self.cancel_wanted or self.failure is not None

    @property
    def is_level(self) -> bool:
        """Every stage has run what any stage was given."""
        most = max(self.given.values(), default=0)
        return all(count == most for count in self.answered.values())


class BlockScheduler:
    """`placement`: the denoisers are the stages, in order; one of the decoders' group decodes."""

    def __init__(self, placement: Placement, policy: BlockPolicy | None = None) -> None:
        self._placement, self._policy = placement, policy or BlockPolicy()
        self._stages, self._decoder = placement.denoisers, placement.decoders[0]
        self._jobs: dict[str, BlockJob] = {}
        self._queue: WaitingLine[BlockJob] = WaitingLine(patience=self._policy.patience)
        self._current: BlockJob | None = None
        self._submitted = 0
        self._live = 0
        self._busy: dict[int, messages.Command] = {}  # by rank
        self._to_release: list[messages.Release] = []  # one for each rank
        self._epoch = 0

    # -- wishes and reports -------------------------------------------------------------------------------------

    def submit(self, request_id: str, request: VideoRequest, work: Work) -> None:
        assert request_id not in self._jobs, f"request id {request_id} is already in use"
        assert work.blocks is not None and work.blocks.num_operations != 0, work
        job = BlockJob(request_id=request_id, request=request, work=work, number=self._submitted)
        self._jobs[request_id] = job
        self._submitted += 1
        self._live += 1
        self._queue.push(job)

    def cancel(self, request_id: str) -> None:
        """Ends the request when all stages have run what one of them was given. No effect on one that is over."""
        job = self._jobs.get(request_id)
        if job is None or job.is_over:
            return
        job.cancel_wanted = True
        self._settle(job)

    def receive(self, event: messages.Event) -> None:
        """Takes a rank's report."""
        command = self._answered_by(event)
        if command is None:
            return
        del self._busy[event.rank]
        if isinstance(event, messages.CommandFailed):
            self._epoch += 1  # whatever it was at: stages let go of each other, by themselves or when they are told to
        job = self._jobs.get(event.request_id)
        if job is not None and not job.is_over:
            self._note(job, command, event)
            self._settle(job)

    def lose_workers(self, error: WorkerDiedError) -> None:
        """All ranks are gone, and with them the video that was under way. Others have not begun."""
        self._forget_ranks()
        job = self._current
        if job is None:
            return
        if not job.is_stopping:
            job.failure = messages.CommandFailed(
                request_id=job.request_id, rank=error.rank, doing=error.doing, error=error
            )
        self._end(job, Phase.CANCELLED if job.failure is None else Phase.FAILED)

    def abandon(self) -> None:
        """There will be no workers any more: ends every request."""
        self._forget_ranks()
        for job in self._jobs.values():
            if not job.is_over:
                self._end(job, Phase.FAILED if job.failure is not None else Phase.CANCELLED)

    # -- what it knows ------------------------------------------------------------------------------------------

    def job(self, request_id: str) -> BlockJob:
        return self._jobs[request_id]

    def speaks(self, event: messages.Event) -> bool:
        """See scheduling.Scheduler: the first stage tells for all of them, and the first encoder."""
        match self._answered_by(event):
            case messages.Encode():
                return event.rank == self._placement.encoders[0]
            case messages.DenoiseBlocks() | messages.SaveBlocks():
                return event.rank == self._stages[0]
            case messages.DecodeBlock():
                return True
        return False

    def advance(self, event: messages.Event) -> Advance | None:
        """See scheduling.Scheduler. A unit of denoising is one step of one block."""
        plan = self._jobs[event.request_id].plan
        match event:
            case messages.Encoded():
                return Advance(stage="encode", what="encode", done=1, total=1)
            case messages.BlocksDone():
                return Advance(stage="denoise", what="step", done=event.done, total=plan.num_operations)
            case messages.BlockDecoded():
                return Advance(stage="decode", what="decode", done=event.block + 1, total=plan.num_blocks)
        return None

    def forget(self, request_id: str) -> None:
        """Drops the record of a request that is over."""
        assert self._jobs[request_id].is_over
        del self._jobs[request_id]

    def is_held(self, request_id: str) -> bool:
        """Whether some rank still works on the request or has to forget it."""
        waiting = [*self._busy.values(), *self._to_release]
        return any(command.request_id == request_id for command in waiting)

    @property
    def is_idle(self) -> bool:
        """No request is under way and no rank owes an answer."""
        return not self._busy and not self._to_release and self._live == 0

    def _answered_by(self, event: messages.Event) -> messages.Command | None:
        command = self._busy.get(event.rank)
        return command if command is not None and command.request_id == event.request_id else None

    # -- commands -----------------------------------------------------------------------------------------------

    def next_commands(self) -> list[messages.Command]:
        """Everything that can be sent now. Sending is the caller's duty."""
        return [*self._releases(), *self._work()]

    def _releases(self) -> Iterator[messages.Command]:
        waiting, self._to_release = self._to_release, []
        for release in waiting:
            (rank,) = release.ranks
            if rank in self._busy:
                self._to_release.append(release)
            else:
                yield self._give(release)

    def _work(self) -> Iterator[messages.Command]:
        job = self._current
        if job is None:
            yield from self._begin()
        elif job.phase is Phase.DENOISING and self._is_at_cut(job):
            yield from self._save(job)
        elif job.phase is Phase.DENOISING:
            yield from self._decode(job)  # first: a rank that does both lets nobody wait for finished frames
            yield from self._denoise(job)

    def _begin(self) -> Iterator[messages.Command]:
        """The next video, as soon as its prompt can be encoded: until then a more urgent one may come."""
        encoders, encodes_locally = self._placement.encoders, self._placement.encodes_locally
        ranks = encoders if encodes_locally else encoders[:1]
        if not self._queue or any(rank in self._busy for rank in ranks):
            return
        self._current = job = self._queue.pop()
        job.move(Phase.ENCODING)
        job.encoded_at = None if encodes_locally else ranks[0]
        job.awaited = set(ranks)
        for rank in ranks:
            yield self._give(messages.Encode(request_id=job.request_id, ranks=(rank,), request=job.request), job)

    def _denoise(self, job: BlockJob) -> Iterator[messages.Command]:
        if all(given == job.start for given in job.given.values()):
            if any(rank in self._busy for rank in self._stages):
                return  # they meet in their first commands: one that is not there could not let go of the others
            job.epoch = self._epoch
        for rank in self._stages:
            if rank not in self._busy and (count := self._next_piece(job, rank)):
                first = job.given[rank]
                job.given[rank] += count
                yield self._give(self._piece(job, rank, first, count), job)

    def _next_piece(self, job: BlockJob, rank: int) -> int:
        """How many operations the stage may be given now."""
        lead, most = self._stages[0], self._policy.operations(job.plan)
        if job.failure is not None:
            return 0
        if rank != lead:
            return min(most, job.given[lead] - job.given[rank])
        if job.cancel_wanted or job.finished - job.decoded >= self._policy.blocks_waiting:
            return 0
        ends = [end for end in (job.plan.num_operations, self._next_cut(job)) if end is not None]
        return min([most, *(end - job.given[rank] for end in ends)])

    def _piece(self, job: BlockJob, rank: int, first: int, count: int) -> messages.DenoiseBlocks:
        return messages.DenoiseBlocks(
            request_id=job.request_id,
            ranks=(rank,),
            request=job.request,
            epoch=job.epoch,
            first=first,
            count=count,
            blocks=job.plan,
            conditioning_at=job.encoded_at,
            decoded=job.decoded,
            resume=job.work.resume.folder if job.work.resume is not None and first == job.start else None,
        )

    def _decode(self, job: BlockJob) -> Iterator[messages.Command]:
        if job.is_stopping or self._decoder in self._busy or job.finished == job.decoded:
            return
        resume = job.work.resume
        command = messages.DecodeBlock(
            request_id=job.request_id,
            ranks=(self._decoder,),
            request=job.request,
            epoch=job.epoch,
            block=job.decoded,
            blocks=job.plan,
            latents_at=self._stages[0],
            resume=resume.folder if resume is not None and 0 < job.decoded == resume.decoded else None,
        )
        yield self._give(command, job)

    # -- snapshots ----------------------------------------------------------------------------------------------

    def _next_cut(self, job: BlockJob) -> int | None:
        """After so many operations the video is saved. What is done by then is not."""
        saving, total = job.work.saving, job.plan.num_operations
        if saving is None:
            return None
        cut = job.saved_at + saving.every * self._policy.operations(job.plan)
        return cut if total is None or cut < total else None

    def _is_at_cut(self, job: BlockJob) -> bool:
        return not job.is_stopping and job.is_level and job.given[self._stages[0]] == self._next_cut(job)

    def _save(self, job: BlockJob) -> Iterator[messages.Command]:
        """The decoder comes to the end of what it is at; then it begins nothing before all have been saved."""
        ranks, saving, at = sorted({*self._stages, self._decoder}), job.work.saving, job.given[self._stages[0]]
        if saving is None or any(rank in self._busy for rank in ranks) or job.awaited:
            return
        job.awaited, job.saved = set(ranks), {}
        for rank in ranks:
            command = messages.SaveBlocks(
                request_id=job.request_id,
                ranks=(rank,),
                request=job.request,
                blocks=job.plan,
                path=saving.path(at),
                at=at,
                decoded=job.decoded,
            )
            yield self._give(command, job)

    def _note_saved(self, job: BlockJob, command: messages.SaveBlocks, event: messages.BlocksSaved) -> None:
        job.awaited.discard(event.rank)
        job.saved[event.rank] = event.num_bytes
        if event.rank == self._stages[0]:
            job.finished = event.finished
        if not job.awaited:
            job.saved_at = command.at
            job.snapshot = Snapshot(
                folder=command.path, at=command.at, decoded=command.decoded, num_bytes=dict(job.saved)
            )

    def _give(self, command: messages.Command, job: BlockJob | None = None) -> messages.Command:
        (rank,) = command.ranks
        self._busy[rank] = command
        if job is not None:
            job.holders.add(rank)
        return command

    # -- endings ------------------------------------------------------------------------------------------------

    def _note(self, job: BlockJob, command: messages.Command, event: messages.Event) -> None:
        match command, event:
            case messages.Release(), _:
                pass  # no news of the job: it has failed before, or bears the name of one that is over
            case _, messages.CommandFailed():
                job.failure = job.failure or event
            case messages.Encode(), _:
                job.awaited.discard(event.rank)
                if not job.awaited:
                    job.begin_denoising(self._stages)
            case messages.DenoiseBlocks(), messages.BlocksDone():
                job.answered[event.rank] = event.done
                if event.rank == self._stages[0]:
                    job.finished = event.finished
            case messages.DecodeBlock(), _:
                job.decoded = command.block + 1
            case messages.SaveBlocks(), messages.BlocksSaved():
                self._note_saved(job, command, event)

    def _settle(self, job: BlockJob) -> None:
        """Ends a job that is to end, as soon as no rank is at work on it."""
        if job.phase is Phase.QUEUED:
            if job.cancel_wanted:
                self._end(job, Phase.CANCELLED)
            return
        if job.failure is not None:  # others may wait for a rank that is free, and that is not given what they wait for
            self._release(job, [rank for rank in job.holders if rank not in self._busy])
        if any(command.request_id == job.request_id for command in self._busy.values()):
            return
        if job.failure is not None:
            self._end(job, Phase.FAILED)
        elif job.cancel_wanted and job.is_level:
            self._end(job, Phase.CANCELLED)
        elif job.decoded == job.plan.num_blocks:
            job.move(Phase.DENOISED)
            job.move(Phase.DECODING)
            self._end(job, Phase.DONE)

    def _end(self, job: BlockJob, phase: Phase) -> None:
        if job is self._current:
            self._current = None
        elif job.phase is Phase.QUEUED:
            self._queue.remove(job)
        job.move(phase)
        job.awaited.clear()
        self._live -= 1
        self._release(job, sorted(job.holders))

    def _release(self, job: BlockJob, ranks: Sequence[int]) -> None:
        """Those of the ranks that keep something are to forget it as soon as they are free."""
        for rank in sorted(job.holders.intersection(ranks)):
            failed = job.failure is not None
            self._to_release.append(messages.Release(request_id=job.request_id, ranks=(rank,), failed=failed))
        job.holders.difference_update(ranks)

    def _forget_ranks(self) -> None:
        """There are no ranks any more that could owe an answer or keep something."""
        self._busy.clear()
        self._to_release.clear()
        if self._current is not None:
            self._current.holders.clear()
