"""The request scheduler: legal lives, nothing lost, in milliseconds and without torch."""

import random
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipedit.core import messages
from pipedit.core.errors import WorkerDiedError
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.plan.scheduler import LEGAL_TRANSITIONS, Phase, RequestScheduler, Work

REQUEST = VideoRequest(prompt="x")


def answer(command: messages.Command, rank: int) -> messages.Event:
    key: dict[str, Any] = {"request_id": command.request_id, "rank": rank}
    match command:
        case messages.Encode():
            return messages.Encoded(**key)
        case messages.Denoise():
            return messages.StepDone(**key, step=command.step)
        case messages.Decode():
            return messages.ChunkDecoded(**key, chunk=command.chunk)
    return messages.Released(**key)


def drive(scheduler: RequestScheduler, limit: int = 10_000) -> list[messages.Command]:
    """Answers every command in order of sending until nothing is left to do."""
    sent: list[messages.Command] = []
    in_flight: deque[tuple[messages.Command, int]] = deque()
    for _ in range(limit):
        for command in scheduler.next_commands():
            sent.append(command)
            in_flight.extend((command, rank) for rank in command.ranks)
        if not in_flight:
            assert scheduler.is_idle
            return sent
        command, rank = in_flight.popleft()
        scheduler.receive(answer(command, rank))
    raise AssertionError("the scheduler does not come to an end")


def test_one_request_runs_every_step_and_chunk_in_order() -> None:
    scheduler = RequestScheduler(Placement.colocated(1))
    scheduler.submit("a", REQUEST, Work(num_steps=3, num_chunks=2))
    sent = drive(scheduler)
    assert [type(c).__name__ for c in sent] == [
        "Encode",
        "Denoise",
        "Denoise",
        "Denoise",
        "Decode",
        "Decode",
        "Release",
    ]
    assert [c.step for c in sent if isinstance(c, messages.Denoise)] == [0, 1, 2]
    assert [c.chunk for c in sent if isinstance(c, messages.Decode)] == [0, 1]
    assert scheduler.job("a").phase is Phase.DONE
    scheduler.forget("a")


def test_one_worker_serves_requests_one_after_the_other() -> None:
    scheduler = RequestScheduler(Placement.colocated(1))
    for name in "ab":
        scheduler.submit(name, REQUEST, Work(num_steps=2, num_chunks=2))
    order = [c.request_id for c in drive(scheduler)]
    assert order == ["a"] * 6 + ["b"] * 6


def test_disjoint_groups_decode_one_request_while_the_next_is_denoised() -> None:
    scheduler = RequestScheduler(Placement(encoders=(1,), denoisers=(0,), decoders=(1,)))
    for name in "ab":
        scheduler.submit(name, REQUEST, Work(num_steps=3, num_chunks=3))
    sent = drive(scheduler)
    first_decode = next(i for i, c in enumerate(sent) if isinstance(c, messages.Decode) and c.request_id == "a")
    last_decode = max(i for i, c in enumerate(sent) if isinstance(c, messages.Decode) and c.request_id == "a")
    between = [c for c in sent[first_decode:last_decode] if isinstance(c, messages.Denoise)]
    assert {c.request_id for c in between} == {"b"}


@pytest.mark.parametrize("answered", range(7))
def test_cancel_takes_hold_within_one_command(answered: int) -> None:
    scheduler = RequestScheduler(Placement.colocated(1))
    scheduler.submit("a", REQUEST, Work(num_steps=3, num_chunks=3))
    commands = scheduler.next_commands()
    for _ in range(answered):
        scheduler.receive(answer(commands[0], 0))
        commands = scheduler.next_commands()
    scheduler.cancel("a")
    assert not scheduler.next_commands()  # the command in flight is still owed
    if commands:
        scheduler.receive(answer(commands[0], 0))
    (release,) = scheduler.next_commands()
    assert isinstance(release, messages.Release)
    assert scheduler.job("a").phase is Phase.CANCELLED
    scheduler.receive(answer(release, 0))
    assert scheduler.is_idle


def test_failure_ends_only_its_own_request() -> None:
    scheduler = RequestScheduler(Placement.colocated(1))
    scheduler.submit("a", REQUEST, Work(num_steps=3, num_chunks=1))
    scheduler.submit("b", REQUEST, Work(num_steps=1, num_chunks=1))
    (command,) = scheduler.next_commands()
    error = RuntimeError("broken")
    scheduler.receive(messages.CommandFailed(request_id="a", rank=0, doing="encoding", error=error))
    drive(scheduler)
    assert scheduler.job("a").phase is Phase.FAILED
    failure = scheduler.job("a").failure
    assert failure is not None
    assert failure.error is error
    assert scheduler.job("b").phase is Phase.DONE
    assert command.request_id == "a"


def test_a_group_command_waits_for_every_rank() -> None:
    scheduler = RequestScheduler(Placement.colocated(3))
    scheduler.submit("a", REQUEST, Work(num_steps=1, num_chunks=1))
    (encode,) = scheduler.next_commands()
    assert encode.ranks == (0, 1, 2)
    for rank in (2, 0):
        scheduler.receive(answer(encode, rank))
        assert scheduler.next_commands() == []
    scheduler.receive(answer(encode, 1))
    (step,) = scheduler.next_commands()
    assert isinstance(step, messages.Denoise)


def test_illegal_transition_is_a_bug_that_shows() -> None:
    scheduler = RequestScheduler(Placement.colocated(1))
    scheduler.submit("a", REQUEST, Work(num_steps=1, num_chunks=1))
    with pytest.raises(AssertionError, match="not legal"):
        scheduler.job("a").move(Phase.DONE)


def test_the_table_of_transitions_is_closed() -> None:
    assert set(LEGAL_TRANSITIONS) == set(Phase)
    assert all(target in LEGAL_TRANSITIONS for targets in LEGAL_TRANSITIONS.values() for target in targets)
    ends = {phase for phase, targets in LEGAL_TRANSITIONS.items() if not targets}
    assert ends == {Phase.DONE, Phase.CANCELLED, Phase.FAILED}


PLACEMENTS = (
    Placement.colocated(1),
    Placement.colocated(2),
    Placement(encoders=(0, 1), denoisers=(0, 1), decoders=(2,)),
    Placement(encoders=(2,), denoisers=(0, 1), decoders=(2,)),
    Placement(encoders=(3,), denoisers=(0,), decoders=(1, 2)),
)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), placement=st.sampled_from(PLACEMENTS), count=st.integers(1, 6))
def test_no_order_of_events_loses_a_request_or_a_rank(seed: int, placement: Placement, count: int) -> None:
    """Random answers, cancels and failures: every request ends, each rank has one command at a time, and all ranks of
    a group are told the same commands in the same order."""
    rng = random.Random(seed)
    scheduler = RequestScheduler(placement)
    waiting = [f"r{i}" for i in range(count)]
    in_flight: dict[int, messages.Command] = {}
    told: dict[int, list[messages.Command]] = {rank: [] for rank in placement.world}
    for _ in range(2_000):
        if waiting and rng.random() < 0.3:
            scheduler.submit(waiting.pop(), REQUEST, Work(num_steps=rng.randint(1, 3), num_chunks=rng.randint(1, 3)))
        for command in scheduler.next_commands():
            for rank in command.ranks:
                assert rank not in in_flight
                in_flight[rank] = command
                told[rank].append(command)
        if rng.random() < 0.05:
            scheduler.cancel(f"r{rng.randrange(count)}")
        if in_flight:
            rank = rng.choice(sorted(in_flight))
            command = in_flight.pop(rank)
            failed = rng.random() < 0.02 and not isinstance(command, messages.Release)
            event = (
                messages.CommandFailed(request_id=command.request_id, rank=rank, doing="x", error=RuntimeError())
                if failed
                else answer(command, rank)
            )
            scheduler.receive(event)
        elif not waiting and not scheduler.next_commands():
            break
    else:
        raise AssertionError("the scheduler does not come to an end")
    assert scheduler.is_idle
    assert all(scheduler.job(f"r{i}").is_over for i in range(count))
    for group in (placement.encoders, placement.denoisers, placement.decoders):
        views = [[c for c in told[rank] if c.ranks == group] for rank in group]
        assert all(view == views[0] for view in views)
    for rank in placement.world:
        released = [c.request_id for c in told[rank] if isinstance(c, messages.Release)]
        assert sorted(released) == sorted(f"r{i}" for i in range(count))


def test_lost_workers_fail_what_had_begun_and_leave_the_rest_for_fresh_ones() -> None:
    scheduler = RequestScheduler(Placement(encoders=(0,), denoisers=(1,), decoders=(0,)))
    for name in ("begun", "cancelled", "queued"):
        scheduler.submit(name, REQUEST, Work(num_steps=3, num_chunks=1))
    (encode,) = scheduler.next_commands()
    scheduler.receive(answer(encode, 0))
    assert {type(c) for c in scheduler.next_commands()} == {messages.Denoise, messages.Encode}
    scheduler.cancel("cancelled")
    error = WorkerDiedError("exit code 1", rank=1, doing="denoising")
    scheduler.lose_workers(error)
    phases = {name: scheduler.job(name).phase for name in ("begun", "cancelled", "queued")}
    assert phases == {"begun": Phase.FAILED, "cancelled": Phase.CANCELLED, "queued": Phase.QUEUED}
    failure = scheduler.job("begun").failure
    assert failure is not None
    assert failure.error is error
    assert not any(map(scheduler.is_held, phases))
    assert {c.request_id for c in drive(scheduler)} == {"queued"}
    assert scheduler.job("queued").phase is Phase.DONE


def test_without_workers_for_good_nothing_is_waited_for() -> None:
    scheduler = RequestScheduler(Placement.colocated(2))
    for name in ("failing", "queued"):
        scheduler.submit(name, REQUEST, Work(num_steps=3, num_chunks=1))
    (encode,) = scheduler.next_commands()
    scheduler.receive(messages.CommandFailed(request_id="failing", rank=0, doing="encoding", error=RuntimeError()))
    assert not scheduler.job("failing").is_over, f"rank 1 owes its answer to {encode}"
    scheduler.abandon()
    assert [scheduler.job(name).phase for name in ("failing", "queued")] == [Phase.FAILED, Phase.CANCELLED]
    assert scheduler.is_idle
    assert scheduler.next_commands() == []


def test_after_a_failure_every_rank_is_told_so() -> None:
    scheduler = RequestScheduler(Placement.colocated(2))
    scheduler.submit("a", REQUEST, Work(num_steps=2, num_chunks=1))
    (encode,) = scheduler.next_commands()
    scheduler.receive(messages.CommandFailed(request_id="a", rank=0, doing="encoding", error=RuntimeError()))
    scheduler.receive(answer(encode, 1))
    releases = scheduler.next_commands()
    assert all(isinstance(release, messages.Release) and release.after_failure for release in releases)
    assert [release.ranks for release in releases] == [(0,), (1,)]
    scheduler = RequestScheduler(Placement.colocated(1))
    scheduler.submit("a", REQUEST, Work(num_steps=1, num_chunks=1, parallel=ParallelConfig(ulysses_degree=2)))
    sent = drive(scheduler)
    assert [c.parallel.ulysses_degree for c in sent if isinstance(c, messages.Denoise)] == [2]
    assert not any(c.after_failure for c in sent if isinstance(c, messages.Release))
