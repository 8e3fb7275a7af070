"""The simulator: the request scheduler of the engine on virtual time. Arrivals in; times, use and spans out.

One scheduler a replica, and a router that sends each request to the replica with the least work waiting. What a run
costs depends on its commands, not on its ranks: all ranks of a command answer in one instant. Only where videos are
made block by block has each rank commands of its own (see simulated_stages).
"""

import dataclasses
import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pipedit.core import messages
from pipedit.core.placement import Role
from pipedit.core.request import VideoRequest
from pipedit.core.spans import Span
from pipedit.plan.block_scheduler import BlockScheduler
from pipedit.plan.durations import DECODE, HELP, STEP, Durations, Piece
from pipedit.plan.jobs import Phase, Work
from pipedit.plan.pools import Pool, seconds_each
from pipedit.plan.router import Router
from pipedit.plan.scheduler import RequestScheduler
from pipedit.plan.scheduling import Scheduler
from pipedit.plan.simulated_stages import SimulatedStages

_REQUEST = VideoRequest(prompt="")  # the scheduler looks into no request


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A request comes in at `at_s`. Higher `priority` goes first."""

    at_s: float
    kind: str
    priority: int = 0


@dataclasses.dataclass(kw_only=True, slots=True)
class Life:
    """When a request came, when work on it began, when its last step was done, and when its first and its last frame
    were there. Seconds of virtual time."""

    arrival: Arrival
    replica: int
    begun_s: float = float("nan")
    denoised_s: float = float("nan")
    first_frames_s: float = float("nan")
    done_s: float = float("nan")

    @property
    def latency_s(self) -> float:
        return self.done_s - self.arrival.at_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """Time that ranks of a group spent on a kind of work, summed over the ranks, and bytes that each command moved."""

    group: str
    what: str
    rank_seconds: float
    payload_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedRun:
    """`lives` are in order of arrival; the request's id is "request-1" for the first. `spans`: empty unless asked for;
    ranks of later replicas go on counting. `group_ranks`: how many ranks each group has, over all replicas."""

    lives: Sequence[Life]
    uses: Sequence[Use]
    group_ranks: Mapping[str, int]
    peak_queue: int
    spans: tuple[Span, ...] = ()


def simulate(
    pools: Sequence[Pool], arrivals: Iterable[Arrival], *, keep_spans: bool = False, round_trip_s: float = 0.0
) -> SimulatedRun:
    """Runs all arrivals to their end. `round_trip_s` passes between the end of a command's work and the next command
    to its ranks. Every kind that arrives must be served by some pool."""
    return _Simulation(pools, keep_spans=keep_spans, round_trip_s=round_trip_s).run(arrivals)


@dataclasses.dataclass(kw_only=True, slots=True)
class _Cost:
    """What a command costs, worked out once. `timing` is all that the scheduler wants to know of it."""

    pieces: Sequence[Piece]
    seconds: float
    timing: tuple[Span, ...]
    ranks: tuple[int, ...]
    helpers: int
    count: int = 0  # commands so far


class _Replica:
    """A scheduler and the work in flight on its ranks. `stages`: where videos are made block by block."""

    def __init__(self, pool: Pool, first_rank: int, costs: dict[object, _Cost], *, keep_spans: bool) -> None:
        self.pool, self.first_rank = pool, first_rank
        self.scheduler: Scheduler = RequestScheduler(pool.placement, pool.policy)
        self.stages: SimulatedStages | None = None
        if pool.is_blockwise:
            self.scheduler = BlockScheduler(pool.placement)
            self.stages = SimulatedStages(pool.placement, first_rank=first_rank, keep_spans=keep_spans)
        self._costs = costs  # shared among the replicas of the pool

    def cost(self, command: messages.Command, kind: str) -> _Cost:
        key = (kind, _key(command))
        cost = self._costs.get(key)
        if cost is None:
            cost = self._costs[key] = _price(command, self.pool.services[kind].durations)
        return cost


class _Simulation:
    def __init__(self, pools: Sequence[Pool], *, keep_spans: bool, round_trip_s: float) -> None:
        self._pools, self._keeps_spans, self._round_trip_s = pools, keep_spans, round_trip_s
        self._costs: list[dict[object, _Cost]] = [{} for _ in pools]
        self._replicas: list[_Replica] = []
        self._router = Router(
            [pool.count for pool in pools],
            [{kind: seconds_each(pool.placement, s) for kind, s in pool.services.items()} for pool in pools],
        )
        first_rank = 0
        for pool, costs in zip(pools, self._costs, strict=True):
            for _ in range(pool.count):
                self._replicas.append(_Replica(pool, first_rank, costs, keep_spans=keep_spans))
                first_rank += len(pool.placement.world)
        # When, order, replica, what ends, and what it has cost or its rank says.
        self._agenda: list[tuple[float, int, int, messages.Command, _Cost | messages.Event]] = []
        self._works: dict[tuple[int, str, int], Work] = {}
        self._lives: list[Life] = []
        self._spans: list[Span] = []
        self._started = 0
        self._queued = self._peak_queue = 0

    def run(self, arrivals: Iterable[Arrival]) -> SimulatedRun:
        coming = sorted(arrivals, key=lambda arrival: arrival.at_s)
        coming.reverse()
        agenda = self._agenda
        while coming or agenda:
            now_s = coming[-1].at_s if coming and (not agenda or coming[-1].at_s <= agenda[0][0]) else agenda[0][0]
            touched: dict[int, None] = {}  # a set that keeps its order
            while coming and coming[-1].at_s <= now_s:
                touched[self._admit(coming.pop())] = None
            self._peak_queue = max(self._peak_queue, self._queued)
            while agenda and agenda[0][0] <= now_s:
                _, _, number, command, answer = heapq.heappop(agenda)
                self._answer(number, command, answer, now_s)
                touched[number] = None
            for number in touched:
                self._give_out(number, now_s)
        assert all(replica.scheduler.is_idle for replica in self._replicas), "the scheduler has left work undone"
        return SimulatedRun(
            lives=self._lives,
            uses=tuple(self._uses()),
            group_ranks=self._group_ranks(),
            peak_queue=self._peak_queue,
            spans=(*self._spans, *(span for r in self._replicas if r.stages is not None for span in r.stages.spans)),
        )

    def _admit(self, arrival: Arrival) -> int:
        number, pool_number = self._router.route(arrival.kind)
        key = (pool_number, arrival.kind, arrival.priority)
        work = self._works.get(key)
        if work is None:
            plain = self._pools[pool_number].services[arrival.kind].work
            work = self._works[key] = dataclasses.replace(plain, priority=arrival.priority)
        self._lives.append(Life(arrival=arrival, replica=number))
        self._queued += 1
        self._replicas[number].scheduler.submit(f"request-{len(self._lives)}", _REQUEST, work)
        return number

    def _life(self, request_id: str) -> Life:
        return self._lives[int(request_id[8:]) - 1]

    def _give_out(self, number: int, now_s: float) -> None:
        """Starts everything that can be started now. Releasing takes no time."""
        replica, is_open = self._replicas[number], True
        scheduler = replica.scheduler
        while is_open:
            is_open = False
            for command in scheduler.next_commands():
                if isinstance(command, messages.Release):
                    scheduler.receive(messages.Released(request_id=command.request_id, rank=command.ranks[0]))
                    is_open = True
                else:
                    self._start(number, replica, command, now_s)

    def _start(self, number: int, replica: _Replica, command: messages.Command, now_s: float) -> None:
        life = self._life(command.request_id)
        if isinstance(command, messages.Encode):
            life.begun_s = now_s
            self._queued -= 1
        if replica.stages is not None:
            for ended in replica.stages.take(command, now_s, replica.pool.services[life.arrival.kind]):
                if ended.has_frames and math.isnan(life.first_frames_s):
                    life.first_frames_s = ended.at_s
                self._note_end(ended.at_s, number, ended.command, ended.event)
            return
        cost = replica.cost(command, life.arrival.kind)
        cost.count += 1
        if self._keeps_spans:
            self._spans += _spans(command, cost, now_s, replica.first_rank)
        if isinstance(command, messages.Decode) and command.chunk == 0:
            life.first_frames_s = now_s + _until_first(cost.pieces, DECODE)
        self._note_end(now_s + cost.seconds, number, command, cost)

    def _note_end(self, at_s: float, number: int, command: messages.Command, answer: _Cost | messages.Event) -> None:
        if isinstance(command, (messages.Denoise, messages.DenoiseBlocks)):
            life = self._life(command.request_id)
            life.denoised_s = at_s if math.isnan(life.denoised_s) else max(at_s, life.denoised_s)
        self._started += 1
        heapq.heappush(self._agenda, (at_s + self._round_trip_s, self._started, number, command, answer))

    def _answer(self, number: int, command: messages.Command, answer: _Cost | messages.Event, now_s: float) -> None:
        scheduler, request_id = self._replicas[number].scheduler, command.request_id
        receive = scheduler.receive
        if isinstance(answer, messages.Event):
            receive(answer)
        else:
            timing = answer.timing
            for rank in command.ranks:
                receive(messages.Event(request_id=request_id, rank=rank, spans=timing))
                timing = ()
        if isinstance(command, (messages.Decode, messages.DecodeBlock)) and (job := scheduler.job(request_id)).is_over:
            assert job.phase is Phase.DONE
            life = self._life(request_id)
            life.done_s = now_s - self._round_trip_s
            scheduler.forget(request_id)
            self._router.finish(number, life.arrival.kind)

    def _uses(self) -> Iterator[Use]:
        seconds: dict[tuple[str, str], float] = defaultdict(float)
        moved: Counter[tuple[str, str]] = Counter()
        for pool, costs in zip(self._pools, self._costs, strict=True):
            group_of = {rank: name for name, ranks in pool.groups().items() for rank in ranks}
            for cost in costs.values():
                for name, what, rank_seconds, payload_bytes in _shares(cost, group_of):
                    seconds[name, what] += rank_seconds * cost.count
                    moved[name, what] += payload_bytes * cost.count
        for replica in (replica for replica in self._replicas if replica.stages is not None):
            group_of = {rank: name for name, ranks in replica.pool.groups().items() for rank in ranks}
            assert replica.stages is not None
            for (rank, what), busy_s in replica.stages.busy_s.items():
                seconds[group_of[rank], what] += busy_s
                moved[group_of[rank], what] += replica.stages.payload_bytes[rank, what]
        for (name, what), rank_seconds in seconds.items():
            yield Use(group=name, what=what, rank_seconds=rank_seconds, payload_bytes=moved[name, what])

    def _group_ranks(self) -> dict[str, int]:
        ranks: Counter[str] = Counter()
        for pool in self._pools:
            for name, members in pool.groups().items():
                ranks[name] += pool.count * len(members)
        return dict(ranks)


def _key(command: messages.Command) -> object:
    """Commands with the same key take equally long (see Durations.pieces)."""
    match command:
        case messages.Denoise():
            return command.step == 0, command.num_steps, command.aco
        case messages.Decode():
            return command.chunk, command.num_chunks, len(command.ranks)
    return len(command.ranks)


def _price(command: messages.Command, durations: Durations) -> _Cost:
    pieces = tuple(durations.pieces(command))
    seconds = sum(piece.seconds for piece in pieces)
    timing = Span(request_id="", rank=0, role="", what="", start_s=0.0, end_s=seconds)
    return _Cost(pieces=pieces, seconds=seconds, timing=(timing,), ranks=command.ranks, helpers=_num_helpers(command))


def _until_first(pieces: Sequence[Piece], what: str) -> float:
    """Seconds until the first piece of this kind is done."""
    seconds = 0.0
    for piece in pieces:
        seconds += piece.seconds
        if piece.what == what:
            break
    return seconds


def _num_helpers(command: messages.Command) -> int:
    aco = command.aco if isinstance(command, messages.Denoise) else None
    return 0 if aco is None else sum(len(group) for group in aco.helpers)


def _shares(cost: _Cost, group_of: Mapping[int, str]) -> Iterator[tuple[str, str, float, int]]:
    """Group, kind of work, seconds of its ranks together, and bytes."""
    first_helper = len(cost.ranks) - cost.helpers
    for place, rank in enumerate(cost.ranks):
        for piece in cost.pieces:
            if place < first_helper:
                yield group_of[rank], piece.what, piece.seconds, piece.payload_bytes
            elif piece.what == STEP:
                yield group_of[rank], HELP, piece.seconds, 0


_ROLES = {messages.Encode: Role.ENCODER, messages.Denoise: Role.DENOISER, messages.Decode: Role.DECODER}


def _spans(command: messages.Command, cost: _Cost, start_s: float, first_rank: int) -> Iterator[Span]:
    role = _ROLES[type(command)]
    base = getattr(command, "step", getattr(command, "chunk", 0))
    first_helper, last_s = len(command.ranks) - cost.helpers, start_s + cost.seconds
    for place, rank in enumerate(command.ranks):
        at_s, is_helper = start_s, place >= first_helper
        for number, piece in enumerate(cost.pieces, start=1):
            # Rounded like the command's own end: the next span of the rank must not begin before the last one ends.
            end_s = last_s if number == len(cost.pieces) else min(at_s + piece.seconds, last_s)
            if not is_helper or piece.what == STEP:
                yield Span(
                    request_id=command.request_id,
                    rank=first_rank + rank,
                    role=Role.DECODER if is_helper else role,
                    what=HELP if is_helper else piece.what,
                    start_s=at_s,
                    end_s=end_s,
                    index=None if piece.index is None else base + piece.index,
                    payload_bytes=0 if is_helper else piece.payload_bytes,
                )
            at_s = end_s
