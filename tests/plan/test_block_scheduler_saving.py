"""Videos that are saved on the way, and videos that begin with what was saved: who waits for whom, and what is told."""

import dataclasses

import pytest

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan, Prefix
from pipedit.core.placement import Placement
from pipedit.core.snapshots import Saving, Snapshot
from pipedit.plan.block_scheduler import BlockPolicy, BlockScheduler
from pipedit.plan.jobs import Phase
from tests.plan.block_ranks import BlockRanks, order_of, plan_of
from tests.plan.block_rehearsal import LAST_DECODES, TWO_AND_ONE, Rehearsal
from tests.plan.exploration import explore
from tests.plan.test_block_scheduler_states import PLACEMENTS, RULES, SMALL, World, make

SAVING = Saving(folder="run", every=1)


def rehearsal_of(placement: Placement, *, saving: Saving | None = SAVING, lag: int = 1, **policy: int) -> Rehearsal:
    """Of a video "a" that is saved."""
    rehearsal = Rehearsal(placement, lag=lag, **policy)
    if saving is not None:
        rehearsal.ranks.saving["a"] = saving
    return rehearsal


def test_all_ranks_save_when_they_are_level_and_then_go_on() -> None:
    rehearsal = rehearsal_of(TWO_AND_ONE, piece=2)
    rehearsal.submit(plan_of(2, 2), "a")
    assert rehearsal.ask() == ["2: encode a"]
    assert rehearsal.finish(2) == ["0: run a 0-2", "1: run a 0-2"]
    assert rehearsal.finish(0) == [], "nothing beyond the cut"
    assert rehearsal.finish(1) == ["0: save a 2", "1: save a 2", "2: save a 2"]
    (command,) = [c for c in rehearsal.ranks.in_flight.values() if c.ranks == (0,)]
    assert isinstance(command, messages.SaveBlocks) and command.path == "run/2"
    assert rehearsal.finish(0) == [], "others are still at it"
    assert rehearsal.scheduler.job("a").snapshot is None
    assert rehearsal.finish(2, 1) == ["0: run a 2-4", "1: run a 2-4"]
    saved = rehearsal.scheduler.job("a").snapshot
    assert saved == Snapshot(folder="run/2", at=2, decoded=0, num_bytes={0: 100, 1: 101, 2: 102})
    rehearsal.go_to_the_end()
    assert rehearsal.phase("a") is Phase.DONE
    assert rehearsal.scheduler.job("a").snapshot == saved, "nothing is saved at the end"


def test_the_decoder_ends_what_it_is_at_and_begins_nothing() -> None:
    rehearsal = rehearsal_of(TWO_AND_ONE, piece=1, lag=0, blocks_waiting=9, saving=Saving(folder="run", every=4))
    rehearsal.submit(plan_of(9, 1), "a")
    rehearsal.go_until("2: decode a 0")
    for _ in range(9):
        rehearsal.finish(*[rank for rank in (0, 1) if rank in rehearsal.ranks.in_flight])
    assert rehearsal.ranks.in_flight.keys() == {2}
    assert rehearsal.ranks.videos["a"].given == [4, 4]
    assert rehearsal.finish(2) == ["0: save a 4", "1: save a 4", "2: save a 4"]
    assert rehearsal.finish(0, 1) == []
    assert rehearsal.finish(2) == ["2: decode a 1", "0: run a 4-5", "1: run a 4-5"]
    saved = rehearsal.scheduler.job("a").snapshot
    assert saved is not None and (saved.at, saved.decoded) == (4, 1)


@pytest.mark.parametrize(("every", "cuts"), [(1, [3, 6, 9]), (2, [6]), (3, [9]), (4, []), (100, [])])
def test_as_often_as_asked_for(every: int, cuts: list[int]) -> None:
    rehearsal = rehearsal_of(LAST_DECODES, saving=Saving(folder="run", every=every))
    rehearsal.submit(plan_of(3, 4), "a")  # twelve operations, three blocks in flight
    seen = []
    rehearsal.ask()
    while rehearsal.ranks.in_flight:
        seen += [
            command.at for command in rehearsal.ranks.in_flight.values() if isinstance(command, messages.SaveBlocks)
        ]
        rehearsal.finish_all()
    assert list(dict.fromkeys(seen)) == cuts


def test_blocks_that_turn_out_finished_while_saving_are_decoded() -> None:
    rehearsal = rehearsal_of(TWO_AND_ONE, piece=3, lag=2)
    rehearsal.submit(plan_of(2, 2), "a")
    rehearsal.go_until("0: save a 3")
    assert rehearsal.ranks.videos["a"].told == 0, "its last result was still on its way"
    assert rehearsal.finish(0, 1, 2) == ["2: decode a 0", "0: run a 3-4", "1: run a 3-4"]
    rehearsal.go_to_the_end()
    assert rehearsal.phase("a") is Phase.DONE


def test_the_first_stage_tells_how_long_saving_took() -> None:
    rehearsal = rehearsal_of(TWO_AND_ONE, piece=2)
    rehearsal.submit(plan_of(2, 2), "a")
    rehearsal.go_until("0: save a 2")
    scheduler = rehearsal.scheduler
    events = [messages.BlocksSaved(request_id="a", rank=rank, at=2, num_bytes=1) for rank in range(3)]
    assert [scheduler.speaks(event) for event in events] == [True, False, False]
    assert scheduler.advance(events[0]) is None


# -- going on --------------------------------------------------------------------------------------------------------


def resumed(rehearsal: Rehearsal, plan: BlockPlan, at: int, decoded: int) -> None:
    rehearsal.ranks.resume["a"] = Snapshot(folder="before/x", at=at, decoded=decoded)
    rehearsal.submit(plan, "a")


def test_a_video_goes_on_where_it_was() -> None:
    rehearsal = rehearsal_of(TWO_AND_ONE, saving=None, piece=4)
    plan = plan_of(4, 2)
    assert order_of(plan).finished(5) == 2
    resumed(rehearsal, plan, at=5, decoded=1)
    rehearsal.go_until("0: run a 5-8", "1: run a 5-8")
    sent = [command for command in rehearsal.ranks.in_flight.values() if isinstance(command, messages.DenoiseBlocks)]
    assert {command.resume for command in sent} == {"before/x"}
    rehearsal.go_until("2: decode a 1")
    (decode,) = rehearsal.ranks.in_flight.values()
    assert isinstance(decode, messages.DecodeBlock) and decode.resume == "before/x"
    assert rehearsal.finish(2) == ["2: decode a 2"]
    (decode,) = rehearsal.ranks.in_flight.values()
    assert isinstance(decode, messages.DecodeBlock) and decode.resume is None
    rehearsal.go_to_the_end()
    assert rehearsal.phase("a") is Phase.DONE


def test_a_decoder_that_had_not_begun_begins() -> None:
    rehearsal = rehearsal_of(TWO_AND_ONE, saving=None, piece=4)
    resumed(rehearsal, plan_of(4, 2), at=1, decoded=0)
    rehearsal.go_until("2: decode a 0")
    assert all(getattr(command, "resume", None) is None for command in rehearsal.ranks.in_flight.values())
    rehearsal.go_to_the_end()


def test_the_next_cut_counts_from_the_last_one() -> None:
    rehearsal = rehearsal_of(TWO_AND_ONE, piece=2, saving=Saving(folder="run", every=2))
    resumed(rehearsal, plan_of(9, 2), at=3, decoded=0)
    rehearsal.go_until("0: save a 7")
    rehearsal.go_until("0: save a 11")


# -- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("doing", ["0: save a 2", "1: save a 2", "2: save a 2"])
def test_who_cannot_save_fails_the_video(doing: str) -> None:
    rehearsal = rehearsal_of(TWO_AND_ONE, piece=2)
    rehearsal.submit(plan_of(2, 2), "a", "b")
    rehearsal.go_until(doing)
    rehearsal.fail(int(doing[0]))
    rehearsal.go_to_the_end()
    assert (rehearsal.phase("a"), rehearsal.phase("b")) == (Phase.FAILED, Phase.DONE)


def test_a_cancel_at_a_cut_saves_nothing() -> None:
    rehearsal = rehearsal_of(TWO_AND_ONE, piece=2)
    rehearsal.submit(plan_of(2, 2), "a")
    rehearsal.go_until("1: run a 0-2")
    rehearsal.finish(0)
    rehearsal.cancel("a")
    assert rehearsal.finish(1) == ["0: forget a", "1: forget a", "2: forget a"]
    rehearsal.go_to_the_end()
    assert rehearsal.phase("a") is Phase.CANCELLED


def test_a_cancel_while_saving_ends_with_it() -> None:
    rehearsal = rehearsal_of(TWO_AND_ONE, piece=2)
    rehearsal.submit(plan_of(2, 2), "a")
    rehearsal.go_until("0: save a 2")
    rehearsal.finish(0)
    rehearsal.cancel("a")
    assert rehearsal.finish(1) == []
    assert rehearsal.finish(2) == ["0: forget a", "1: forget a", "2: forget a"]
    rehearsal.go_to_the_end()
    assert rehearsal.phase("a") is Phase.CANCELLED


# -- every order of events -------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class Seen:
    phases: set[Phase] = dataclasses.field(default_factory=set)
    sights: set[str] = dataclasses.field(default_factory=set)


def look_around(
    name: str,
    plan: BlockPlan,
    *,
    saving: Saving | None = SAVING,
    resume: Snapshot | None = None,
    troubles: int = 0,
    waiting: int = 1,
) -> Seen:
    """A video of this plan, in commands of one operation each."""
    policy, named = BlockPolicy(piece=1, blocks_waiting=waiting), {"a": plan}
    ranks = BlockRanks(PLACEMENTS[name], named, policy, lag=1)
    ranks.saving = {} if saving is None else {"a": saving}
    ranks.resume = {} if resume is None else {"a": resume}
    scheduler = BlockScheduler(PLACEMENTS[name], policy)
    world = World(scheduler=scheduler, ranks=ranks, coming=["a"], troubles=troubles)
    make(world, ("submit", "a"))
    make(world, ("ask", None))
    seen = Seen()
    for state in explore(world, RULES):
        seen.phases.update(job.phase for job in state.scheduler._jobs.values())
        seen.sights.update(_sights(state))
    return seen


def _sights(world: World) -> list[str]:
    found = []
    kinds = [type(command) for command in world.ranks.in_flight.values()]
    job = world.scheduler._jobs["a"]
    if messages.SaveBlocks in kinds:
        found.append("saving")
        found += ["failed while saving"] if job.failure is not None and not job.is_over else []
        found += ["cancelled while saving"] if job.cancel_wanted and not job.is_over else []
    if messages.DecodeBlock in kinds and world.scheduler._is_at_cut(job):
        found.append("waiting for the decoder")
    return found


@pytest.mark.parametrize("name", PLACEMENTS)
def test_saved_in_every_order(name: str) -> None:
    every = Saving(folder="run", every=1 if name in SMALL else 2)
    seen = look_around(name, plan_of(2, 2), saving=every)
    assert seen.phases >= {Phase.DONE} and "saving" in seen.sights
    if PLACEMENTS[name].is_disaggregated:
        more = look_around(name, plan_of(5, 1), saving=every, waiting=3)
        assert "waiting for the decoder" in seen.sights | more.sights


@pytest.mark.parametrize("name", SMALL)
def test_one_trouble_at_every_point(name: str) -> None:
    seen = look_around(name, plan_of(2, 1), troubles=1)
    assert seen.phases >= {Phase.DONE, Phase.FAILED, Phase.CANCELLED}
    assert {"saving", "failed while saving", "cancelled while saving"} - seen.sights <= (
        {"failed while saving"} if len(PLACEMENTS[name].world) == 1 else set()
    )


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("prefix", Prefix)
def test_resumed_in_every_order_with_one_trouble(name: str, prefix: Prefix) -> None:
    plan = plan_of(2, 2, prefix)
    for at in range(1, 4):
        for decoded in range(order_of(plan).finished(at) + 1):
            resume = Snapshot(folder="before/x", at=at, decoded=decoded)
            seen = look_around(name, plan, resume=resume, troubles=at % 2)
            assert Phase.DONE in seen.phases
