"""The request scheduler: a state machine without I/O. Events in, commands out; no clock, no threads, no torch.

Two drivers run it: the engine (real workers, real time) and the simulator (predicted durations, virtual time). What it
decides is a pure function of the calls and their order (how long work took is in the events), so every policy can be
tested in milliseconds.

Usage: `submit` and `cancel` state wishes, `receive` reports what a rank did; after each, `next_commands` returns what
to send now. A rank has at most one command in flight, and a request has too. All ranks of a command are free when it
is given out, so ranks that wait for each other inside a command never do so in different orders; and they become free
together, so that no other request comes between two steps because some ranks have answered sooner than others.
"""

import dataclasses
import math
from collections.abc import Iterator

from pipedit.core import messages
from pipedit.core.errors import WorkerDiedError
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.plan.aco_gate import AcoGate, AcoMode, Help, helper_groups, shares_with_help
from pipedit.plan.jobs import Job, Phase, Work
from pipedit.plan.scheduling import Advance
from pipedit.plan.waiting_line import WaitingLine

_NEXT = {Phase.ENCODED: Phase.DENOISING, Phase.DENOISED: Phase.DECODING}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """`encoded_ahead`: prompts that are encoded before denoisers are free for them. `latents_waiting`: for each
    decoder, requests that are being denoised or wait to be decoded; beyond that no other is begun (back-pressure).
    `spread_decode`: a request that is alone is decoded by all decoders together. `patience`: how often younger requests
    of higher priority may go first. `attempts`: how often a request is denoised, if workers are lost.

    `grain`: steps or chunks in one command, at least; 0: all of them, for long simulations (then nothing changes inside
    a phase). `least_command_s`: once it is known how long those of a request take, a command covers as few as take so
    long together (or `grain`, if that is more), because where a step takes milliseconds, what passes between two
    commands counts. A step that takes so long is commanded alone. So a cancel, a priority or a decoder that becomes
    free waits for one step, or for less than twice this long. 0: the grain alone decides."""

    aco: AcoMode = AcoMode.AUTO
    encoded_ahead: int = 2
    latents_waiting: int = 2
    spread_decode: bool = True
    patience: int = 8
    attempts: int = 2
    grain: int = 1
    least_command_s: float = 0.05

    def __post_init__(self) -> None:
        counts = (self.encoded_ahead, self.latents_waiting, self.patience, self.attempts)
        assert min(counts) >= 1 and self.grain >= 0, self  # else nothing would ever begin, or end
        assert self.least_command_s >= 0, self

    def portion(self, left: int, unit_s: float) -> int:
        """How many of the steps or chunks that are left one command covers, if each takes `unit_s` (0: not known)."""
        if self.grain == 0 or 0 < left * unit_s <= self.least_command_s:
            return left
        enough = math.ceil(self.least_command_s / unit_s) if unit_s > 0 else 1
        return min(max(self.grain, enough), left)


class RequestScheduler:
    """Higher priority first, then first come, first served; what has begun and is older always wins a free group.

    On one colocated group this is serial generation. On disjoint groups the same rule pipelines requests: decoders work
    on request k while the denoisers have k + 1 and k + 2 is encoded; decoders without work help to denoise (Aco).
    """

    def __init__(self, placement: Placement, policy: Policy | None = None) -> None:
        self._placement, self._policy = placement, policy or Policy()
        self._gate = AcoGate(self._policy.aco)
        self._jobs: dict[str, Job] = {}
        self._queue: WaitingLine[Job] = WaitingLine(patience=self._policy.patience)
        self._under_way: dict[str, Job] = {}
        self._live = 0
        self._submitted = 0
        self._busy: dict[int, str] = {}  # rank -> request for which it, or others with it, are at work
        self._to_release: list[messages.Release] = []  # one for each rank
        self._help: dict[str, Help] = {}  # request -> what the gate has chosen for its step in flight
        self._epoch = 0

    # -- wishes and reports -------------------------------------------------------------------------------------

    def submit(self, request_id: str, request: VideoRequest, work: Work) -> None:
        assert request_id not in self._jobs, f"request id {request_id} is already in use"
        assert work.num_steps >= 1 and work.num_chunks >= 1, work
        job = Job(request_id=request_id, request=request, work=work, number=self._submitted)
        self._jobs[request_id] = job
        self._submitted += 1
        self._live += 1
        self._queue.push(job)

    def cancel(self, request_id: str) -> None:
        """Ends the request as soon as its command in flight is answered. No effect on a request that is over."""
        job = self._jobs.get(request_id)
        if job is None or job.is_over:
            return
        job.cancel_wanted = True
        self._settle(job)

    def receive(self, event: messages.Event) -> None:
        """Takes a rank's report. A command is done, and its ranks are free, when every one of them has reported."""
        job = self._jobs.get(event.request_id)
        if job is None or event.rank not in job.awaited:
            if self._busy.get(event.rank) == event.request_id:  # it has forgotten a request that is over
                del self._busy[event.rank]
            return
        job.awaited.discard(event.rank)
        job.seconds = max(job.seconds, sum(span.duration_s for span in event.spans))
        if isinstance(event, messages.CommandFailed):
            self._note_failure(job, event)
        elif isinstance(event, messages.Encoded):
            job.text_tokens = event.text_tokens
        if not job.awaited:
            self._finish_command(job)

    def lose_workers(self, error: WorkerDiedError) -> None:
        """All ranks are gone, and with them what they kept. The request that the dead rank worked on fails; others
        that had begun will begin again, unless they have used up their attempts."""
        guilty = self._busy.get(error.rank)
        self._forget_ranks()
        for job in list(self._under_way.values()):
            if job.cancel_wanted and job.failure is None:
                self._end(job, Phase.CANCELLED)
            elif job.request_id != guilty and job.failure is None and job.attempts < self._policy.attempts:
                job.begin_again()
                del self._under_way[job.request_id]
                self._queue.push(job)
            else:
                job.failure = job.failure or messages.CommandFailed(
                    request_id=job.request_id, rank=error.rank, doing=error.doing, error=error
                )
                self._end(job, Phase.FAILED)

    def abandon(self) -> None:
        """There will be no workers any more, so nobody answers what is in flight: ends every request."""
        self._forget_ranks()
        for job in self._jobs.values():
            if not job.is_over:
                self._end(job, Phase.FAILED if job.failure is not None else Phase.CANCELLED)

    # -- what it knows ------------------------------------------------------------------------------------------

    def job(self, request_id: str) -> Job:
        return self._jobs[request_id]

    def speaks(self, event: messages.Event) -> bool:
        """See scheduling.Scheduler."""
        command = self._jobs[event.request_id].in_flight
        return command is not None and event.rank == command.ranks[0]

    def advance(self, event: messages.Event) -> Advance | None:
        """See scheduling.Scheduler."""
        job = self._jobs[event.request_id]
        match event:
            case messages.Encoded():
                return Advance(stage="encode", what="encode", done=1, total=1)
            case messages.StepDone():
                return Advance(stage="denoise", what="step", done=event.step + 1, total=job.work.num_steps)
            case messages.ChunkDecoded():
                chunks = job.work.chunks(len(job.decoders))
                return Advance(stage="decode", what="decode", done=event.chunk + 1, total=chunks)
        return None

    def forget(self, request_id: str) -> None:
        """Drops the record of a request that is over."""
        assert self._jobs[request_id].is_over
        del self._jobs[request_id]

    def is_held(self, request_id: str) -> bool:
        """Whether some rank still works on the request or has to forget it."""
        return request_id in self._busy.values() or any(held.request_id == request_id for held in self._to_release)

    @property
    def is_idle(self) -> bool:
        """No request is under way and no rank owes an answer."""
        return not self._busy and not self._to_release and self._live == 0

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
                continue
            self._busy[rank] = release.request_id
            yield release

    def _work(self) -> Iterator[messages.Command]:
        ready = sorted((job for job in self._under_way.values() if job.is_ready), key=Job.order)
        if not self._placement.is_disaggregated:
            yield from self._in_turn(ready)  # one group: whoever is first has it, in whatever phase
        else:
            to_denoise = [job for job in ready if job.phase in (Phase.ENCODED, Phase.DENOISING)]
            to_decode = [job for job in ready if job.phase in (Phase.DENOISED, Phase.DECODING)]
            if self._placement.encodes_locally:
                yield from self._decodings(to_decode)
                yield from self._in_turn(to_denoise)
            else:
                yield from self._in_turn(to_decode)
                yield from self._encodings()
                yield from self._denoisings(to_denoise)  # last: decoders that are left may help
        yield from self._encodings()

    def _in_turn(self, ready: list[Job]) -> Iterator[messages.Command]:
        """For jobs that share their ranks with the encoder."""
        for job in ready:
            yield from self._encodings(rival=job)
            yield from self._decodings([job])
            yield from self._denoisings([job])

    def _encodings(self, rival: Job | None = None) -> Iterator[messages.Command]:
        """Begins requests: all that may be encoded now, or only those that cannot wait for the rival's next command."""
        while self._queue and self._may_encode(self._queue.first, rival) and (ranks := self._encoders()):
            job = self._queue.pop()
            self._under_way[job.request_id] = job
            job.move(Phase.ENCODING)
            job.encoded_at = None if self._placement.encodes_locally else ranks[0]
            yield self._give(job, messages.Encode(request_id=job.request_id, ranks=ranks, request=job.request))

    def _encoders(self) -> tuple[int, ...]:
        """The ranks that can encode a prompt now: all of them, any one, or none."""
        encoders = self._placement.encoders
        if self._placement.encodes_locally:
            return encoders if self._are_free(encoders) else ()
        return tuple(self._free(encoders)[:1])

    def _denoisings(self, ready: list[Job]) -> Iterator[messages.Command]:
        """At most one command: all denoisers share a step."""
        denoisers = self._placement.denoisers
        for job in ready:
            if job.phase not in (Phase.ENCODED, Phase.DENOISING) or not self._are_free(denoisers):
                continue
            if job.phase is Phase.ENCODED:
                if not self._has_room_for_latents:
                    continue
                self._note_overtaking(job)
                job.move(Phase.DENOISING)
                job.attempts += 1
            yield self._give(job, self._step(job))

    def _step(self, job: Job) -> messages.Denoise:
        aco = self._choose_help(job)
        helpers = () if aco is None else tuple(rank for group in aco.helpers for rank in group)
        return messages.Denoise(
            request_id=job.request_id,
            ranks=(*self._placement.denoisers, *helpers),
            request=job.request,
            epoch=self._epoch,
            step=job.done,
            num_steps=self._policy.portion(job.work.num_steps - job.done, job.unit_s),
            parallel=job.work.parallel,
            conditioning_at=job.encoded_at,
            aco=aco,
        )

    def _choose_help(self, job: Job) -> messages.Aco | None:
        """Decoders that have nothing to do now may take heads of this step."""
        config, placement = job.work.parallel, self._placement
        if not placement.is_disaggregated or not job.work.heads or config.world_size != len(placement.denoisers):
            return None
        decoding = self._decoding()
        idle = [rank for rank in placement.decoders if rank not in self._busy and rank not in decoding]
        groups = helper_groups(idle, config)
        shares = shares_with_help(job.work.heads, config.ulysses_degree, len(groups[0]))
        key = (job.work.shape, config, job.work.heads, len(groups[0]))
        choice = self._gate.choose(key, 1 + len(shares))
        aco = None
        if choice:
            aco = messages.Aco(helpers=groups, heads=shares[choice - 1], text_tokens=job.text_tokens)
        if shares:
            self._help[job.request_id] = Help(key=key, choice=choice)
        return aco

    def _decodings(self, ready: list[Job]) -> Iterator[messages.Command]:
        for job in ready:
            if job.phase is Phase.DENOISED:
                ranks = self._decoders_for(job)
                if not ranks:
                    continue
                self._note_overtaking(job)
                job.move(Phase.DECODING)
                job.decoders = ranks
            if job.phase is Phase.DECODING and self._are_free(job.decoders):
                yield self._give(job, self._decode(job))

    def _decode(self, job: Job) -> messages.Decode:
        denoisers = self._placement.denoisers
        return messages.Decode(
            request_id=job.request_id,
            ranks=job.decoders,
            request=job.request,
            epoch=self._epoch,
            chunk=job.done,
            num_chunks=self._policy.portion(job.work.chunks(len(job.decoders)) - job.done, job.unit_s),
            latents_at=None if set(job.decoders) <= set(denoisers) else denoisers[0],
        )

    def _decoders_for(self, job: Job) -> tuple[int, ...]:
        """Who decodes it from the first chunk to the last; nobody as long as they are busy."""
        decoders = self._placement.decoders
        if not self._placement.is_disaggregated or (self._policy.spread_decode and self._live == 1):
            return decoders if self._are_free(decoders) else ()
        decoding = self._decoding()
        free = (rank for rank in self._free(decoders) if rank not in decoding or job.order() < decoding[rank].order())
        return tuple(free)[:1]

    def _give(self, job: Job, command: messages.Command) -> messages.Command:
        job.in_flight, job.awaited, job.seconds = command, set(command.ranks), 0.0
        helpers = command.aco.helpers if isinstance(command, messages.Denoise) and command.aco is not None else ()
        job.holders |= set(command.ranks).difference(*helpers)
        self._busy.update(dict.fromkeys(command.ranks, job.request_id))
        return command

    # -- rules --------------------------------------------------------------------------------------------------

    def _are_free(self, ranks: tuple[int, ...]) -> bool:
        return not any(rank in self._busy for rank in ranks)

    def _free(self, ranks: tuple[int, ...]) -> list[int]:
        """Those that could take a command, first those that have no video to go on with."""
        decoding = self._decoding()
        return sorted((rank for rank in ranks if rank not in self._busy), key=decoding.__contains__)

    def _decoding(self) -> dict[int, Job]:
        """Decoders that have begun a video, and which (of several the one whose turn it is). Such a rank may be free
        and yet not idle: one that shares the video with it may have something more urgent to do."""
        begun = sorted((job for job in self._under_way.values() if job.decoders), key=Job.order, reverse=True)
        return {rank: job for job in begun for rank in job.decoders}

    def _count(self, *phases: Phase) -> int:
        return sum(job.phase in phases for job in self._under_way.values())

    @property
    def _has_room_for_latents(self) -> bool:
        limit = self._policy.latents_waiting * len(self._placement.decoders)
        return not self._placement.is_disaggregated or self._count(Phase.DENOISING, Phase.DENOISED) < limit

    def _may_encode(self, job: Job, rival: Job | None) -> bool:
        """Whether few enough prompts wait that go before it; and whether it goes before the rival: it has a higher
        priority, or the denoisers would have nothing to go on with."""
        waiting = [other for other in self._under_way.values() if other.phase in (Phase.ENCODING, Phase.ENCODED)]
        if rival is not None and rival.order() < job.order() and (waiting or self._placement.encodes_locally):
            return False
        return sum(other.order() < job.order() for other in waiting) < self._policy.encoded_ahead

    def _note_overtaking(self, job: Job) -> None:
        """It goes to the denoisers, or to a decoder, before older requests that have come as far."""
        for other in self._under_way.values():
            if other.number < job.number and other.is_ready and other.phase in (job.phase, _NEXT[job.phase]):
                other.overtaken += 1
                other.is_promoted = other.overtaken >= self._policy.patience

    # -- endings ------------------------------------------------------------------------------------------------

    def _note_failure(self, job: Job, event: messages.CommandFailed) -> None:
        if job.failure is None and isinstance(job.in_flight, messages.Exchanging) and len(job.in_flight.ranks) > 1:
            self._epoch += 1
        job.failure = job.failure or event

    def _finish_command(self, job: Job) -> None:
        """All its ranks have answered."""
        command, job.in_flight = job.in_flight, None
        assert command is not None
        for rank in command.ranks:
            del self._busy[rank]
        help_ = self._help.pop(job.request_id, None)
        if job.failure is None:
            match command:
                case messages.Encode():
                    job.move(Phase.ENCODED)
                case messages.Denoise():
                    job.unit_s = job.seconds / command.num_steps
                    # The first step also fetches and prepares: it tells nothing, unless there is nothing else.
                    if help_ is not None and (command.step > 0 or command.num_steps == job.work.num_steps):
                        self._gate.note(help_.key, help_.choice, job.unit_s)
                    job.done += command.num_steps
                    if job.done == job.work.num_steps:
                        job.move(Phase.DENOISED)
                case messages.Decode():
                    if command.chunk > 0:  # causal decoders begin with a short one
                        job.unit_s = job.seconds / command.num_chunks
                    job.done += command.num_chunks
        self._settle(job)

    def _settle(self, job: Job) -> None:
        """Ends a job for which nothing is in flight, if it is to end."""
        if job.in_flight is not None or job.is_over:
            return
        if job.failure is not None:
            self._end(job, Phase.FAILED)
        elif job.cancel_wanted:
            self._end(job, Phase.CANCELLED)
        elif job.phase is Phase.DECODING and job.done == job.work.chunks(len(job.decoders)):
            self._end(job, Phase.DONE)

    def _end(self, job: Job, phase: Phase) -> None:
        if job.phase is Phase.QUEUED:
            self._queue.remove(job)
        self._under_way.pop(job.request_id, None)
        job.move(phase)
        job.in_flight = None
        job.awaited.clear()
        self._live -= 1
        self._to_release += [messages.Release(request_id=job.request_id, ranks=(rank,)) for rank in sorted(job.holders)]
        job.holders.clear()

    def _forget_ranks(self) -> None:
        """There are no ranks any more that could owe an answer or keep something."""
        self._busy.clear()
        self._to_release.clear()
        self._help.clear()
        for job in self._under_way.values():
            job.holders.clear()
