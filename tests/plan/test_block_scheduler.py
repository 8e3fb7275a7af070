"""The life of a video that is made block by block: its commands, from the prompt to the last frame, and its turn."""

import dataclasses
from typing import Any

import pytest

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan
from pipedit.core.placement import Placement
from pipedit.plan.block_scheduler import BlockPolicy, BlockScheduler
from pipedit.plan.jobs import Phase, Work
from pipedit.plan.scheduling import Advance, Scheduler
from tests.plan.block_ranks import REQUEST, plan_of, work_of
from tests.plan.block_rehearsal import LAST_DECODES, TWO_AND_ONE, Rehearsal

# -- from the prompt to the last frame -------------------------------------------------------------------------------


def test_one_video_from_the_prompt_to_the_last_block() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE, piece=2)
    rehearsal.submit(plan_of(2, 2), "a")
    assert rehearsal.ask() == ["2: encode a"]
    assert rehearsal.finish(2) == ["0: run a 0-2", "1: run a 0-2"]
    assert rehearsal.finish(0) == ["0: run a 2-4"], "it does not wait for the others"
    assert rehearsal.finish(1) == ["1: run a 2-4"]
    assert rehearsal.finish(1) == []
    assert rehearsal.finish(0) == ["2: decode a 0"]
    assert rehearsal.finish(2) == ["2: decode a 1"]
    assert rehearsal.phase("a") is Phase.DENOISING
    assert rehearsal.finish(2) == ["0: forget a", "1: forget a", "2: forget a"]
    assert rehearsal.phase("a") is Phase.DONE
    rehearsal.go_to_the_end()
    rehearsal.scheduler.forget("a")


def test_others_are_given_what_the_first_stage_was_given_in_pieces_of_their_own() -> None:
    rehearsal = Rehearsal(LAST_DECODES, piece=2, blocks_waiting=9, lag=9)
    rehearsal.ranks.ahead = 9
    rehearsal.submit(plan_of(9, 1), "a")
    rehearsal.go_until("0: run a 0-2")
    rehearsal.finish(0)
    assert rehearsal.finish(0) == ["0: run a 4-6"]
    assert rehearsal.finish(1) == ["1: run a 2-4"]


def test_decoded_blocks_are_told_of_and_fetched_from_the_first_stage() -> None:
    rehearsal = Rehearsal(LAST_DECODES, piece=1, blocks_waiting=1, lag=0)
    rehearsal.submit(plan_of(4, 1), "a")
    told: dict[int, int] = {}
    fetched: dict[int, int] = {}
    rehearsal.ask()
    while rehearsal.ranks.in_flight:
        sent = rehearsal.ranks.in_flight.values()
        told |= {c.first: c.decoded for c in sent if isinstance(c, messages.DenoiseBlocks) and c.ranks == (0,)}
        fetched |= {c.block: c.latents_at for c in sent if isinstance(c, messages.DecodeBlock)}
        rehearsal.finish_all()
    assert told == {0: 0, 1: 0, 2: 1, 3: 2}
    assert fetched == dict.fromkeys(range(4), 0)


def test_the_first_stage_stops_when_too_many_blocks_wait() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE, piece=1, blocks_waiting=2, lag=0)
    rehearsal.submit(plan_of(9, 1), "a")
    rehearsal.go_until("2: decode a 0")
    for _ in range(20):
        rehearsal.finish(*[rank for rank in (0, 1) if rank in rehearsal.ranks.in_flight])
    assert rehearsal.ranks.in_flight.keys() == {2}
    assert rehearsal.ranks.videos["a"].told == 2
    assert rehearsal.finish(2) == ["2: decode a 1", "0: run a 3-4", "1: run a 3-4"]


def test_a_rank_that_does_both_decodes_first() -> None:
    rehearsal = Rehearsal(Placement.colocated(1), piece=1, lag=0)
    rehearsal.submit(plan_of(3, 1), "a")
    rehearsal.ask()
    rehearsal.finish(0)
    rehearsal.finish(0)
    assert rehearsal.finish(0) == ["0: decode a 0"]


@pytest.mark.parametrize(
    ("plan", "piece", "operations"),
    [
        (plan_of(3, 50), None, 3),
        (plan_of(60, 50), None, 50),
        (plan_of(None, 50), None, 50),
        (plan_of(None, 50), 7, 7),
    ],
)
def test_a_command_is_about_one_pass_over_the_blocks_in_flight(
    plan: BlockPlan, piece: int | None, operations: int
) -> None:
    assert BlockPolicy(piece=piece).operations(plan) == operations


def test_one_of_several_encoders_and_one_of_several_decoders_are_enough() -> None:
    rehearsal = Rehearsal(Placement(encoders=(3, 2), denoisers=(0, 1), decoders=(2, 3)))
    rehearsal.submit(plan_of(1, 1), "a")
    assert rehearsal.ask() == ["3: encode a"]
    rehearsal.go_until("2: decode a 0")
    rehearsal.go_to_the_end()


def test_one_worker_makes_videos_one_after_the_other() -> None:
    rehearsal = Rehearsal(Placement.colocated(1))
    rehearsal.submit(plan_of(1, 1), "a", "b")
    sent = rehearsal.ask()
    while rehearsal.ranks.in_flight:
        sent += rehearsal.finish_all()
    each = ["0: encode {}", "0: run {} 0-1", "0: decode {} 0", "0: forget {}"]
    assert sent == [words.format(request_id) for request_id in "ab" for words in each]


def test_more_urgent_videos_go_first_but_nobody_waits_for_ever() -> None:
    rehearsal = Rehearsal(Placement.colocated(1), patience=2)
    rehearsal.submit(plan_of(1, 1), "old")
    rehearsal.submit(plan_of(1, 1), "x", "y", "z", priority=1)
    rehearsal.ask()
    ends: list[str] = []
    while rehearsal.ranks.in_flight:
        rehearsal.finish_all()
        ends += [name for name in ("old", *"xyz") if rehearsal.phase(name) is Phase.DONE and name not in ends]
    assert ends == ["x", "y", "old", "z"]


def test_a_more_urgent_one_may_come_until_the_next_one_really_begins() -> None:
    rehearsal = Rehearsal(Placement.colocated(1))
    rehearsal.submit(plan_of(1, 1), "a", "b")
    rehearsal.go_until("0: forget a")
    rehearsal.submit(plan_of(1, 1), "urgent", priority=1)
    assert rehearsal.finish(0) == ["0: encode urgent"]
    rehearsal.go_to_the_end()


def test_an_endless_video_needs_no_more_memory_than_a_short_one() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE, lag=3)
    rehearsal.submit(plan_of(None, 4), "a")
    rehearsal.ask()
    sizes = set()
    for turn in range(400):
        rehearsal.finish_all()
        if turn >= 40:
            sizes.add(_size(rehearsal.scheduler))
    assert max(sizes) - min(sizes) <= 10, "only of what is in flight"
    assert rehearsal.ranks.videos["a"].decoded > 50
    rehearsal.cancel("a")
    rehearsal.go_to_the_end()
    assert rehearsal.phase("a") is Phase.CANCELLED


def _size(value: Any) -> int:
    """How many things it holds, frozen ones counted as one."""
    if isinstance(value, (list, tuple, set)):
        return sum(map(_size, value))
    if isinstance(value, dict):
        return _size(list(value.values()))
    has_parts = hasattr(value, "__dict__") and not isinstance(value, (messages.Command, BlockPlan, Placement, Work))
    return 1 + (_size(vars(value)) if has_parts and not dataclasses.is_dataclass(type(value)) else 0)


# -- what drivers ask ------------------------------------------------------------------------------------------------


def test_progress_is_told_by_one_rank_for_all() -> None:
    rehearsal = Rehearsal(Placement.serial_decode(2), piece=2)
    scheduler: Scheduler = rehearsal.scheduler
    rehearsal.submit(plan_of(2, 2), "a")
    rehearsal.ask()
    told, heard = [], []
    while rehearsal.ranks.in_flight:
        for rank in [rank for rank in list(rehearsal.ranks.in_flight) if rehearsal.ranks.can_finish(rank)]:
            event = rehearsal.ranks.finish(rank)
            speaks = scheduler.speaks(event)
            scheduler.receive(event)
            advance = scheduler.advance(event)
            assert not scheduler.speaks(event), "it was told"
            if speaks and advance is not None:
                told.append((rank, advance))
            elif not isinstance(event, messages.Released):
                heard.append(rank)
        rehearsal.ask()
    assert told == [
        (0, Advance(stage="encode", what="encode", done=1, total=1)),
        (0, Advance(stage="denoise", what="step", done=2, total=4)),
        (0, Advance(stage="denoise", what="step", done=4, total=4)),
        (0, Advance(stage="decode", what="decode", done=1, total=2)),
        (0, Advance(stage="decode", what="decode", done=2, total=2)),
    ]
    assert heard == [1, 1, 1]


def test_nobody_knows_how_long_an_endless_video_is() -> None:
    rehearsal = Rehearsal(Placement.colocated(1))
    rehearsal.submit(plan_of(None, 2), "a")
    done = messages.BlocksDone(request_id="a", rank=0, done=6)
    decoded = messages.BlockDecoded(request_id="a", rank=0, block=3)
    advances = [rehearsal.scheduler.advance(event) for event in (done, decoded)]
    assert [(a.done, a.total) for a in advances if a is not None] == [(6, None), (4, None)]
    failed = messages.CommandFailed(request_id="a", rank=0, doing="it", error=RuntimeError())
    assert rehearsal.scheduler.advance(failed) is None


def test_reports_that_nobody_waits_for_change_nothing() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE)
    rehearsal.submit(plan_of(2, 2), "a")
    rehearsal.go_until("1: run a 0-2")
    for stale in (
        messages.BlocksDone(request_id="older", rank=0, done=4),
        messages.CommandFailed(request_id="older", rank=1, doing="it", error=RuntimeError()),
        messages.BlockDecoded(request_id="a", rank=2, block=0),
    ):
        assert not rehearsal.scheduler.speaks(stale)
        rehearsal.scheduler.receive(stale)
    assert rehearsal.ask() == []
    rehearsal.go_to_the_end()
    assert rehearsal.phase("a") is Phase.DONE


@pytest.mark.parametrize("wrong", [{"blocks_waiting": 0}, {"patience": 0}, {"piece": 0}])
def test_a_policy_with_which_nothing_would_begin_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        BlockPolicy(**wrong)


def test_what_is_not_made_block_by_block_is_refused() -> None:
    scheduler = BlockScheduler(TWO_AND_ONE)
    with pytest.raises(AssertionError):
        scheduler.submit("a", REQUEST, Work(num_steps=1, num_chunks=1))
    scheduler.submit("b", REQUEST, work_of(plan_of(1, 1)))
    with pytest.raises(AssertionError, match="already in use"):
        scheduler.submit("b", REQUEST, work_of(plan_of(1, 1)))
    with pytest.raises(AssertionError):
        scheduler.forget("b")
