"""The life of a request: its commands, its end, what goes wrong on the way, and what ranks are told to forget."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipedit.core import messages
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Placement, Role
from pipedit.plan.jobs import LEGAL_TRANSITIONS, Phase, Work
from pipedit.plan.scheduler import Policy, RequestScheduler
from tests.plan.scheduled_ranks import PLACEMENTS, REQUEST, Rehearsal, Sent, play, seconds, size_of

SHORT = Work(num_steps=1, num_chunks=1)
LONG = Work(num_steps=3, num_chunks=2)
ENCODE_THERE = Placement.disaggregated(denoise=1, decode=1, encoder=Role.DECODER)
TWO_AND_ONE = Placement.disaggregated(denoise=2, decode=1, encoder=Role.DENOISER)


def in_words(commands: list[messages.Command]) -> list[str]:
    """Such as "Denoise a 2" for step 2 of request a."""
    return [
        f"{type(c).__name__} {c.request_id} {getattr(c, 'step', getattr(c, 'chunk', ''))}".rstrip() for c in commands
    ]


# -- from the prompt to the last frame -------------------------------------------------------------------------------


def test_one_request_runs_every_step_and_chunk_in_order() -> None:
    scheduler = RequestScheduler(Placement.colocated(1))
    sent = play(scheduler, Placement.colocated(1), {"a": (0, LONG)})
    assert in_words([s.command for s in sent]) == [
        "Encode a",
        *("Denoise a 0", "Denoise a 1", "Denoise a 2"),
        *("Decode a 0", "Decode a 1"),
        "Release a",
    ]
    assert scheduler.job("a").phase is Phase.DONE
    scheduler.forget("a")


def test_one_worker_serves_requests_one_after_the_other() -> None:
    placement = Placement.colocated(1)
    sent = play(RequestScheduler(placement), placement, {"a": (0, LONG), "b": (0, LONG)})
    assert [s.command.request_id for s in sent] == ["a"] * 7 + ["b"] * 7


def test_a_group_command_waits_for_every_rank() -> None:
    rehearsal = Rehearsal(Placement.colocated(3))
    rehearsal.submit(SHORT, "a")
    (encode,) = rehearsal.ask()
    assert encode.ranks == (0, 1, 2)
    assert rehearsal.finish(2) == []
    assert rehearsal.finish(0) == []
    assert in_words(rehearsal.finish(1)) == ["Denoise a 0"]


@pytest.mark.parametrize(("grain", "steps"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5]), (0, [5])])
def test_commands_hold_as_many_steps_as_the_policy_says(grain: int, steps: list[int]) -> None:
    placement = Placement.colocated(1)
    work = Work(num_steps=5, num_chunks=5)
    sent = play(RequestScheduler(placement, Policy(grain=grain)), placement, {"a": (0, work)})
    assert [s.command.num_steps for s in sent if isinstance(s.command, messages.Denoise)] == steps
    assert [s.command.num_chunks for s in sent if isinstance(s.command, messages.Decode)] == steps


def takes(step_s: float, chunk_s: float) -> Callable[[messages.Command], float]:
    """Seconds of a command, whose steps and chunks take so long each. The first step also fetches, for a minute, and
    the first chunk takes next to nothing."""

    def duration_s(command: messages.Command) -> float:
        match command:
            case messages.Denoise():
                return step_s * command.num_steps + (60.0 if command.step == 0 else 0.0)
            case messages.Decode():
                return chunk_s * command.num_chunks - (0.99 * chunk_s if command.chunk == 0 else 0.0)
        return 1.0

    return duration_s


def sizes(kind: type[messages.Command], sent: list[Sent], request_id: str = "a") -> list[int]:
    return [size_of(s.command) for s in sent if isinstance(s.command, kind) and s.command.request_id == request_id]


@pytest.mark.parametrize(
    ("unit_s", "steps"),
    [
        (0.03, [1, 1, 2, 2, 2, 2]),  # two take 60 ms
        (0.024, [1, 1, 3, 3, 2]),
        (0.001, [1, 1, 8]),
        (0.051, [1] * 10),
        (7.0, [1] * 10),
    ],
)
def test_short_steps_and_chunks_share_a_command(unit_s: float, steps: list[int]) -> None:
    """From the second one on: the first step fetches, and the first chunk of causal decoders is short. A command takes
    at least 50 ms, and without its last step it would not."""
    placement, work = Placement.colocated(1), Work(num_steps=10, num_chunks=10)
    sent = play(RequestScheduler(placement), placement, {"a": (0, work)}, takes(unit_s, unit_s))
    assert sizes(messages.Denoise, sent) == steps
    assert sizes(messages.Decode, sent) == steps


def test_what_a_command_may_take_is_a_policy() -> None:
    def steps(**policy: Any) -> list[int]:
        placement, work = Placement.colocated(1), Work(num_steps=10, num_chunks=1)
        scheduler = RequestScheduler(placement, Policy(**policy))
        return sizes(messages.Denoise, play(scheduler, placement, {"a": (0, work)}, takes(0.25, 0.25)))

    assert steps(least_command_s=1.0) == [1, 1, 4, 4]
    assert steps(least_command_s=0.0) == [1] * 10
    assert steps(least_command_s=1.0, grain=3) == [3, 3, 4], "the grain is the least"
    assert steps(least_command_s=0.3, grain=3) == [3, 3, 3, 1]
    assert steps(least_command_s=1.0, grain=0) == [10]


def test_what_was_learnt_holds_for_one_phase_of_one_request() -> None:
    placement, work = Placement.colocated(1), Work(num_steps=6, num_chunks=6)
    arrivals = dict.fromkeys("ab", (0, work))
    sent = play(RequestScheduler(placement), placement, arrivals, takes(0.01, 20.0))
    assert [sizes(messages.Denoise, sent, request_id) for request_id in "ab"] == [[1, 1, 4]] * 2
    assert [sizes(messages.Decode, sent, request_id) for request_id in "ab"] == [[1] * 6] * 2


def test_the_slowest_rank_says_how_long_a_step_takes() -> None:
    rehearsal = Rehearsal(Placement.colocated(2))
    rehearsal.submit(Work(num_steps=10, num_chunks=1), "a")
    rehearsal.go_until(messages.Denoise, "a")
    for rank, duration_s in ((0, 0.02), (1, 0.001)):
        command = rehearsal.ranks.in_flight[rank]
        rehearsal.scheduler.receive(rehearsal.ranks.finish(rank, seconds(command, rank, duration_s)))
    (step,) = rehearsal.ask()
    assert size_of(step) == 3
    rehearsal.go_to_the_end()


def test_steps_that_become_slower_are_commanded_alone_again() -> None:
    """And where nothing is told of the time, as by workers without spans, every step is."""

    def duration_s(command: messages.Command) -> float:
        slow = isinstance(command, messages.Denoise) and 3 <= command.step < 9
        return (1.0 if slow else 0.02) * size_of(command)

    placement, work = Placement.colocated(1), Work(num_steps=14, num_chunks=1)
    sent = play(RequestScheduler(placement), placement, {"a": (0, work)}, duration_s)
    assert sizes(messages.Denoise, sent) == [1, 3, 3, 1, 1, 1, 3, 1]
    sent = play(RequestScheduler(placement), placement, {"a": (0, work)}, lambda _: 0.0)
    assert sizes(messages.Denoise, sent) == [1] * 14


@given(unit_s=st.floats(1e-6, 1.0), least_s=st.floats(0.0, 1.0))
def test_nobody_waits_longer_for_a_command_than_for_a_step_or_twice_its_least_time(
    unit_s: float, least_s: float
) -> None:
    placement, work = Placement.colocated(1), Work(num_steps=30, num_chunks=30)
    scheduler = RequestScheduler(placement, Policy(least_command_s=least_s))
    sent = play(scheduler, placement, {"a": (0, work)}, lambda command: unit_s * size_of(command))
    for kind in (messages.Denoise, messages.Decode):
        commands = [s for s in sent if isinstance(s.command, kind)]
        assert sum(size_of(s.command) for s in commands) == 30
        took_s = [s.end_s - s.start_s for s in commands]
        assert max(took_s) <= max(unit_s, 2 * least_s) + 1e-6
        assert all(seconds >= least_s - 1e-6 for seconds in took_s[2:-1]), "nor is it too short to be worth its way"


def test_a_step_is_shared_as_the_request_says() -> None:
    work = Work(num_steps=1, num_chunks=1, parallel=ParallelConfig(ulysses_degree=2))
    placement = Placement.colocated(2)
    sent = play(RequestScheduler(placement), placement, {"a": (0, work)})
    assert [s.command.parallel for s in sent if isinstance(s.command, messages.Denoise)] == [work.parallel]


def test_what_was_made_elsewhere_is_fetched_from_there() -> None:
    sent = [s.command for s in play(RequestScheduler(ENCODE_THERE), ENCODE_THERE, {"a": (0, SHORT)})]
    assert [c.ranks for c in sent if isinstance(c, messages.Encode)] == [(1,)]
    assert [c.conditioning_at for c in sent if isinstance(c, messages.Denoise)] == [1]
    assert [c.latents_at for c in sent if isinstance(c, messages.Decode)] == [0]


@pytest.mark.parametrize("placement", [Placement.colocated(2), Placement.serial_decode(2)], ids=["spread", "serial"])
def test_what_was_made_here_is_not_fetched(placement: Placement) -> None:
    sent = [s.command for s in play(RequestScheduler(placement), placement, {"a": (0, SHORT)})]
    assert [c.conditioning_at for c in sent if isinstance(c, messages.Denoise)] == [None]
    assert [(c.ranks, c.latents_at) for c in sent if isinstance(c, messages.Decode)] == [(placement.decoders, None)]


def test_an_id_can_be_used_again_when_it_was_forgotten() -> None:
    rehearsal = Rehearsal(Placement.colocated(1))
    rehearsal.submit(LONG, "a", "b")
    rehearsal.scheduler.cancel("a")
    rehearsal.scheduler.forget("a")
    rehearsal.submit(SHORT, "a")
    assert in_words(rehearsal.ask()) == ["Encode b"], "the new one comes after b"
    rehearsal.go_to_the_end()


def test_illegal_transition_is_a_bug_that_shows() -> None:
    scheduler = RequestScheduler(Placement.colocated(1))
    scheduler.submit("a", REQUEST, SHORT)
    with pytest.raises(AssertionError, match="not legal"):
        scheduler.job("a").move(Phase.DONE)


def test_the_table_of_transitions_is_closed() -> None:
    assert set(LEGAL_TRANSITIONS) == set(Phase)
    assert all(target in LEGAL_TRANSITIONS for targets in LEGAL_TRANSITIONS.values() for target in targets)
    ends = {phase for phase, targets in LEGAL_TRANSITIONS.items() if not targets}
    assert ends == {Phase.DONE, Phase.CANCELLED, Phase.FAILED}


@pytest.mark.parametrize(
    "wrong", [{"encoded_ahead": 0}, {"latents_waiting": 0}, {"patience": 0}, {"attempts": 0}, {"least_command_s": -0.1}]
)
def test_a_policy_with_which_nothing_would_begin_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        Policy(**wrong)


# -- cancel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answered", range(6))
def test_cancel_takes_hold_within_one_command(answered: int) -> None:
    rehearsal = Rehearsal(Placement.colocated(1))
    rehearsal.submit(LONG, "a")
    rehearsal.ask()
    for _ in range(answered):
        rehearsal.finish(0)
    rehearsal.scheduler.cancel("a")
    assert rehearsal.ask() == [], "the command in flight is still owed"
    assert in_words(rehearsal.finish(0)) == ["Release a"]
    assert rehearsal.phase("a") is Phase.CANCELLED
    rehearsal.go_to_the_end()


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("turns", range(8))
def test_cancel_does_not_disturb_the_others(name: str, turns: int) -> None:
    rehearsal = Rehearsal(PLACEMENTS[name])
    rehearsal.submit(LONG, "a", "b", "c")
    rehearsal.ask()
    for _ in range(turns):
        rehearsal.finish_all()
    rehearsal.scheduler.cancel("b")
    rehearsal.go_to_the_end()
    assert [rehearsal.phase(request_id) for request_id in "abc"] == [Phase.DONE, rehearsal.phase("b"), Phase.DONE]


def test_a_queued_request_ends_at_once_and_nobody_has_to_forget_it() -> None:
    rehearsal = Rehearsal(Placement.colocated(1))
    rehearsal.submit(SHORT, "a", "b")
    rehearsal.ask()
    rehearsal.scheduler.cancel("b")
    assert rehearsal.phase("b") is Phase.CANCELLED
    assert not rehearsal.scheduler.is_held("b")
    rehearsal.scheduler.cancel("b")  # no effect, like any cancel of what is over
    rehearsal.scheduler.cancel("never heard of")
    rehearsal.go_to_the_end()


# -- forgetting ------------------------------------------------------------------------------------------------------


def test_only_ranks_that_keep_something_are_told_to_forget() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE)
    rehearsal.submit(LONG, "a")
    rehearsal.go_until(messages.Denoise, "a")
    rehearsal.scheduler.cancel("a")
    releases = rehearsal.finish(0, 1)
    assert [release.ranks for release in releases] == [(0,), (1,)]


def test_helpers_keep_nothing_and_have_nothing_to_forget() -> None:
    rehearsal = Rehearsal(Placement.disaggregated(denoise=1, decode=1, encoder=Role.DENOISER))
    rehearsal.submit(Work(num_steps=30, num_chunks=1, heads=4), "a")
    for _ in range(4):
        rehearsal.ask()
        rehearsal.finish_all()
    assert rehearsal.ranks.in_flight.keys() == {0, 1}, "the decoder helps by now"
    rehearsal.scheduler.cancel("a")
    assert [release.ranks for release in rehearsal.finish(0, 1)] == [(0,)]


def test_nothing_is_forgotten_before_the_end() -> None:
    """Conditioning and latents lie on a shelf until they are fetched, which only the rank that fetches knows."""
    rehearsal = Rehearsal(ENCODE_THERE)
    rehearsal.submit(LONG, "a")
    rehearsal.ask()
    while rehearsal.phase("a") is not Phase.DONE:
        assert not any(isinstance(command, messages.Release) for command in rehearsal.ranks.in_flight.values())
        rehearsal.finish_all()
    assert sorted(command.ranks for command in rehearsal.ranks.in_flight.values()) == [(0,), (1,)]


def test_a_rank_that_works_on_another_request_is_told_when_it_is_free() -> None:
    rehearsal = Rehearsal(ENCODE_THERE)
    rehearsal.submit(LONG, "a", "b")
    rehearsal.go_until(messages.Decode, "a")
    assert rehearsal.phase("b") is Phase.DENOISING
    rehearsal.scheduler.cancel("b")
    assert in_words(rehearsal.finish(0)) == ["Release b"], "rank 1 keeps the conditioning, but decodes"
    assert rehearsal.scheduler.is_held("b")
    assert in_words(rehearsal.finish(1)) == ["Release b"], "before the next chunk"
    assert in_words(rehearsal.finish(1)) == ["Decode a 1"]
    rehearsal.go_to_the_end()


# -- failures --------------------------------------------------------------------------------------------------------


def test_failure_ends_only_its_own_request() -> None:
    rehearsal = Rehearsal(Placement.colocated(1))
    rehearsal.submit(LONG, "a", "b")
    rehearsal.ask()
    assert in_words(rehearsal.fail(0)) == ["Release a"]
    rehearsal.go_to_the_end()
    assert [rehearsal.phase(request_id) for request_id in "ab"] == [Phase.FAILED, Phase.DONE]
    failure = rehearsal.scheduler.job("a").failure
    assert failure is not None
    assert str(failure.error) == "broken"


def test_a_request_has_failed_when_all_its_ranks_have_answered() -> None:
    rehearsal = Rehearsal(Placement.colocated(2))
    rehearsal.submit(LONG, "a")
    rehearsal.go_until(messages.Denoise, "a")
    assert rehearsal.fail(1) == [], "rank 0 may still be at it"
    assert rehearsal.phase("a") is Phase.DENOISING
    assert in_words(rehearsal.finish(0)) == ["Release a", "Release a"]
    assert rehearsal.phase("a") is Phase.FAILED


def epochs(commands: list[messages.Command]) -> list[int]:
    return [command.epoch for command in commands if isinstance(command, messages.Exchanging)]


@pytest.mark.parametrize("kind", [messages.Denoise, messages.Decode])
@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
def test_after_a_failed_exchange_a_new_epoch_begins(kind: type[messages.Command], failing: tuple[int, ...]) -> None:
    rehearsal = Rehearsal(Placement.colocated(2))
    rehearsal.submit(LONG, "a", "b")
    rehearsal.go_until(kind, "a")
    assert epochs(list(rehearsal.ranks.in_flight.values())) == [0, 0]
    rehearsal.fail(*failing)
    rehearsal.finish(*rehearsal.ranks.in_flight)
    rehearsal.go_until(messages.Denoise, "b")
    assert epochs(list(rehearsal.ranks.in_flight.values())) == [1, 1], "one failure, however many ranks report it"
    rehearsal.fail(0)
    rehearsal.finish_all()
    rehearsal.submit(LONG, "c")
    rehearsal.go_until(messages.Decode, "c")
    assert epochs(list(rehearsal.ranks.in_flight.values())) == [2, 2]


def test_where_no_messages_can_be_left_over_the_epoch_stays() -> None:
    rehearsal = Rehearsal(Placement.colocated(2))
    rehearsal.submit(LONG, "a", "b")
    rehearsal.ask()
    rehearsal.fail(0, 1)  # encoding: nobody waits for anybody
    rehearsal.go_until(messages.Denoise, "b")
    assert epochs(list(rehearsal.ranks.in_flight.values())) == [0, 0]
    rehearsal = Rehearsal(ENCODE_THERE)
    rehearsal.submit(LONG, "a", "b")
    rehearsal.go_until(messages.Denoise, "a")
    rehearsal.fail(0)  # alone
    rehearsal.go_until(messages.Denoise, "b")
    assert epochs(list(rehearsal.ranks.in_flight.values())) == [0]


def test_a_failure_in_one_group_does_not_stop_the_other() -> None:
    placement = Placement.disaggregated(denoise=2, decode=2, encoder=Role.DENOISER)
    rehearsal = Rehearsal(placement)
    rehearsal.submit(LONG, "a")
    rehearsal.go_until(messages.Decode, "a")  # both decoders
    rehearsal.submit(LONG, "b")
    rehearsal.ask()
    rehearsal.finish(0, 1)
    assert {c.request_id for c in rehearsal.ranks.in_flight.values()} == {"a", "b"}
    rehearsal.fail(2)
    assert in_words(rehearsal.finish(0, 1)) == ["Release a", "Denoise b 1"] or rehearsal.phase("b") is Phase.DENOISING
    rehearsal.go_to_the_end()
    assert [rehearsal.phase(request_id) for request_id in "ab"] == [Phase.FAILED, Phase.DONE]


# -- dead workers ----------------------------------------------------------------------------------------------------


def test_whoever_a_dead_rank_worked_for_fails_and_the_others_begin_again() -> None:
    rehearsal = Rehearsal(ENCODE_THERE)
    rehearsal.submit(LONG, *"abcd")
    rehearsal.scheduler.cancel("d")
    rehearsal.go_until(messages.Decode, "a")
    working = {rank: command.request_id for rank, command in rehearsal.ranks.in_flight.items()}
    assert working == {0: "b", 1: "a"}
    error = rehearsal.die(0)
    assert list(map(rehearsal.phase, "abcd")) == [Phase.QUEUED, Phase.FAILED, Phase.QUEUED, Phase.CANCELLED]
    failure = rehearsal.scheduler.job("b").failure
    assert failure is not None
    assert failure.error is error
    assert not any(map(rehearsal.scheduler.is_held, "abcd"))
    rehearsal.go_to_the_end()
    assert list(map(rehearsal.phase, "ac")) == [Phase.DONE, Phase.DONE]
    assert [rehearsal.scheduler.job(request_id).attempts for request_id in "abc"] == [2, 1, 1]


def test_nobody_is_to_blame_for_a_rank_that_dies_while_it_has_nothing_to_do() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE)
    rehearsal.submit(LONG, "a")
    rehearsal.go_until(messages.Denoise, "a")
    rehearsal.die(2)
    assert rehearsal.phase("a") is Phase.QUEUED
    rehearsal.go_to_the_end()
    assert rehearsal.phase("a") is Phase.DONE


def test_a_request_is_not_begun_more_often_than_the_policy_allows() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE, Policy(attempts=3))
    rehearsal.submit(LONG, "a")
    for _ in range(2):
        rehearsal.go_until(messages.Denoise, "a")
        rehearsal.die(2)
        assert rehearsal.phase("a") is Phase.QUEUED
    rehearsal.go_until(messages.Denoise, "a")
    error = rehearsal.die(2)
    assert rehearsal.phase("a") is Phase.FAILED
    failure = rehearsal.scheduler.job("a").failure
    assert failure is not None
    assert failure.error is error


def test_who_begins_again_keeps_its_place() -> None:
    rehearsal = Rehearsal(TWO_AND_ONE)
    rehearsal.submit(LONG, "a", "b")
    rehearsal.go_until(messages.Denoise, "a")
    rehearsal.die(2)
    assert in_words(rehearsal.ask()) == ["Encode a"]
    rehearsal.go_to_the_end()


def test_whoever_was_cancelled_or_had_failed_does_not_begin_again() -> None:
    rehearsal = Rehearsal(Placement.colocated(2))
    rehearsal.submit(LONG, "a")
    rehearsal.go_until(messages.Denoise, "a")
    rehearsal.scheduler.cancel("a")
    rehearsal.die(0)
    assert rehearsal.phase("a") is Phase.CANCELLED
    rehearsal.submit(LONG, "b")
    rehearsal.go_until(messages.Denoise, "b")
    rehearsal.fail(0)
    rehearsal.die(1)
    failure = rehearsal.scheduler.job("b").failure
    assert rehearsal.phase("b") is Phase.FAILED
    assert failure is not None
    assert str(failure.error) == "broken", "what went wrong first"


def test_a_rank_that_dies_while_it_forgets_harms_nobody() -> None:
    rehearsal = Rehearsal(Placement.colocated(1))
    rehearsal.submit(SHORT, "a", "b")
    rehearsal.go_until(messages.Release, "a")
    rehearsal.die(0)
    assert [rehearsal.phase(request_id) for request_id in "ab"] == [Phase.DONE, Phase.QUEUED]
    rehearsal.go_to_the_end()


def test_without_workers_for_good_nothing_is_waited_for() -> None:
    rehearsal = Rehearsal(Placement.colocated(2))
    rehearsal.submit(LONG, "failing", "queued")
    rehearsal.ask()
    rehearsal.fail(0)
    assert not rehearsal.scheduler.job("failing").is_over, "rank 1 owes its answer"
    rehearsal.scheduler.abandon()
    assert [rehearsal.phase(name) for name in ("failing", "queued")] == [Phase.FAILED, Phase.CANCELLED]
    assert rehearsal.scheduler.is_idle
    assert rehearsal.ask() == []
