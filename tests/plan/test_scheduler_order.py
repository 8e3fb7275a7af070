"""Who goes when: turns, priorities, fairness, what runs side by side, and how long a decision takes."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from pipedit.core import messages
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Placement, Role
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.jobs import Phase, Work
from pipedit.plan.scheduler import Policy, RequestScheduler
from tests.plan.scheduled_ranks import PLACEMENTS, REQUEST, Rehearsal, Sent, play

ONE_AND_ONE = Placement.disaggregated(denoise=1, decode=1, encoder=Role.DENOISER)
ENCODE_THERE = Placement.disaggregated(denoise=1, decode=1, encoder=Role.DECODER)
ONE_AND_TWO = Placement.disaggregated(denoise=1, decode=2, encoder=Role.DENOISER)
ENCODE_AT_TWO = Placement.disaggregated(denoise=1, decode=2, encoder=Role.DECODER)
SHORT = Work(num_steps=1, num_chunks=1)
LONG = Work(num_steps=3, num_chunks=3)


def work(steps: int, chunks: int, priority: int = 0) -> Work:
    return Work(num_steps=steps, num_chunks=chunks, priority=priority)


def takes(encode_s: float, step_s: float, chunk_s: float) -> Callable[[messages.Command], float]:
    def duration_s(command: messages.Command) -> float:
        match command:
            case messages.Encode():
                return encode_s
            case messages.Denoise():
                return step_s * command.num_steps
            case messages.Decode():
                return chunk_s * command.num_chunks
        raise AssertionError(command)

    return duration_s


def ends(sent: list[Sent]) -> dict[str, float]:
    """When each request was done, in that order."""
    last = {s.command.request_id: s.end_s for s in sent if isinstance(s.command, messages.Decode)}
    return dict(sorted(last.items(), key=lambda item: item[1]))


def begins(sent: list[Sent], kind: type[messages.Command]) -> list[str]:
    """Requests in the order of their first command of this kind."""
    return list(dict.fromkeys(s.command.request_id for s in sent if isinstance(s.command, kind)))


# -- equals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False], ids=["together", "one after the other"])
@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("duration", [takes(1, 1, 1), takes(1, 5, 1), takes(5, 1, 1), takes(1, 1, 7)])
def test_equals_are_served_in_the_order_of_their_coming(
    name: str, duration: Callable[[messages.Command], float], together: bool
) -> None:
    """Whether the ranks of a command answer together or not, and with help."""
    placement, names = PLACEMENTS[name], [f"r{i}" for i in range(8)]
    scheduler = RequestScheduler(placement, Policy(aco=AcoMode.ON))
    parallel = ParallelConfig(ulysses_degree=len(placement.denoisers))
    work = Work(num_steps=3, num_chunks=3, parallel=parallel, heads=24)
    arrivals = {name: (0.3 * i, work) for i, name in enumerate(names)}
    sent = play(scheduler, placement, arrivals, duration, together=together)
    for kind in (messages.Encode, messages.Denoise, messages.Decode):
        assert begins(sent, kind) == names
    assert list(ends(sent)) == names
    steps = [s.command.request_id for s in sent if isinstance(s.command, messages.Denoise)]
    assert steps == sorted(steps), "no other request comes in between"
    overtaken = {name: scheduler.job(name).overtaken for name in names}
    assert not any(overtaken.values()), f"nobody was overtaken: {overtaken}"


# -- side by side ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", [ENCODE_THERE, PLACEMENTS["1 + 1 and an encoder"]], ids=["1 + 1", "1 + 1 + 1"])
def test_one_is_decoded_while_the_next_is_denoised_and_the_one_after_it_is_encoded(placement: Placement) -> None:
    sent = play(RequestScheduler(placement), placement, dict.fromkeys("abcd", (0, LONG)), takes(0.1, 1, 0.9))
    decoded = [s for s in sent if isinstance(s.command, messages.Decode) and s.command.request_id == "b"]
    start_s, end_s = decoded[0].start_s, decoded[-1].end_s
    meanwhile = [s.command for s in sent if s.start_s < end_s and s.end_s > start_s]
    assert {c.request_id for c in meanwhile if isinstance(c, messages.Denoise)} == {"c"}
    encoded = next(s for s in sent if isinstance(s.command, messages.Encode) and s.command.request_id == "d")
    assert encoded.end_s <= end_s, "it is there before the denoisers need it"


@pytest.mark.parametrize(
    ("step_s", "chunk_s"), [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0)], ids=["balanced", "denoise-heavy", "decode-heavy"]
)
@pytest.mark.parametrize("name", [name for name in PLACEMENTS if PLACEMENTS[name].is_disaggregated])
def test_the_slower_group_never_waits(name: str, step_s: float, chunk_s: float) -> None:
    """Throughput is what the pipeline allows: the time of the slower group, and filling and draining once."""
    placement, count = PLACEMENTS[name], 40
    scheduler = RequestScheduler(placement, Policy(spread_decode=False))
    arrivals = {f"r{i}": (0.0, LONG) for i in range(count)}
    sent = play(scheduler, placement, arrivals, takes(0.0, step_s, chunk_s))
    denoise_s, decode_s = 3 * step_s, 3 * chunk_s
    bound_s = count * max(denoise_s, decode_s / len(placement.decoders))
    assert max(s.end_s for s in sent) <= bound_s + denoise_s + decode_s


def test_all_decoders_work_at_once() -> None:
    """Decode is data-parallel: a video for each."""
    placement = Placement.disaggregated(denoise=1, decode=3, encoder=Role.DENOISER)
    sent = play(RequestScheduler(placement), placement, {f"r{i}": (0, SHORT) for i in range(9)}, takes(0, 1, 3))
    decodes = [s for s in sent if isinstance(s.command, messages.Decode)]
    assert {s.command.ranks for s in decodes[:-1]} == {(1,), (2,), (3,)}
    assert max(s.end_s for s in sent) <= 9 * 1 + 3, "as fast as the denoisers"


def test_back_pressure_stops_the_denoisers() -> None:
    """However slow decoding is, clean latents do not pile up, and no more prompts are encoded than are asked for."""
    policy = Policy(latents_waiting=2, encoded_ahead=3)
    rehearsal = Rehearsal(ONE_AND_TWO, policy)
    rehearsal.submit(SHORT, *(f"r{i}" for i in range(20)))
    rehearsal.ask()
    for _ in range(100):  # nothing is ever decoded
        free = [rank for rank, c in rehearsal.ranks.in_flight.items() if not isinstance(c, messages.Decode)]
        rehearsal.finish(*free)
    phases = [rehearsal.phase(request_id) for request_id in rehearsal.works]
    assert phases == [Phase.DECODING] * 2 + [Phase.DENOISED] * 4 + [Phase.ENCODED] * 3 + [Phase.QUEUED] * 11
    rehearsal.go_to_the_end()


def test_a_request_that_is_alone_is_decoded_by_all_decoders() -> None:
    several = Work(num_steps=1, num_chunks=4, num_chunks_spread=2)
    sent = play(RequestScheduler(ONE_AND_TWO), ONE_AND_TWO, {"a": (0, several)})
    decodes = [s.command for s in sent if isinstance(s.command, messages.Decode)]
    assert [(c.ranks, c.chunk) for c in decodes] == [((1, 2), 0), ((1, 2), 1)]
    sent = play(RequestScheduler(ONE_AND_TWO), ONE_AND_TWO, {"a": (0, several), "b": (0, several)})
    decodes = [s.command for s in sent if isinstance(s.command, messages.Decode) and s.command.request_id == "a"]
    assert [(c.ranks, c.chunk) for c in decodes] == [((1,), chunk) for chunk in range(4)], "it is not alone"
    policy = Policy(spread_decode=False)
    sent = play(RequestScheduler(ONE_AND_TWO, policy), ONE_AND_TWO, {"a": (0, several)})
    decodes = [s.command for s in sent if isinstance(s.command, messages.Decode)]
    assert [(c.ranks, c.chunk) for c in decodes] == [((1,), chunk) for chunk in range(4)]


def test_ranks_that_share_a_chunk_wait_for_each_other() -> None:
    rehearsal = Rehearsal(ONE_AND_TWO)
    rehearsal.submit(LONG, "a")
    rehearsal.go_until(messages.Decode, "a")
    rehearsal.submit(SHORT, "b")
    rehearsal.ask()
    rehearsal.finish(0)  # encoded
    rehearsal.finish(0)  # denoised
    assert rehearsal.phase("b") is Phase.DENOISED
    assert rehearsal.finish(1) == [], "rank 2 is still at it, then both go on"
    (decode,) = rehearsal.finish(2)
    assert (decode.request_id, decode.ranks) == ("a", (1, 2))
    rehearsal.go_to_the_end()


def test_a_decoder_that_shares_an_interrupted_video_begins_no_other() -> None:
    """Else its next chunk might wait for one of them or the other for ever."""
    rehearsal = Rehearsal(ONE_AND_TWO)
    rehearsal.submit(LONG, "a")
    rehearsal.go_until(messages.Decode, "a")
    rehearsal.submit(work(1, 2, priority=1), "urgent")
    rehearsal.submit(SHORT, "b")
    rehearsal.ask()
    rehearsal.finish(0)  # encoded
    assert [(c.request_id, c.ranks) for c in rehearsal.finish(0, 1, 2)] == [("urgent", (1,)), ("b", (0,))]
    rehearsal.finish(0)  # encoded
    rehearsal.finish(0)  # denoised
    assert rehearsal.phase("b") is Phase.DENOISED
    assert rehearsal.ranks.in_flight.keys() == {1}, "rank 2 waits for it, to go on with a"
    rehearsal.go_to_the_end()


# -- priority --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [messages.Denoise, messages.Decode])
def test_higher_priority_goes_between_two_steps_or_chunks(kind: type[messages.Command]) -> None:
    rehearsal = Rehearsal(Placement.colocated(2))
    rehearsal.submit(LONG, "a")
    rehearsal.go_until(kind, "a")
    rehearsal.submit(work(1, 1, priority=1), "b", "c")
    assert rehearsal.ask() == [], "not before the command in flight is done"
    sent: list[messages.Command] = []
    while not sent or sent[-1].request_id != "a":
        sent += [c for c in rehearsal.finish_all() if not isinstance(c, messages.Release)]
    assert [(type(c), c.request_id) for c in sent] == [
        (step, name) for name in "bc" for step in (messages.Encode, messages.Denoise, messages.Decode)
    ] + [(kind, "a")], "one after the other, and then a goes on"
    rehearsal.go_to_the_end()


def test_equal_priority_does_not_interrupt() -> None:
    placement = Placement.colocated(1)
    sent = play(RequestScheduler(placement), placement, {"a": (0, LONG), "b": (1.5, LONG)})
    assert begins(sent, messages.Encode) == ["a", "b"]
    assert list(ends(sent).values()) == [7, 14]


def test_an_urgent_prompt_does_not_wait_for_another_group() -> None:
    """Both groups answer at once, and what the decoder has is even more urgent."""
    rehearsal = Rehearsal(ONE_AND_ONE)
    rehearsal.submit(work(1, 9, priority=9), "decoded")
    rehearsal.go_until(messages.Decode, "decoded")
    rehearsal.submit(work(9, 1), "denoised")
    rehearsal.go_until(messages.Denoise, "denoised")
    rehearsal.submit(work(1, 1, priority=1), "urgent")
    assert {(type(c), c.request_id) for c in rehearsal.finish(0, 1)} == {
        (messages.Decode, "decoded"),
        (messages.Encode, "urgent"),
    }
    rehearsal.go_to_the_end()


def test_a_prompt_is_encoded_where_no_video_goes_on() -> None:
    rehearsal = Rehearsal(ENCODE_AT_TWO, Policy(spread_decode=False))
    rehearsal.submit(work(1, 9), "a")
    rehearsal.go_until(messages.Decode, "a")
    rehearsal.scheduler.receive(rehearsal.ranks.finish(1))
    rehearsal.submit(work(1, 1, priority=1), "urgent")
    assert {(type(c), c.request_id, c.ranks) for c in rehearsal.ask()} == {
        (messages.Decode, "a", (1,)),
        (messages.Encode, "urgent", (2,)),
    }
    rehearsal.go_to_the_end()


def test_only_the_prompt_that_is_needed_next_goes_before_a_chunk() -> None:
    """The denoiser has nothing left, so one prompt may interrupt; a second one would only delay the decoders."""
    rehearsal = Rehearsal(ENCODE_AT_TWO, Policy(spread_decode=False, encoded_ahead=2))
    rehearsal.submit(work(1, 9), "a", "b")
    rehearsal.go_until(messages.Decode, "b")
    rehearsal.submit(SHORT, "c", "d")
    sent = rehearsal.finish(1, 2)
    assert {(type(c), c.request_id) for c in sent} == {(messages.Encode, "c"), (messages.Decode, "b")}
    rehearsal.go_to_the_end()


def test_a_video_of_higher_priority_is_decoded_on_an_idle_decoder_first() -> None:
    rehearsal = Rehearsal(ONE_AND_TWO, Policy(spread_decode=False))
    rehearsal.submit(work(1, 9), "a")
    rehearsal.go_until(messages.Decode, "a")
    rehearsal.submit(work(1, 1, priority=1), "urgent")
    rehearsal.go_until(messages.Denoise, "urgent")
    assert {(c.request_id, c.ranks) for c in rehearsal.finish(0, 1)} == {("urgent", (2,)), ("a", (1,))}
    rehearsal.go_to_the_end()


def test_a_video_of_higher_priority_does_not_wait_for_all_chunks_of_another() -> None:
    rehearsal = Rehearsal(ONE_AND_ONE)
    rehearsal.submit(work(1, 9), "a")
    rehearsal.go_until(messages.Decode, "a")
    rehearsal.submit(work(1, 2, priority=1), "urgent")
    rehearsal.ask()
    rehearsal.finish(0)  # encoded
    rehearsal.finish(0)  # denoised
    assert [c.request_id for c in rehearsal.finish(1)] == ["urgent"]
    assert [c.request_id for c in rehearsal.finish(1)] == ["urgent"]
    rehearsal.go_to_the_end()


# -- fairness --------------------------------------------------------------------------------------------------------


def stream(count: int, gap_s: float, priority: int) -> Iterator[tuple[str, tuple[float, Work]]]:
    for number in range(count):
        yield f"p{priority} {number}", (number * gap_s, work(1, 1, priority))


@pytest.mark.parametrize("patience", [1, 3, 8])
@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("duration", [takes(0.1, 1, 1), takes(0.1, 1, 4), takes(0.1, 4, 1), takes(3, 1, 1)])
def test_low_priority_is_done_however_many_urgent_ones_come(
    name: str, patience: int, duration: Callable[[messages.Command], float]
) -> None:
    placement, policy = PLACEMENTS[name], Policy(patience=patience)
    arrivals = {"first": (0.0, work(1, 1, 1)), "low": (0.0, work(2, 2))} | dict(stream(60, 0.5, priority=1))
    sent = play(RequestScheduler(placement, policy), placement, arrivals, duration)
    done = list(ends(sent))
    before = done.index("low")
    in_the_pipeline = policy.encoded_ahead + (1 + policy.latents_waiting) * len(placement.decoders)
    assert before <= patience + in_the_pipeline, f"{before} went before it"
    assert before >= patience // 2, "priority counts for something"


def test_without_patience_running_out_it_would_wait_for_all() -> None:
    """The negative of the test above."""
    placement = Placement.colocated(1)
    arrivals = {"low": (0.0, work(2, 2))} | dict(stream(60, 0.5, priority=1))
    sent = play(RequestScheduler(placement, Policy(patience=1000)), placement, arrivals)
    assert list(ends(sent))[-1] == "low"


def test_a_middle_priority_does_not_hold_up_whoever_has_waited_too_long() -> None:
    """Three levels, the highest so busy that the middle one is overtaken too."""
    placement = Placement.colocated(1)
    arrivals = {"low": (0.0, work(2, 2))} | dict(stream(60, 2.0, priority=1)) | dict(stream(60, 1.0, priority=2))
    sent = play(RequestScheduler(placement, Policy(patience=4)), placement, arrivals)
    assert list(ends(sent)).index("low") <= 4 + 3


# -- speed -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_steps() -> Iterator[list[int]]:
    """How many instructions of Python code are run: a measure of time that no other process can disturb."""
    count = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        frame.f_trace_opcodes = True
        count[0] += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_decision_takes_no_longer_when_many_wait(name: str) -> None:
    def steps_with(waiting: int) -> int:
        rehearsal = Rehearsal(PLACEMENTS[name], Policy(patience=10**6))
        rehearsal.submit(SHORT, *(f"r{i}" for i in range(waiting)))
        rehearsal.submit(work(1, 1, priority=1), "urgent")
        rehearsal.ask()
        ranks, scheduler, total = rehearsal.ranks, rehearsal.scheduler, 0
        for _ in range(20):
            events = [ranks.finish(rank) for rank in list(ranks.in_flight)]
            with counted_steps() as count:
                for event in events:
                    scheduler.receive(event)
                commands = scheduler.next_commands()
            total += count[0]
            for command in commands:
                ranks.take(command)
        return total

    few, many = steps_with(40), steps_with(3_000)
    assert 1_000 < many <= 1.1 * few


def test_a_hundred_thousand_can_wait() -> None:
    """And be cancelled, and be abandoned."""
    scheduler = RequestScheduler(ONE_AND_TWO)
    names = [f"r{i}" for i in range(100_000)]
    for name in names:
        scheduler.submit(name, REQUEST, SHORT)
    assert len(scheduler.next_commands()) == 1
    for name in names[1::2]:
        scheduler.cancel(name)
    scheduler.abandon()
    assert scheduler.is_idle
