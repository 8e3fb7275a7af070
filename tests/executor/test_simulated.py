"""The executor that does no work answers every command as workers would."""

import dataclasses

from pipedit.core import messages
from pipedit.core.parallel import ParallelConfig
from pipedit.core.request import VideoRequest
from pipedit.executor.simulated import SimulatedExecutor

REQUEST = VideoRequest(prompt="a red ball", height=32, width=48)
STEP = messages.Denoise(request_id="a", ranks=(0, 1), request=REQUEST, step=2, num_steps=3)
CHUNK = messages.Decode(request_id="a", ranks=(2,), request=REQUEST, chunk=0, num_chunks=2)


def answers(executor: SimulatedExecutor, *commands: messages.Command) -> list[messages.Event]:
    for command in commands:
        executor.send(command)
    events: list[messages.Event] = []
    while received := executor.receive(0.0):
        events += received
    return events


def test_several_steps_and_chunks_are_one_answer() -> None:
    executor = SimulatedExecutor(frames_per_chunk=4, step_s=0.5)
    first, second = answers(executor, STEP)
    assert isinstance(first, messages.StepDone)
    assert (first.rank, second.rank, first.step) == (0, 1, 4)
    assert [(span.what, span.role, span.index, span.start_s) for span in first.spans] == [
        ("step", "denoiser", 2, 0.0), ("step", "denoiser", 3, 0.5), ("step", "denoiser", 4, 1.0)
    ]  # fmt: skip
    (chunk,) = answers(executor, CHUNK)
    assert isinstance(chunk, messages.ChunkDecoded) and chunk.frames is not None
    assert (chunk.chunk, chunk.frames.shape) == (1, (5, 32, 48, 3))


def test_all_decoders_answer_and_the_first_one_has_the_frames() -> None:
    first, second = answers(SimulatedExecutor(), dataclasses.replace(CHUNK, ranks=(3, 2)))
    assert isinstance(first, messages.ChunkDecoded) and isinstance(second, messages.ChunkDecoded)
    assert (first.rank, first.frames is None, second.frames is None) == (3, False, True)


def test_helpers_help() -> None:
    aco = messages.Aco(helpers=((2,), (3,)), heads=(3, 1), text_tokens=(0, 0))
    config = ParallelConfig(cfg_degree=2)
    events = answers(SimulatedExecutor(), dataclasses.replace(STEP, ranks=(0, 1, 2, 3), parallel=config, aco=aco))
    kinds = {event.rank: {(span.role, span.what) for span in event.spans} for event in events}
    step, help_ = {("denoiser", "step")}, {("decoder", "help")}
    assert kinds == {0: step, 1: step, 2: help_, 3: help_}
    assert {event.step for event in events if isinstance(event, messages.StepDone)} == {4}


def test_ranks_work_at_the_same_time_and_answers_come_in_the_order_of_their_ends() -> None:
    def seconds(command: messages.Command) -> float:
        return {messages.Denoise: 1.0, messages.Decode: 0.25}.get(type(command), 0.0)

    executor = SimulatedExecutor(step_s=seconds)
    chunk, *steps = answers(executor, STEP, CHUNK)
    assert isinstance(chunk, messages.ChunkDecoded)
    assert (chunk.spans[0].start_s, chunk.spans[-1].end_s) == (0.0, 0.5)
    assert {(event.spans[0].start_s, event.spans[-1].end_s) for event in steps} == {(0.0, 3.0)}
    (later,) = answers(executor, CHUNK)
    assert later.spans[0].start_s == 3.0, "not before it was sent"


def test_text_tokens_are_those_that_were_wished_for() -> None:
    executor = SimulatedExecutor(text_tokens=(7, 5))
    (encoded,) = answers(executor, messages.Encode(request_id="a", ranks=(1,), request=REQUEST))
    assert isinstance(encoded, messages.Encoded)
    assert (encoded.text_tokens, encoded.rank) == ((7, 5), 1)
