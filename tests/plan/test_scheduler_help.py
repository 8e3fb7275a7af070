"""Idle decoders help to denoise (Aco): which ones, with which heads, and only where it pays."""

import dataclasses

import pytest

from pipedit.core import messages
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Placement, Role
from pipedit.plan.aco_gate import SAMPLES, WARM_UP, AcoMode
from pipedit.plan.jobs import Work
from pipedit.plan.scheduler import Policy, RequestScheduler
from tests.plan.scheduled_ranks import TEXT_TOKENS, Rehearsal, Sent, helpers_of, play

ALWAYS = Policy(aco=AcoMode.ON)
TWO_AND_TWO = Placement.disaggregated(denoise=2, decode=2, encoder=Role.DENOISER)
SHARED = ParallelConfig(ulysses_degree=2)
LONG = Work(num_steps=60, num_chunks=2, parallel=SHARED, heads=24, shape="s")
TRIAL = 3 * (WARM_UP + SAMPLES) + 1  # steps until the gate has decided, the first of the request included


def steps_of(sent: list[Sent], request_id: str) -> list[messages.Denoise]:
    commands = [s.command for s in sent if s.command.request_id == request_id]
    return [command for command in commands if isinstance(command, messages.Denoise)]


def run(
    *works: Work,
    policy: Policy | None = None,
    placement: Placement = TWO_AND_TWO,
    gain: float = 1.0,
    chunk_s: float = 1,
) -> list[Sent]:
    """`gain`: how long a step with even shares takes, without help it takes 1 s, and with other shares as long."""

    def duration_s(command: messages.Command) -> float:
        if isinstance(command, messages.Decode):
            return chunk_s
        aco = command.aco if isinstance(command, messages.Denoise) else None
        return gain if aco is not None and max(aco.heads) - min(aco.heads) <= 1 else 1.0

    scheduler = RequestScheduler(placement, policy)
    return play(scheduler, placement, {f"r{i}": (0.0, work) for i, work in enumerate(works)}, duration_s)


# -- who helps -------------------------------------------------------------------------------------------------------


def test_a_step_names_helpers_their_heads_and_the_text() -> None:
    step = steps_of(run(LONG, policy=ALWAYS), "r0")[0]
    assert step.ranks == (0, 1, 2, 3)
    assert step.aco == messages.Aco(helpers=((2, 3),), heads=(6, 6, 6, 6), text_tokens=TEXT_TOKENS)


def test_each_guidance_group_gets_as_many_helpers() -> None:
    work = Work(num_steps=1, num_chunks=1, parallel=ParallelConfig(cfg_degree=2), heads=7)
    (step,) = steps_of(run(work, policy=ALWAYS), "r0")
    assert step.aco is not None
    assert (step.aco.helpers, step.aco.heads) == (((2,), (3,)), (4, 3))
    three = Placement.disaggregated(denoise=2, decode=3, encoder=Role.DENOISER)
    (step,) = steps_of(run(work, policy=ALWAYS, placement=three), "r0")
    assert step.ranks == (0, 1, 2, 3), "one decoder is left over"


@pytest.mark.parametrize(
    "work",
    [
        Work(num_steps=1, num_chunks=1, parallel=SHARED, heads=0),
        Work(num_steps=1, num_chunks=1, parallel=ParallelConfig(ring_degree=2), heads=24),
        Work(num_steps=1, num_chunks=1, parallel=SHARED, heads=3),
    ],
    ids=["heads may not be dealt out", "a ring", "too few heads"],
)
def test_where_nobody_can_help_nobody_does(work: Work) -> None:
    (step,) = steps_of(run(work, policy=ALWAYS), "r0")
    assert (step.aco, step.ranks) == (None, (0, 1))


def test_nobody_helps_where_all_denoise() -> None:
    work = Work(num_steps=2, num_chunks=1, parallel=SHARED, heads=24)
    assert not any(helpers_of(s.command) for s in run(work, policy=ALWAYS, placement=Placement.colocated(2)))


def test_decoders_with_a_video_do_not_help() -> None:
    """And those that become free do so from the next step on."""
    sent = run(LONG, LONG, policy=ALWAYS, chunk_s=3.0)
    decoding = [s for s in sent if isinstance(s.command, messages.Decode) and s.command.request_id == "r0"]
    (rank,) = decoding[0].command.ranks
    start_s, end_s = decoding[0].start_s, decoding[-1].end_s
    steps = [s for s in sent if isinstance(s.command, messages.Denoise) and s.command.request_id == "r1"]
    during = [helpers_of(s.command) for s in steps if start_s <= s.start_s < end_s]
    after = [helpers_of(s.command) for s in steps if s.start_s >= end_s]
    assert set(during) == {tuple({2, 3} - {rank})}
    assert set(after) == {(2, 3)}


def test_a_helper_finishes_the_step_and_then_decodes() -> None:
    rehearsal = Rehearsal(Placement.disaggregated(denoise=1, decode=1, encoder=Role.DENOISER), ALWAYS)
    rehearsal.submit(Work(num_steps=2, num_chunks=1, heads=4), "a", "b")
    rehearsal.go_until(messages.Denoise, "a")
    (last,) = rehearsal.finish(0, 1)
    assert last.ranks == (0, 1)
    assert [(type(c), c.request_id, c.ranks) for c in rehearsal.finish(0, 1)] == [
        (messages.Decode, "a", (1,)),
        (messages.Encode, "b", (0,)),
    ]
    rehearsal.go_to_the_end()


@pytest.mark.parametrize("first", [(0,), (1,), (2,)])
def test_nobody_comes_in_between_because_some_ranks_answer_sooner(first: tuple[int, ...]) -> None:
    """Denoisers and helpers become free together."""
    placement = Placement.disaggregated(denoise=1, decode=2, encoder=Role.DECODER)
    rehearsal = Rehearsal(placement, ALWAYS)
    rehearsal.submit(Work(num_steps=2, num_chunks=1, heads=4), "a", "b")
    rehearsal.go_until(messages.Denoise, "a")
    while rehearsal.ranks.in_flight.keys() != {0, 1, 2}:
        rehearsal.finish_all()
    (last,) = {id(command): command for command in rehearsal.ranks.in_flight.values()}.values()
    assert (last.request_id, rehearsal.scheduler.job("b").done) == ("a", 0)
    assert rehearsal.finish(*first) == []
    rehearsal.go_to_the_end()


def test_a_decoder_that_shares_an_interrupted_video_does_not_help() -> None:
    placement = Placement.disaggregated(denoise=1, decode=2, encoder=Role.DENOISER)
    rehearsal = Rehearsal(placement, ALWAYS)
    work = Work(num_steps=1, num_chunks=5, heads=4)
    rehearsal.submit(work, "a")
    rehearsal.go_until(messages.Decode, "a")  # by both
    rehearsal.submit(dataclasses.replace(work, priority=1), "urgent")
    rehearsal.submit(work, "b")
    rehearsal.ask()
    rehearsal.finish(0)  # encoded
    rehearsal.finish(0, 1, 2)
    assert {rank: c.request_id for rank, c in rehearsal.ranks.in_flight.items()} == {0: "b", 1: "urgent"}
    (step,) = rehearsal.finish(0)
    assert (step.request_id, step.ranks) == ("b", (0,)), "rank 2 waits, to go on with a"
    rehearsal.go_to_the_end()


def test_a_prompt_goes_before_help() -> None:
    placement = Placement.disaggregated(denoise=1, decode=1, encoder=Role.DECODER)
    rehearsal = Rehearsal(placement, ALWAYS)
    work = Work(num_steps=3, num_chunks=1, heads=4)
    rehearsal.submit(work, "a")
    rehearsal.ask()
    rehearsal.scheduler.receive(rehearsal.ranks.finish(1))
    rehearsal.submit(work, "b")
    assert {(type(c), c.ranks) for c in rehearsal.ask()} == {(messages.Encode, (1,)), (messages.Denoise, (0,))}
    rehearsal.go_to_the_end()


# -- whether it pays -------------------------------------------------------------------------------------------------


def choices(steps: list[messages.Denoise]) -> list[tuple[int, ...]]:
    return [() if step.aco is None else step.aco.heads for step in steps]


def test_help_that_costs_time_is_left_off() -> None:
    """The paper's small shapes lose up to 82 s; here it is a handful of steps, once."""
    chosen = choices(steps_of(run(LONG, LONG, gain=1.5), "r0"))
    assert any(chosen[:TRIAL])
    assert set(chosen[TRIAL:]) == {()}


def test_help_that_pays_is_kept_and_remembered() -> None:
    sent = run(LONG, LONG, gain=0.7)
    assert set(choices(steps_of(sent, "r0"))[TRIAL:]) == {(6, 6, 6, 6)}
    second = [step for step in steps_of(sent, "r1") if len(helpers_of(step)) == 2]
    assert set(choices(second)) == {(6, 6, 6, 6)}, "equal work is not tried again"


def test_work_of_another_shape_is_tried_by_itself() -> None:
    other = Work(num_steps=60, num_chunks=2, parallel=SHARED, heads=12, shape="s")  # other heads, for example
    sent = run(LONG, other, gain=0.7, chunk_s=0.0)
    assert () in choices(steps_of(sent, "r1"))[:TRIAL]
    assert set(choices(steps_of(sent, "r1"))[TRIAL:]) == {(3, 3, 3, 3)}


def test_each_number_of_helpers_is_tried_by_itself() -> None:
    """While one decoder is busy, what two helpers brought says nothing."""
    sent = run(LONG, LONG, gain=0.7, chunk_s=7.0)
    steps = steps_of(sent, "r1")
    alone = [step for step in steps if step.aco is None or len(helpers_of(step)) == 1]
    assert () in choices(alone)
    assert (8, 8, 8) in choices(alone)


def test_the_first_step_of_a_request_says_nothing() -> None:
    """It fetches and prepares. Here that makes help look good, and it is not."""

    def duration_s(command: messages.Command) -> float:
        if not isinstance(command, messages.Denoise):
            return 0.0
        has_help = command.aco is not None
        return (1.2 if has_help else 1.0) if command.step else (0.1 if has_help else 1000.0)

    work = dataclasses.replace(LONG, num_steps=2)
    arrivals = {f"r{i}": (0.0, work) for i in range(TRIAL + 6)}
    sent = play(RequestScheduler(TWO_AND_TWO), TWO_AND_TWO, arrivals, duration_s)
    assert set(choices(steps_of(sent, f"r{TRIAL + 4}"))) == {()}


@pytest.mark.parametrize(("mode", "expected"), [(AcoMode.ON, {(6, 6, 6, 6)}), (AcoMode.OFF, {()})])
@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_on_and_off_mean_it(mode: AcoMode, expected: set[tuple[int, ...]], gain: float) -> None:
    assert set(choices(steps_of(run(LONG, policy=Policy(aco=mode), gain=gain), "r0"))) == expected


@pytest.mark.parametrize(("gain", "expected"), [(0.7, (6, 6, 6, 6)), (1.5, ())])
def test_it_is_decided_where_all_steps_are_one_command_too(gain: float, expected: tuple[int, ...]) -> None:
    """As in long simulations: then whole requests are tried."""
    sent = run(*[LONG] * (TRIAL + 6), policy=Policy(grain=0), gain=gain, chunk_s=0.0)
    assert {choices(steps_of(sent, f"r{number}"))[0] for number in range(TRIAL, TRIAL + 6)} == {expected}


@pytest.mark.parametrize("gain", [0.9, 1.1])
def test_it_is_decided_by_the_step_where_commands_hold_several(gain: float) -> None:
    """Commands of different lengths are tried; what counts is what each step takes."""

    def duration_s(command: messages.Command) -> float:
        if not isinstance(command, messages.Denoise):
            return 0.0
        has_help = command.aco is not None
        return 0.02 * (gain if has_help else 1.0) * command.num_steps

    work = dataclasses.replace(LONG, num_steps=100)
    steps = steps_of(play(RequestScheduler(TWO_AND_TWO), TWO_AND_TWO, {"r0": (0.0, work)}, duration_s), "r0")
    assert sum(step.num_steps for step in steps) == 100
    assert {step.num_steps for step in steps[1:-1]} == {3}
    tried = steps[:TRIAL]
    assert {step.aco is None for step in tried if step.num_steps == 3} == {True, False}, "with help and without"
    assert {step.aco is not None for step in steps[TRIAL:]} == {gain < 1}


def test_a_step_that_failed_says_nothing() -> None:
    """However soon it did."""
    rehearsal = Rehearsal(TWO_AND_TWO)
    for number in range(TRIAL):
        rehearsal.submit(LONG, f"r{number}")
        rehearsal.go_until(messages.Denoise, f"r{number}")
        (step,) = rehearsal.finish_all()
        assert step.ranks == (0, 1), "no help, as long as nothing is known"
        rehearsal.fail(0, 1)
        rehearsal.go_to_the_end()
