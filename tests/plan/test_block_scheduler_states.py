"""Every order of events for one or two small videos: all states that the block scheduler can come into are visited."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan, Prefix
from pipedit.core.errors import WorkerDiedError
from pipedit.core.placement import Placement
from pipedit.plan.block_scheduler import BlockJob, BlockPolicy, BlockScheduler
from pipedit.plan.jobs import Phase
from tests.plan.block_checks import check_rest, check_sound
from tests.plan.block_ranks import ALL, REQUEST, BlockRanks, plan_of
from tests.plan.exploration import Move, Rules, explore, is_acyclic


@dataclasses.dataclass(kw_only=True)
class World:
    """The scheduler, its ranks, and what may still happen to them. `horizon`: an endless video is cancelled when the
    first stage was given so many operations."""

    scheduler: BlockScheduler
    ranks: BlockRanks
    coming: list[str]
    troubles: int  # cancels, failures, lost workers
    batch: int = 1  # events that may come together before commands are asked for
    horizon: int = 10
    unseen: int = 0  # events since commands were asked for


def moves(world: World) -> Iterator[Move]:
    ranks = world.ranks
    yield from _dooms(world)  # at once: then nothing was built on what they fail at
    if world.unseen:
        yield "ask", None
    else:
        check_rest(world.scheduler, ranks)
    if world.unseen == world.batch:
        return
    if endless := [request_id for request_id in ranks.videos if _is_at_horizon(world, request_id)]:
        yield "stop", endless[0]
        return
    for rank in sorted(ranks.in_flight):
        if ranks.can_finish(rank):
            yield "finish", rank
        if ranks.can_be_disturbed(rank):
            yield "disturb", rank
    if world.coming:
        yield "submit", world.coming[0]
    if world.troubles:
        yield from _troubles(world)


def _is_at_horizon(world: World, request_id: str) -> bool:
    video, plan = world.ranks.videos[request_id], world.ranks.plans[request_id]
    return plan.latents is None and video.given[0] >= world.horizon and not video.cancelled and not video.failed


def _dooms(world: World) -> Iterator[Move]:
    for rank in sorted(world.ranks.fresh - world.ranks.doomed.keys()) if world.troubles else ():
        command = world.ranks.in_flight[rank]
        count = command.count if isinstance(command, messages.DenoiseBlocks) else 0
        yield from (("doom", (rank, operations)) for operations in range(count + 1))


def _troubles(world: World) -> Iterator[Move]:
    for request_id in world.ranks.plans:
        if request_id not in world.coming and not world.scheduler.job(request_id).is_stopping:
            yield "cancel", request_id
    yield "die", 0


def make(world: World, move: Move) -> None:
    kind, what = move
    scheduler, ranks = world.scheduler, world.ranks
    world.unseen = {"ask": 0, "doom": world.unseen}.get(kind, world.unseen + 1)
    world.troubles -= kind in ("doom", "die", "cancel")
    match kind:
        case "doom":
            ranks.doom(*what)
        case "ask":
            for command in scheduler.next_commands():
                ranks.take(command)
            assert scheduler.next_commands() == [], "not everything was given out at once"
        case "finish":
            scheduler.receive(ranks.finish(what))
        case "disturb":
            scheduler.receive(ranks.fail(what))
        case "submit":
            world.coming.remove(what)
            scheduler.submit(what, REQUEST, ranks.work(what))
        case "cancel" | "stop":
            scheduler.cancel(what)
            if what in ranks.videos:
                ranks.videos[what].cancelled = True
        case "die":
            scheduler.lose_workers(WorkerDiedError("killed", rank=what, doing="working"))
            ranks.lose()
    check_sound(scheduler, ranks)


# -- states that behave alike are one --------------------------------------------------------------------------------

_NO_MATTER = frozenset(
    "request work plans placement policy blocks ahead lag stages decoder horizon "
    "_placement _policy _stages _decoder _submitted "
    "number done in_flight seconds unit_s text_tokens decoders attempts".split()  # a block job does not use these
)
_ATOMS = frozenset({type(None), str, int, float, bool, Phase})


def key_of(value: Any) -> Any:
    """Equal for states that behave alike, and something that can be hashed."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is set:
        return frozenset(value)
    if kind is dict:
        return frozenset([(name, key_of(item)) for name, item in value.items()])
    if kind is list or kind is tuple:
        return tuple([key_of(item) for item in value])
    if kind is messages.CommandFailed:
        return "failed"
    if kind is BlockJob and value.is_over:
        return value.request_id, value.phase
    return kind, tuple([key_of(item) for name, item in vars(value).items() if name not in _NO_MATTER])


RULES = Rules(moves=moves, make=make, key=key_of)


# -- where to look ---------------------------------------------------------------------------------------------------

PLACEMENTS = {
    "1": Placement.colocated(1),
    "1 + 1": Placement(encoders=(1,), denoisers=(0,), decoders=(1,)),
    "2, the first decodes": Placement.serial_decode(2),
    "2, the last decodes": Placement(encoders=(0,), denoisers=(0, 1), decoders=(1,)),
    "2 + 1": Placement(encoders=(2,), denoisers=(0, 1), decoders=(2,)),
    "2 + 1, encode where they denoise": Placement(encoders=(0, 1), denoisers=(0, 1), decoders=(2,)),
    "3, the first decodes": Placement(encoders=(0,), denoisers=(0, 1, 2), decoders=(0,)),
    "3, the middle decodes": Placement(encoders=(2,), denoisers=(0, 1, 2), decoders=(1,)),
    "3, the last decodes": Placement(encoders=(0,), denoisers=(0, 1, 2), decoders=(2,)),
    "3 + 1": Placement(encoders=(3,), denoisers=(0, 1, 2), decoders=(3,)),
    "2 + 1 + 1": Placement(encoders=(3,), denoisers=(0, 1), decoders=(2,)),
}


@dataclasses.dataclass(kw_only=True)
class Explored:
    states: int = 0
    phases: set[Phase] = dataclasses.field(default_factory=set)
    sights: set[str] = dataclasses.field(default_factory=set)


def look_around(
    name: str,
    *plans: BlockPlan,
    piece: int | None = None,
    troubles: int = 0,
    ahead: int = 1,
    at_once: bool = True,
    batch: int = 1,
    waiting: int = 1,
    lag: int = 1,
) -> Explored:
    """Videos a, b, ... of these plans, which come at once or at any time."""
    placement, policy = PLACEMENTS[name], BlockPolicy(piece=piece, blocks_waiting=waiting, patience=1)
    named = dict(zip("abc", plans, strict=False))
    world = World(
        scheduler=BlockScheduler(placement, policy),
        ranks=BlockRanks(placement, named, policy, ahead=ahead, lag=lag),
        coming=list(named),
        troubles=troubles,
        batch=batch,
    )
    if at_once:
        for request_id in named:
            make(world, ("submit", request_id))
        make(world, ("ask", None))
    explored = Explored()
    for state in explore(world, RULES):
        explored.states += 1
        explored.phases.update(job.phase for job in state.scheduler._jobs.values())
        explored.sights.update(_sights(state))
    return explored


def _sights(world: World) -> Iterator[str]:
    """What makes a state worth a visit."""
    ranks = world.ranks
    for request_id, video in ranks.videos.items():
        job = world.scheduler._jobs[request_id]
        if video.cancelled and not video.failed and max(video.given) == video.run[0] > min(video.given):
            yield "brought level"
        if job.failure is not None and not job.is_over:
            yield "failed and not over"
        if ranks.policy.blocks_waiting == video.told - video.decoded and video.given[0] != job.plan.num_operations:
            yield "held back"
        kinds = {type(command) for command in ranks.in_flight.values()}
        if {messages.DecodeBlock, messages.DenoiseBlocks} <= kinds:
            yield "decoded meanwhile"


# -- looking around ----------------------------------------------------------------------------------------------------

LONG, LARGE = "3, the last decodes", "2 + 1 + 1"
SMALL = [name for name in PLACEMENTS if not name.startswith("3")]
BAD_ENDS = {Phase.CANCELLED, Phase.FAILED}
OTHER_RANKS = {name for name in PLACEMENTS if len(PLACEMENTS[name].world) > 1}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_one_video_in_every_order(name: str) -> None:
    """With commands of all sizes; `lag` and `ahead` are how little, or much, the stages wait for each other."""
    everything = [
        look_around(name, plan_of(2, 1), piece=1),
        look_around(name, plan_of(1, 2), piece=1),
        look_around(name, plan_of(3, 3), piece=1 if name in SMALL else 4),
        look_around(name, plan_of(3, 3, Prefix.RERUN), piece=2 if name in SMALL else 3, ahead=9, lag=9, waiting=2),
        look_around(name, plan_of(3, 3), piece=ALL),
    ]
    assert all(Phase.DONE in explored.phases and not BAD_ENDS & explored.phases for explored in everything)
    if name in SMALL:
        assert "held back" in everything[2].sights
    if name in OTHER_RANKS:
        assert any("decoded meanwhile" in explored.sights for explored in everything)


def check_trouble(name: str, explored: Explored, *sights: str) -> None:
    """An exploration that leaves something out proves nothing."""
    assert {Phase.DONE, *BAD_ENDS} <= explored.phases
    if len(PLACEMENTS[name].denoisers) > 1:
        assert {"failed and not over", *sights} <= explored.sights


@pytest.mark.parametrize("name", [name for name in SMALL if name != LARGE])
def test_one_trouble_at_every_point(name: str) -> None:
    """A cancel, a rank that fails at any operation or at anything else, or the loss of all workers."""
    check_trouble(name, look_around(name, plan_of(2, 2), piece=2, ahead=2, troubles=1), "brought level")


@pytest.mark.parametrize("name", ["1 + 1", "2, the last decodes"])
def test_one_trouble_where_blocks_wait(name: str) -> None:
    check_trouble(name, look_around(name, plan_of(3, 1), piece=1, lag=0, troubles=1), "held back", "brought level")


def test_one_trouble_where_stages_wait_for_others_than_their_neighbours() -> None:
    check_trouble(LONG, look_around(LONG, plan_of(1, 2), piece=ALL, troubles=1))


@pytest.mark.parametrize("name", ["1 + 1", "2, the last decodes"])
def test_one_trouble_and_the_next_video(name: str) -> None:
    check_trouble(name, look_around(name, plan_of(1, 1), plan_of(1, 1), piece=1, troubles=1))


@pytest.mark.parametrize("name", ["1 + 1", "2, the last decodes"])
def test_two_troubles_at_all_points(name: str) -> None:
    check_trouble(name, look_around(name, plan_of(2, 1), piece=ALL, troubles=2))


@pytest.mark.parametrize("name", ["1 + 1", "2, the last decodes"])
def test_an_endless_video_until_something_happens(name: str) -> None:
    explored = look_around(name, plan_of(None, 2), piece=2, troubles=1)
    assert Phase.DONE not in explored.phases
    assert explored.phases >= BAD_ENDS
    assert "held back" in explored.sights


def test_videos_that_come_at_any_time() -> None:
    """And answers come alone or two at a time."""
    explored = look_around("2 + 1", plan_of(1, 1), plan_of(1, 1), at_once=False, batch=2)
    assert Phase.DONE in explored.phases and not BAD_ENDS & explored.phases


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACEMENTS)
def test_longer_stories(name: str) -> None:
    for piece in (1, 2, ALL) if name in SMALL else (2, ALL):
        look_around(name, plan_of(3, 3), piece=piece, batch=2)
        check_trouble(name, look_around(name, plan_of(2, 2), piece=piece, troubles=1))
    if name in SMALL:
        check_trouble(name, look_around(name, plan_of(3, 1), piece=1, troubles=1, ahead=2, lag=0), "held back")
        check_trouble(name, look_around(name, plan_of(2, 1), plan_of(1, 1), troubles=1, at_once=False))
        check_trouble(name, look_around(name, plan_of(2, 2), piece=2, troubles=1, batch=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2, the first decodes", "2, the last decodes"])
def test_two_troubles_in_longer_stories(name: str) -> None:
    check_trouble(name, look_around(name, plan_of(2, 2, Prefix.RERUN), piece=2, troubles=2, ahead=9, lag=9))
    check_trouble(name, look_around(name, plan_of(1, 1), plan_of(1, 1), troubles=2))


def test_circles_are_found() -> None:
    assert is_acyclic([[1, 2], [2], []])
    assert not is_acyclic([[1], [2], [1]])
