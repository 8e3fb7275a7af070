"""Every order of events for a few small requests: all states that the scheduler can come into are visited."""

import dataclasses
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from pipedit.core import messages
from pipedit.core.errors import WorkerDiedError
from pipedit.core.parallel import ParallelConfig
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.jobs import Job, Phase, Work
from pipedit.plan.scheduler import Policy, RequestScheduler
from tests.plan.scheduled_ranks import (
    PLACEMENTS,
    REQUEST,
    ScheduledRanks,
    check_bounds,
    check_rest,
    helpers_of,
    seconds,
    size_of,
)

POLICY = Policy(aco=AcoMode.ON, encoded_ahead=1, latents_waiting=1, patience=2, least_command_s=2.0)
QUICK_S, SLOW_S = 1.0, 4.0  # a step or chunk: two make a command, or one


@dataclasses.dataclass(kw_only=True)
class World:
    """The scheduler, its ranks, and what may still happen to them."""

    scheduler: RequestScheduler
    ranks: ScheduledRanks
    coming: list[str]
    troubles: int  # cancels, failures, lost workers
    batch: int  # events that may come together before commands are asked for
    paces_s: tuple[float, ...] = (0.0,)  # what each step or chunk may have taken; 0: nobody tells
    unseen: int = 0  # events since commands were asked for


Move = tuple[str, Any]


def moves(world: World) -> Iterator[Move]:
    if world.unseen:
        yield "ask", None
    if world.unseen == world.batch:
        return
    for rank, command in sorted(world.ranks.in_flight.items()):
        for pace_s in world.paces_s if isinstance(command, messages.Exchanging) else (0.0,):
            yield "finish", (rank, pace_s)
    if world.coming:
        yield "submit", world.coming[0]
    if world.troubles:
        yield from _troubles(world)


def _troubles(world: World) -> Iterator[Move]:
    for rank, command in sorted(world.ranks.in_flight.items()):
        if not isinstance(command, messages.Release):
            yield "fail", rank
        yield "die", rank
    for request_id in world.ranks.works:
        if request_id not in world.coming and not world.scheduler.job(request_id).is_over:
            yield "cancel", request_id


def make(world: World, move: Move) -> None:
    kind, what = move
    scheduler, ranks = world.scheduler, world.ranks
    world.unseen = 0 if kind == "ask" else world.unseen + 1
    world.troubles -= kind in ("fail", "die", "cancel")
    match kind:
        case "ask":
            for command in scheduler.next_commands():
                ranks.take(command)
            assert scheduler.next_commands() == [], "not everything was given out at once"
            if not world.coming:
                check_rest(scheduler, ranks)
        case "finish":
            rank, pace_s = what
            command = ranks.in_flight[rank]
            scheduler.receive(ranks.finish(rank, seconds(command, rank, pace_s * size_of(command))))
        case "submit":
            world.coming.remove(what)
            scheduler.submit(what, REQUEST, ranks.works[what])
        case "fail":
            scheduler.receive(ranks.fail(what))
        case "cancel":
            scheduler.cancel(what)
        case "die":
            scheduler.lose_workers(WorkerDiedError("killed", rank=what, doing="working"))
            ranks.lose()
    jobs = [scheduler.job(request_id) for request_id in ranks.works if request_id not in world.coming]
    check_bounds(jobs, ranks.placement, POLICY)


# -- states that behave alike are one --------------------------------------------------------------------------------

_NO_MATTER = frozenset("request work works placement _placement _policy paces_s".split())  # or always the same
_ATOMS = frozenset({type(None), str, int, bool, float, Phase, AcoMode})


def canonical(value: Any) -> Any:
    """Equal for states that behave alike, and something that can be hashed."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is set or kind is frozenset:
        return frozenset(value)
    if kind is dict:
        return frozenset([(key, canonical(item)) for key, item in value.items()])
    if kind is list or kind is tuple:
        return tuple([canonical(item) for item in value])
    if isinstance(value, messages.Command):
        unit = getattr(value, "step", getattr(value, "chunk", None))
        return kind, value.request_id, value.ranks, unit, size_of(value)
    if isinstance(value, messages.CommandFailed):
        return "failed"
    if isinstance(value, Job) and value.is_over:
        return value.request_id, value.phase
    return tuple([canonical(item) for name, item in vars(value).items() if name not in _NO_MATTER])


@dataclasses.dataclass(kw_only=True)
class Explored:
    states: int = 0
    phases: set[Phase] = dataclasses.field(default_factory=set)
    helped: bool = False
    sizes: set[tuple[type[messages.Command], int]] = dataclasses.field(default_factory=set)


def explore(start: World) -> Explored:
    """Visits everything that can be reached. Raises AssertionError, with the way there, for the first state that is
    wrong; and if it is possible to go round in circles."""
    seen = {canonical(start): 0}
    waiting: list[tuple[bytes, tuple[Move, ...]]] = [(pickle.dumps(start, -1), ())]
    edges: list[list[int]] = [[]]
    explored = Explored()
    number = 0
    while number < len(waiting):
        blob, way = waiting[number]
        waiting[number] = (b"", ())
        for move in list(moves(pickle.loads(blob))):
            world = pickle.loads(blob)
            try:
                make(world, move)
            except AssertionError as error:
                error.add_note(f"after {[*way, move]}")
                raise
            key = canonical(world)
            if key not in seen:
                seen[key] = len(waiting)
                waiting.append((pickle.dumps(world, -1), (*way, move)))
                edges.append([])
                explored.phases.update(job.phase for job in world.scheduler._jobs.values())
                for command in world.ranks.in_flight.values():
                    explored.helped |= bool(helpers_of(command))
                    explored.sizes.add((type(command), size_of(command)))
            edges[number].append(seen[key])
        number += 1
    explored.states = len(seen)
    assert is_acyclic(edges), "it is possible to go round in circles"
    return explored


def is_acyclic(edges: list[list[int]]) -> bool:
    entering = [0] * len(edges)
    for targets in edges:
        for target in targets:
            entering[target] += 1
    free = [state for state, count in enumerate(entering) if count == 0]
    done = 0
    while free:
        done += 1
        for target in edges[free.pop()]:
            entering[target] -= 1
            if entering[target] == 0:
                free.append(target)
    return done == len(edges)


def begin(
    name: str,
    works: Mapping[str, Work],
    *,
    troubles: int = 0,
    batch: int = 1,
    at_once: bool = True,
    paces_s: tuple[float, ...] = (0.0,),
) -> World:
    """Work for the placement of this name; heads that decoders may take."""
    placement = PLACEMENTS[name]
    parallel = ParallelConfig(ulysses_degree=len(placement.denoisers))
    works = {key: dataclasses.replace(work, parallel=parallel, heads=4) for key, work in works.items()}
    world = World(
        scheduler=RequestScheduler(placement, POLICY),
        ranks=ScheduledRanks(placement, works),
        coming=list(works),
        troubles=troubles,
        batch=len(works) + 1 if at_once else batch,
        paces_s=paces_s,
    )
    if at_once:
        for request_id in works:
            make(world, ("submit", request_id))
        make(world, ("ask", None))
    world.batch = batch
    return world


SHORT = Work(num_steps=1, num_chunks=1)
LONG = Work(num_steps=2, num_chunks=2)
URGENT = dataclasses.replace(SHORT, priority=1)
LONGER = Work(num_steps=3, num_chunks=4)  # so long that commands of two and of one are possible
LARGE = "1 + 2, encodes where it decodes"  # it can come into the most states
OTHERS = [name for name in PLACEMENTS if name != LARGE]


def check_seen(name: str, explored: Explored) -> None:
    """An exploration that leaves something out proves nothing."""
    assert {Phase.ENCODING, Phase.DENOISING, Phase.DECODING, Phase.DONE} <= explored.phases, explored
    assert explored.helped == PLACEMENTS[name].is_disaggregated, explored


@pytest.mark.parametrize("name", PLACEMENTS)
def test_two_requests_in_every_order(name: str) -> None:
    """They come at any time, and answers come alone or two at a time."""
    explored = explore(begin(name, {"a": LONG, "b": LONG}, batch=2, at_once=False))
    check_seen(name, explored)
    assert explored.phases.isdisjoint({Phase.CANCELLED, Phase.FAILED})


@pytest.mark.parametrize("name", OTHERS)
def test_three_requests_of_two_priorities_in_every_order(name: str) -> None:
    check_seen(name, explore(begin(name, {"a": LONG, "b": URGENT, "c": SHORT})))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_one_trouble_at_every_point(name: str) -> None:
    """A cancel, a failure, or the loss of all workers."""
    batch = 2 if len(PLACEMENTS[name].world) < 3 else 1
    explored = explore(begin(name, {"a": SHORT, "b": SHORT}, troubles=1, batch=batch))
    check_seen(name, explored)
    assert {Phase.CANCELLED, Phase.FAILED} <= explored.phases


@pytest.mark.parametrize("name", ["colocated 2", "1 + 1, encodes where it denoises", "1 + 1, encodes where it decodes"])
def test_two_troubles_at_all_points(name: str) -> None:
    check_seen(name, explore(begin(name, {"a": SHORT, "b": SHORT}, troubles=2)))


SIZES = {(kind, size) for kind in (messages.Denoise, messages.Decode) for size in (1, 2)}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_commands_of_any_size_in_every_order(name: str) -> None:
    """Each rank tells of quick or of slow steps, whatever it told before."""
    explored = explore(begin(name, {"a": LONGER, "b": SHORT}, paces_s=(QUICK_S, SLOW_S)))
    check_seen(name, explored)
    assert explored.sizes >= SIZES


@pytest.mark.parametrize("name", PLACEMENTS)
def test_one_trouble_amid_commands_of_any_size(name: str) -> None:
    explored = explore(begin(name, {"a": LONGER}, troubles=1, paces_s=(QUICK_S, SLOW_S)))
    check_seen(name, explored)
    assert explored.sizes >= SIZES
    assert {Phase.CANCELLED, Phase.FAILED} <= explored.phases


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACEMENTS)
def test_longer_stories(name: str) -> None:
    check_seen(name, explore(begin(name, {"a": SHORT, "b": LONG}, troubles=2)))
    if len(PLACEMENTS[name].decoders) == 1:  # else there are too many
        check_seen(name, explore(begin(name, {"a": LONG, "b": URGENT, "c": SHORT}, troubles=1)))


def test_circles_are_found() -> None:
    assert is_acyclic([[1, 2], [2], []])
    assert not is_acyclic([[1], [2], [1]])
