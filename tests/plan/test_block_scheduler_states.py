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
from tests.plan.block_ranks import ALL, REQUEST, BlockRanks, plan_of, work_of
from tests.plan.exploration import Move, Rules, explore


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
    if any(_is_at_horizon(world, request_id) for request_id in ranks.videos):
        yield from (("cancel", request_id) for request_id in ranks.videos)
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
    if kind == "doom":
        world.troubles -= 1
        return ranks.doom(*what)
    world.unseen = 0 if kind == "ask" else world.unseen + 1
    world.troubles -= kind in ("die", "cancel")
    match kind:
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
            scheduler.submit(what, REQUEST, work_of(ranks.plans[what]))
        case "cancel":
            scheduler.cancel(what)
            if what in ranks.videos:
                ranks.videos[what].cancelled = True
        case "die":
            scheduler.lose_workers(WorkerDiedError("killed", rank=what, doing="working"))
            ranks.lose()
    check_sound(scheduler, ranks)


# -- states that behave alike are one --------------------------------------------------------------------------------

_NO_MATTER = frozenset(
    "request work plans placement policy blocks ahead stages decoder horizon "
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
) -> Explored:
    """Videos a, b, ... of these plans, which come at once or at any time."""
    placement, policy = PLACEMENTS[name], BlockPolicy(piece=piece, blocks_waiting=waiting, patience=1)
    named = dict(zip("abc", plans, strict=False))
    world = World(
        scheduler=BlockScheduler(placement, policy),
        ranks=BlockRanks(placement, named, policy, ahead=ahead),
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
        if job.cancel_wanted and not job.is_level:
            yield "cancelled in between"
        if job.failure is not None and not job.is_over:
            yield "failed and not over"
        if ranks.policy.blocks_waiting == video.told - video.decoded and video.given[0] != job.plan.num_operations:
            yield "held back"
        if job.decoding and any(isinstance(other, messages.DenoiseBlocks) for other in ranks.in_flight.values()):
            yield "decoded meanwhile"


@pytest.mark.parametrize("piece", [1])
def test_x(piece: int) -> None:
    look_around("1", plan_of(1, 1, Prefix.RERUN), piece=ALL)
