"""Ranks as a scheduler's tests see them: they do no work, but keep what real workers keep, and complain about every
command that a real one could not run."""

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipedit.core import messages
from pipedit.core.errors import WorkerDiedError
from pipedit.core.placement import Placement, Role
from pipedit.core.request import VideoRequest
from pipedit.core.spans import Span
from pipedit.plan.jobs import Job, Phase, Work
from pipedit.plan.scheduler import Policy, RequestScheduler

REQUEST = VideoRequest(prompt="x")
TEXT_TOKENS = (7, 5)  # joint text, so that it shows when a step with help does not know them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What one rank keeps for one request. `shelf`: what others may fetch."""

    conditioning: bool = False
    steps: int = 0
    latents: bool = False
    chunks: int = 0
    shelf: frozenset[str] = frozenset()


NOTHING = Kept()


def answer(command: messages.Command, rank: int, spans: tuple[Span, ...] = ()) -> messages.Event:
    key: dict[str, Any] = {"request_id": command.request_id, "rank": rank, "spans": spans}
    match command:
        case messages.Encode():
            return messages.Encoded(**key, text_tokens=TEXT_TOKENS)
        case messages.Denoise():
            return messages.StepDone(**key, step=command.step + command.num_steps - 1)
        case messages.Decode():
            return messages.ChunkDecoded(**key, chunk=command.chunk + command.num_chunks - 1)
    return messages.Released(**key)


def failure(command: messages.Command, rank: int) -> messages.CommandFailed:
    return messages.CommandFailed(
        request_id=command.request_id, rank=rank, doing="trying", error=RuntimeError("broken")
    )


def seconds(command: messages.Command, rank: int, duration_s: float) -> tuple[Span, ...]:
    """One span for a command's work."""
    return (Span(request_id=command.request_id, rank=rank, role="", what="", start_s=0.0, end_s=duration_s),)


def size_of(command: messages.Command) -> int:
    """How many steps or chunks it covers; anything else is one."""
    match command:
        case messages.Denoise():
            return command.num_steps
        case messages.Decode():
            return command.num_chunks
    return 1


def helpers_of(command: messages.Command) -> tuple[int, ...]:
    aco = command.aco if isinstance(command, messages.Denoise) else None
    return () if aco is None else tuple(itertools.chain(*aco.helpers))


class ScheduledRanks:
    """`take` what the scheduler says, then `finish` or `fail` it on each rank: both return the rank's report."""

    def __init__(self, placement: Placement, works: Mapping[str, Work]) -> None:
        self.placement, self.works = placement, works
        self.in_flight: dict[int, messages.Command] = {}
        self.kept: dict[tuple[int, str], Kept] = {}  # never NOTHING
        self.epochs = dict.fromkeys(placement.world, 0)  # the newest that the rank has heard of
        self.broken = dict.fromkeys(placement.world, -1)  # the epoch in which messages may have been left over

    @property
    def busy(self) -> dict[int, str]:
        """For whom ranks are at work. A command keeps all its ranks until the last one has answered."""
        return {rank: command.request_id for command in self.in_flight.values() for rank in command.ranks}

    def keeps(self, rank: int, request_id: str) -> Kept:
        return self.kept.get((rank, request_id), NOTHING)

    def take(self, command: messages.Command) -> None:
        assert command.ranks, command
        assert len(set(command.ranks)) == len(command.ranks), command
        busy = self.busy.keys() & set(command.ranks)
        assert not busy, f"{busy} are told {command} and still have {self.in_flight}"
        working = [other for other in self.in_flight.values() if other.request_id == command.request_id]
        assert all(isinstance(other, messages.Release) for other in (*working, command)) or not working, (
            f"{command} while {working}"
        )
        match command:
            case messages.Encode():
                self._check_encode(command)
            case messages.Denoise():
                self._check_denoise(command)
            case messages.Decode():
                self._check_decode(command)
            case messages.Release():
                (rank,) = command.ranks
                assert (rank, command.request_id) in self.kept, f"nothing to forget: {command}"
        self.in_flight.update(dict.fromkeys(command.ranks, command))

    def finish(self, rank: int, spans: tuple[Span, ...] = ()) -> messages.Event:
        command = self.in_flight.pop(rank)
        kept = self._after(command, rank)
        self.kept.pop((rank, command.request_id), None)
        if kept != NOTHING:
            self.kept[rank, command.request_id] = kept
        return answer(command, rank, spans)

    def fail(self, rank: int) -> messages.Event:
        command = self.in_flight.pop(rank)
        if rank not in helpers_of(command):  # it may have got as far as keeping something
            kept = self.keeps(rank, command.request_id)
            self.kept[rank, command.request_id] = dataclasses.replace(kept, conditioning=True)
        if isinstance(command, messages.Exchanging) and len(command.ranks) > 1:
            for other in command.ranks:
                self.broken[other] = max(self.broken[other], command.epoch)
        return failure(command, rank)

    def lose(self) -> None:
        """All of them die; fresh ones come."""
        self.in_flight.clear()
        self.kept.clear()
        self.epochs = dict.fromkeys(self.placement.world, 0)
        self.broken = dict.fromkeys(self.placement.world, -1)

    # -- what a real worker needs -------------------------------------------------------------------------------

    def _check_encode(self, command: messages.Encode) -> None:
        if self.placement.encodes_locally:
            assert command.ranks == self.placement.encoders, command
        else:
            assert len(command.ranks) == 1 and command.ranks[0] in self.placement.encoders, command
        holders = [rank for rank, request_id in self.kept if request_id == command.request_id]
        assert not holders, f"{holders} still keep something for {command}"

    def _check_denoise(self, command: messages.Denoise) -> None:
        work, helpers = self.works[command.request_id], helpers_of(command)
        assert command.ranks == (*self.placement.denoisers, *helpers), command
        assert command.num_steps >= 1 and command.step + command.num_steps <= work.num_steps, command
        assert command.parallel == work.parallel, command
        self._check_epoch(command)
        for rank in self.placement.denoisers:
            kept = self.keeps(rank, command.request_id)
            assert kept.steps == command.step, f"{kept} at {rank} for {command}"
            source = kept.conditioning if command.conditioning_at is None else self._can_fetch_conditioning(command)
            assert source or command.step > 0, f"no conditioning for {command}"
        if command.aco is not None:
            self._check_help(command, command.aco, work)

    def _check_help(self, command: messages.Denoise, aco: messages.Aco, work: Work) -> None:
        assert set(helpers_of(command)) <= set(self.placement.decoders), command
        assert len(aco.helpers) == work.parallel.cfg_degree and work.parallel.ring_degree == 1, command
        assert {len(group) for group in aco.helpers} == {len(aco.heads) - work.parallel.ulysses_degree}, command
        assert min(aco.heads) >= 1 and sum(aco.heads) == work.heads, command
        assert aco.text_tokens == TEXT_TOKENS, command
        sharing = [shared for shared in self.in_flight.values() if isinstance(shared, messages.Decode)]
        assert not any(set(shared.ranks) & set(helpers_of(command)) for shared in sharing), "a helper is not idle"

    def _check_decode(self, command: messages.Decode) -> None:
        work, decoders = self.works[command.request_id], self.placement.decoders
        assert command.ranks == decoders or (len(command.ranks) == 1 and command.ranks[0] in decoders), command
        assert command.num_chunks >= 1, command
        assert command.chunk + command.num_chunks <= work.chunks(len(command.ranks)), command
        self._check_epoch(command)
        for rank in command.ranks:
            kept = self.keeps(rank, command.request_id)
            assert kept.chunks == command.chunk, f"{kept} at {rank} for {command}"
            source = kept.latents if command.latents_at is None else self._can_fetch_latents(command)
            assert source or command.chunk > 0, f"no latents for {command}"

    def _check_epoch(self, command: messages.Exchanging) -> None:
        for rank in command.ranks:
            assert command.epoch >= self.epochs[rank], f"{rank} has heard of {self.epochs[rank]}: {command}"
            if len(command.ranks) > 1:
                assert command.epoch > self.broken[rank], f"messages may be left over for {command}"
            self.epochs[rank] = command.epoch

    def _can_fetch_conditioning(self, command: messages.Denoise) -> bool:
        at = command.conditioning_at
        return at is not None and "conditioning" in self.keeps(at, command.request_id).shelf

    def _can_fetch_latents(self, command: messages.Decode) -> bool:
        at = command.latents_at
        return at is not None and "latents" in self.keeps(at, command.request_id).shelf

    # -- what a real worker does --------------------------------------------------------------------------------

    def _after(self, command: messages.Command, rank: int) -> Kept:
        kept, placement = self.keeps(rank, command.request_id), self.placement
        match command:
            case messages.Encode():
                shelf = frozenset() if placement.encodes_locally else frozenset({"conditioning"})
                return dataclasses.replace(kept, conditioning=rank in placement.denoisers, shelf=kept.shelf | shelf)
            case messages.Denoise() if rank in placement.denoisers:
                if command.step == 0 and command.conditioning_at is not None:
                    assert self._can_fetch_conditioning(command), f"it was forgotten too early for {command}"
                kept = dataclasses.replace(kept, steps=kept.steps + command.num_steps, conditioning=False)
                return self._with_latents(kept, rank) if self._is_clean(kept, command) else kept
            case messages.Decode():
                if command.chunk == 0 and command.latents_at is not None:
                    assert self._can_fetch_latents(command), f"they were forgotten too early for {command}"
                return dataclasses.replace(kept, chunks=kept.chunks + command.num_chunks, latents=False)
            case messages.Release():
                return NOTHING
        return kept  # it has helped

    def _is_clean(self, kept: Kept, command: messages.Denoise) -> bool:
        return kept.steps == self.works[command.request_id].num_steps

    def _with_latents(self, kept: Kept, rank: int) -> Kept:
        denoisers, decoders = self.placement.denoisers, self.placement.decoders
        if set(decoders) <= set(denoisers):
            return dataclasses.replace(kept, latents=rank in decoders)
        return dataclasses.replace(kept, shelf=kept.shelf | {"latents"}) if rank == denoisers[0] else kept


def check_rest(scheduler: RequestScheduler, ranks: ScheduledRanks) -> None:
    """After everything that can be sent was sent: somebody has an answer to give, or all is over and forgotten."""
    if ranks.in_flight:
        return
    assert scheduler.is_idle, "nobody has anything to do, and yet requests wait"
    assert not ranks.kept, f"never forgotten: {ranks.kept}"
    for request_id, work in ranks.works.items():
        assert scheduler.job(request_id).is_over, request_id
        assert not scheduler.is_held(request_id), (request_id, work)


def check_bounds(jobs: Sequence[Job], placement: Placement, policy: Policy) -> None:
    """How much may wait: latents for each decoder; prompts for each priority, and for those that were promoted."""
    if placement.is_disaggregated:
        held = sum(job.phase in (Phase.DENOISING, Phase.DENOISED) for job in jobs)
        assert held <= policy.latents_waiting * len(placement.decoders), f"{held} latents wait"
    levels = {job.work.priority for job in jobs}
    waiting = sum(job.phase in (Phase.ENCODING, Phase.ENCODED) for job in jobs)
    assert waiting <= policy.encoded_ahead * (1 + len(levels)), f"{waiting} prompts wait"


class Rehearsal:
    """A scheduler and its ranks, moved by hand."""

    def __init__(self, placement: Placement, policy: Policy | None = None) -> None:
        self.scheduler = RequestScheduler(placement, policy)
        self.ranks = ScheduledRanks(placement, {})
        self.works: dict[str, Work] = {}
        self.ranks.works = self.works

    def submit(self, work: Work, *request_ids: str) -> None:
        for request_id in request_ids:
            self.works[request_id] = work
            self.scheduler.submit(request_id, REQUEST, work)

    def phase(self, request_id: str) -> Phase:
        return self.scheduler.job(request_id).phase

    def ask(self) -> list[messages.Command]:
        commands = self.scheduler.next_commands()
        for command in commands:
            self.ranks.take(command)
        return commands

    def finish(self, *ranks: int) -> list[messages.Command]:
        """These ranks answer; returns what is sent then."""
        for rank in ranks:
            self.scheduler.receive(self.ranks.finish(rank))
        return self.ask()

    def fail(self, *ranks: int) -> list[messages.Command]:
        for rank in ranks:
            self.scheduler.receive(self.ranks.fail(rank))
        return self.ask()

    def die(self, rank: int) -> WorkerDiedError:
        error = WorkerDiedError("killed", rank=rank, doing="working")
        self.scheduler.lose_workers(error)
        self.ranks.lose()
        return error

    def finish_all(self) -> list[messages.Command]:
        return self.finish(*self.ranks.in_flight)

    def go_until(self, kind: type[messages.Command], request_id: str, limit: int = 1000) -> None:
        """Everything in flight is answered, again and again, until such a command is in flight."""
        self.ask()
        for _ in range(limit):
            if any(isinstance(c, kind) and c.request_id == request_id for c in self.ranks.in_flight.values()):
                return
            assert self.ranks.in_flight, f"there never is a {kind.__name__} of {request_id}"
            self.finish_all()
        raise AssertionError("the scheduler does not come to an end")

    def go_to_the_end(self, limit: int = 1000) -> None:
        self.ask()
        for _ in range(limit):
            if not self.ranks.in_flight:
                return check_rest(self.scheduler, self.ranks)
            self.finish_all()
        raise AssertionError("the scheduler does not come to an end")


Duration = Callable[[messages.Command], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """A command, and when it was given out and answered (seconds of virtual time)."""

    command: messages.Command
    start_s: float
    end_s: float


def play(
    scheduler: RequestScheduler,
    placement: Placement,
    arrivals: Mapping[str, tuple[float, Work]],
    duration: Duration = lambda _: 1.0,
    *,
    together: bool = True,
    limit: int = 100_000,
) -> list[Sent]:
    """Runs requests that arrive at these times to their ends, on virtual time. The ranks of a command answer at the
    same time: all of them before anything is sent, or not. Returns the commands in the order of their beginnings."""
    ranks = ScheduledRanks(placement, {request_id: work for request_id, (_, work) in arrivals.items()})
    coming = sorted((at_s, number, request_id) for number, (request_id, (at_s, _)) in enumerate(arrivals.items()))
    sent: list[Sent] = []
    agenda: list[tuple[float, int, int]] = []  # when the command of this number ends on this rank
    now_s = 0.0
    for _ in range(limit):
        while coming and coming[0][0] <= now_s:
            _, _, request_id = coming.pop(0)
            scheduler.submit(request_id, REQUEST, ranks.works[request_id])
        for command in scheduler.next_commands():
            ranks.take(command)
            end_s = now_s if isinstance(command, messages.Release) else now_s + duration(command)
            sent.append(Sent(command=command, start_s=now_s, end_s=end_s))
            for rank in command.ranks:
                heapq.heappush(agenda, (end_s, len(sent) - 1, rank))
        if not agenda and not coming:
            check_rest(scheduler, ranks)
            return sent
        now_s = min([*(end_s for end_s, _, _ in agenda[:1]), *(at_s for at_s, _, _ in coming[:1])])
        while agenda and agenda[0][0] <= now_s:
            _, number, rank = heapq.heappop(agenda)
            done = sent[number]
            scheduler.receive(ranks.finish(rank, seconds(done.command, rank, done.end_s - done.start_s)))
            if not together:
                break
    raise AssertionError("the scheduler does not come to an end")


PLACEMENTS = {
    "colocated 1": Placement.colocated(1),
    "colocated 2": Placement.colocated(2),
    "serial decode": Placement.serial_decode(2),
    "1 + 1, encodes where it denoises": Placement.disaggregated(denoise=1, decode=1, encoder=Role.DENOISER),
    "1 + 1, encodes where it decodes": Placement.disaggregated(denoise=1, decode=1, encoder=Role.DECODER),
    "2 + 1, encodes where it denoises": Placement.disaggregated(denoise=2, decode=1, encoder=Role.DENOISER),
    "2 + 1, encodes where it decodes": Placement.disaggregated(denoise=2, decode=1, encoder=Role.DECODER),
    "1 + 2, encodes where it denoises": Placement.disaggregated(denoise=1, decode=2, encoder=Role.DENOISER),
    "1 + 2, encodes where it decodes": Placement.disaggregated(denoise=1, decode=2, encoder=Role.DECODER),
    "1 + 1 and an encoder": Placement(encoders=(2,), denoisers=(0,), decoders=(1,)),
    "half shared": Placement(encoders=(1,), denoisers=(0,), decoders=(0, 1)),
}
