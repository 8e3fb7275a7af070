"""What goes wrong with videos that are made block by block: cancels, failures, and workers that die."""

import pytest

from pipedit.core import messages
from pipedit.core.errors import WorkerDiedError
from pipedit.core.placement import Placement
from pipedit.plan.jobs import Phase
from tests.plan.block_ranks import ALL, plan_of
from tests.plan.block_rehearsal import ENCODE_ELSEWHERE, THREE_AND_ONE, TWO_AND_ONE, Rehearsal

# -- cancel ----------------------------------------------------------------------------------------------------------


def test_after_a_cancel_all_stages_run_what_one_of_them_was_given() -> None:
    rehearsal = Rehearsal(THREE_AND_ONE, piece=1)
    rehearsal.ranks.ahead = 9
    rehearsal.submit(plan_of(4, 1), "a")
    rehearsal.go_until("0: run a 0-1")
    rehearsal.finish(0)
    rehearsal.finish(0)
    rehearsal.cancel("a")
    assert rehearsal.ask() == [], "whoever is at work goes on"
    assert rehearsal.finish(1) == ["1: run a 1-2"]
    assert rehearsal.finish(1) == ["1: run a 2-3"]
    assert rehearsal.finish(2) == ["2: run a 1-2"]
    assert rehearsal.phase("a") is Phase.DENOISING
    rehearsal.finish(1, 2)
    rehearsal.finish(2)
    assert rehearsal.phase("a") is Phase.DENOISING, "the first stage still waits for a result"
    assert rehearsal.finish(0) == ["0: forget a", "1: forget a", "2: forget a", "3: forget a"]
    assert rehearsal.phase("a") is Phase.CANCELLED
    rehearsal.go_to_the_end()


def test_after_a_cancel_nothing_is_decoded() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE, piece=1, lag=0)
    rehearsal.submit(plan_of(3, 1), "a")
    rehearsal.go_until("2: decode a 0")
    rehearsal.cancel("a")
    rehearsal.go_to_the_end()
    assert rehearsal.phase("a") is Phase.CANCELLED


def test_a_cancel_counts_until_the_last_block_is_there() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE)
    rehearsal.submit(plan_of(1, 1), "a")
    rehearsal.go_until("2: decode a 0")
    rehearsal.cancel("a")
    rehearsal.finish(2)
    assert rehearsal.phase("a") is Phase.CANCELLED
    rehearsal.go_to_the_end()


@pytest.mark.parametrize("answered", [(), (0,), (1,)])
def test_a_cancel_while_the_prompt_is_encoded(answered: tuple[int, ...]) -> None:
    rehearsal = Rehearsal(Placement.serial_decode(2))
    rehearsal.submit(plan_of(2, 2), "a")
    assert rehearsal.ask() == ["0: encode a", "1: encode a"]
    rehearsal.finish(*answered)
    rehearsal.cancel("a")
    assert rehearsal.ask() == []
    rehearsal.finish_all()
    assert rehearsal.phase("a") is Phase.CANCELLED
    rehearsal.go_to_the_end()


def test_a_queued_request_ends_at_once_and_nobody_has_to_forget_it() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE)
    rehearsal.submit(plan_of(1, 1), "a", "b")
    rehearsal.ask()
    rehearsal.cancel("b")
    assert rehearsal.phase("b") is Phase.CANCELLED
    assert not rehearsal.scheduler.is_held("b")
    rehearsal.cancel("b")  # no effect, like any cancel of what is over
    rehearsal.cancel("never heard of")
    rehearsal.go_to_the_end()
    assert rehearsal.phase("a") is Phase.DONE


# -- failures --------------------------------------------------------------------------------------------------------


def test_after_a_failure_whoever_has_no_command_lets_go_at_once() -> None:
    """Stage 2 has done what it was given, and stage 0 waits for more of it."""
    rehearsal = Rehearsal(THREE_AND_ONE, piece=1)
    rehearsal.ranks.ahead = 9
    rehearsal.submit(plan_of(1, 5), "a")
    rehearsal.go_until("0: run a 0-1", "1: run a 0-1", "2: run a 0-1")
    rehearsal.finish(0)
    assert rehearsal.finish(0) == ["0: run a 2-3"]
    assert rehearsal.finish(1) == ["1: run a 1-2"]
    rehearsal.scheduler.receive(rehearsal.ranks.finish(2))
    assert rehearsal.fail(1) == ["1: drop a", "2: drop a", "3: drop a"]
    assert not rehearsal.ranks.can_finish(0)
    rehearsal.finish(2)
    assert rehearsal.finish(0) == ["0: drop a"], "now it has failed, too"
    rehearsal.finish(0, 1, 3)
    assert rehearsal.phase("a") is Phase.FAILED
    rehearsal.go_to_the_end()


def test_after_a_failure_whoever_ends_its_command_lets_go_then() -> None:
    """Stage 1 has what it needs for its command, but stage 0 waits for what would have come of the next one."""
    rehearsal = Rehearsal(TWO_AND_ONE, piece=1, blocks_waiting=9)
    rehearsal.ranks.ahead = 9
    rehearsal.submit(plan_of(9, 1), "a")
    rehearsal.go_until("2: decode a 0")
    while rehearsal.ranks.can_finish(0):
        rehearsal.finish(0)
    assert rehearsal.ranks.in_flight.keys() == {0, 1, 2}
    assert rehearsal.fail(2) == ["2: drop a"]
    assert rehearsal.finish(1) == ["1: drop a"]
    assert not rehearsal.ranks.can_finish(0)
    rehearsal.finish(1)
    assert rehearsal.finish(0) == ["0: drop a"]
    rehearsal.go_to_the_end()
    assert rehearsal.phase("a") is Phase.FAILED


def epoch_of(rehearsal: Rehearsal) -> set[int]:
    return {c.epoch for c in rehearsal.ranks.in_flight.values() if isinstance(c, messages.DenoiseBlocks)}


@pytest.mark.parametrize("doing", ["2: encode a", "0: run a 0-1", "1: run a 0-1", "2: decode a 0", "1: forget a"])
def test_after_any_failure_the_next_video_runs_in_a_new_epoch(doing: str) -> None:
    """Whatever failed, some stage has let go of the others."""
    rehearsal = Rehearsal(TWO_AND_ONE, piece=1)
    rehearsal.submit(plan_of(1, 2), "a", "b")
    rehearsal.go_until(doing)
    rehearsal.fail(int(doing[0]))
    rehearsal.go_until("0: run b 0-1")
    (epoch,) = epoch_of(rehearsal)
    assert epoch >= 1
    rehearsal.go_to_the_end()
    assert rehearsal.phase("a") is (Phase.DONE if doing == "1: forget a" else Phase.FAILED)
    assert rehearsal.phase("b") is Phase.DONE


def test_without_a_failure_the_epoch_stays() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE)
    rehearsal.submit(plan_of(2, 2), "a", "b", "c")
    rehearsal.go_until("0: run a 0-2")
    rehearsal.cancel("a")
    rehearsal.go_until("0: run c 0-2")
    assert epoch_of(rehearsal) == {0}


def test_the_first_failure_is_the_one_that_is_told() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE, piece=ALL)
    rehearsal.submit(plan_of(2, 2), "a")
    rehearsal.go_until("2: encode a")
    rehearsal.scheduler.receive(rehearsal.ranks.finish(2))
    rehearsal.ask(1)
    rehearsal.finish(1)
    first = rehearsal.scheduler.job("a").failure
    rehearsal.finish(0)
    assert rehearsal.scheduler.job("a").failure is first is not None
    assert first.rank == 1


def test_a_failure_after_a_cancel_counts() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE)
    rehearsal.submit(plan_of(2, 2), "a")
    rehearsal.go_until("0: run a 0-2")
    rehearsal.cancel("a")
    rehearsal.fail(1)
    rehearsal.go_to_the_end()
    assert rehearsal.phase("a") is Phase.FAILED


def test_stages_meet_in_their_first_commands() -> None:
    """One that still has to forget the last video could not let go of the others if that went wrong."""
    rehearsal = Rehearsal(ENCODE_ELSEWHERE, piece=1)
    rehearsal.submit(plan_of(1, 1), "a")
    rehearsal.submit(plan_of(2, 2), "b")
    rehearsal.go_until("1: forget a")
    rehearsal.finish(3, 0)
    assert rehearsal.finish(3) == [], "b is encoded"
    assert rehearsal.finish(1) == ["0: run b 0-1", "1: run b 0-1"]
    assert 2 in rehearsal.ranks.in_flight, "the decoder may still be at it"
    assert rehearsal.fail(2) == [], "whatever comes of that"
    rehearsal.go_to_the_end()
    assert rehearsal.phase("b") is Phase.DONE


def test_a_name_may_be_taken_again_while_ranks_still_forget_the_first_one() -> None:
    rehearsal = Rehearsal(ENCODE_ELSEWHERE)
    rehearsal.submit(plan_of(1, 1), "a")
    rehearsal.go_until("0: forget a")
    rehearsal.scheduler.forget("a")
    rehearsal.submit(plan_of(2, 2), "a")
    assert rehearsal.scheduler.is_held("a")
    rehearsal.scheduler.receive(rehearsal.ranks.fail(1))
    assert rehearsal.phase("a") is Phase.QUEUED, "that was no failure of this one"
    rehearsal.finish(0, 2, 3)
    rehearsal.go_to_the_end()
    assert rehearsal.phase("a") is Phase.DONE


# -- dead workers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("doing", ["2: encode a", "1: run a 0-2", "2: decode a 0"])
def test_what_was_under_way_dies_with_the_workers(doing: str) -> None:
    rehearsal = Rehearsal(TWO_AND_ONE)
    rehearsal.submit(plan_of(2, 2), "a", "b")
    rehearsal.go_until(doing)
    rehearsal.die()
    assert [rehearsal.phase(request_id) for request_id in "ab"] == [Phase.FAILED, Phase.QUEUED]
    assert not rehearsal.scheduler.is_held("a"), "there is nobody who could forget it"
    failure = rehearsal.scheduler.job("a").failure
    assert failure is not None
    assert isinstance(failure.error, WorkerDiedError)
    assert failure.doing == "working"
    rehearsal.go_to_the_end()
    assert rehearsal.phase("b") is Phase.DONE


def test_who_has_not_begun_outlives_the_workers() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE)
    rehearsal.submit(plan_of(1, 1), "a", "b")
    rehearsal.go_until("2: forget a")
    rehearsal.die()
    assert rehearsal.phase("b") is Phase.QUEUED
    rehearsal.go_to_the_end()
    assert [rehearsal.phase(request_id) for request_id in "ab"] == [Phase.DONE, Phase.DONE]


def test_who_has_died_need_not_forget() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE)
    rehearsal.submit(plan_of(1, 1), "a", "b")
    rehearsal.go_until("2: decode a 0")
    rehearsal.scheduler.receive(rehearsal.ranks.finish(2))
    rehearsal.die()
    assert rehearsal.phase("a") is Phase.DONE
    assert rehearsal.ask() == ["2: encode b"]
    rehearsal.go_to_the_end()


def test_whoever_was_cancelled_or_failed_before_stays_so_when_the_workers_die() -> None:
    for trouble, end in (("cancel", Phase.CANCELLED), ("fail", Phase.FAILED)):
        rehearsal = Rehearsal(TWO_AND_ONE)
        rehearsal.submit(plan_of(2, 2), "a")
        rehearsal.go_until("1: run a 0-2")
        if trouble == "cancel":
            rehearsal.cancel("a")
        else:
            rehearsal.fail(1)
        failure = rehearsal.scheduler.job("a").failure
        rehearsal.die()
        assert rehearsal.phase("a") is end
        assert rehearsal.scheduler.job("a").failure is failure


def test_without_workers_for_good_everything_ends() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE)
    rehearsal.submit(plan_of(2, 2), "a", "b")
    rehearsal.go_until("1: run a 0-2")
    rehearsal.scheduler.abandon()
    rehearsal.ranks.lose()
    assert [rehearsal.phase(request_id) for request_id in "ab"] == [Phase.CANCELLED, Phase.CANCELLED]
    assert rehearsal.scheduler.is_idle
    assert rehearsal.scheduler.next_commands() == []
    rehearsal = Rehearsal(TWO_AND_ONE)
    rehearsal.submit(plan_of(2, 2), "a")
    rehearsal.go_until("1: run a 0-2")
    rehearsal.fail(1)
    rehearsal.scheduler.abandon()
    assert rehearsal.phase("a") is Phase.FAILED
