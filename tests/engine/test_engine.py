"""The engine over the simulated executor: order, checks, cancel, failure; then once over a real tiny model."""

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipedit
from pipedit.core import messages
from pipedit.engine.engine import Engine
from pipedit.engine.updates import Cancelled, Failed, Finished, Frames, Progress
from pipedit.executor.simulated import SimulatedExecutor
from tests import tiny_pipelines

SETTINGS: dict[str, Any] = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 3}


@pytest.fixture
def simulated(tiny_folder: Callable[[str], Path]) -> Callable[..., tuple[Engine, SimulatedExecutor]]:
    def make(**options: Any) -> tuple[Engine, SimulatedExecutor]:
        executor = SimulatedExecutor(**options)
        return Engine(tiny_folder("wan"), device="cpu", executor=executor), executor

    return make


def test_videos_come_in_order_and_say_how_they_were_made(simulated: Callable[..., Any]) -> None:
    engine, _ = simulated()
    videos = list(engine.generate(["one", "two"], seed=5, **SETTINGS))
    assert [video.request.prompt for video in videos] == ["one", "two"]
    assert all(video.frames.shape == (9, 32, 48, 3) and video.frames.dtype == np.uint8 for video in videos)
    assert all(video.request.seed == 5 and video.fps == 16 for video in videos)
    assert videos[0].metadata.prompt == "one"
    assert videos[0].metadata.settings["num_inference_steps"] == 3
    assert set(videos[0].seconds) == {"encode", "step", "decode"}


def test_without_a_seed_every_video_gets_its_own(simulated: Callable[..., Any]) -> None:
    engine, _ = simulated()
    seeds = {video.request.seed for video in engine.generate(["a", "b", "c"], **SETTINGS)}
    assert len(seeds) == 3
    assert None not in seeds


def test_updates_tell_every_step_and_frame(simulated: Callable[..., Any]) -> None:
    engine, executor = simulated(step_s=0.1)
    (request,) = engine.prepare([pipedit.VideoRequest(prompt="x", **SETTINGS)])
    request_id = engine.submit(request)
    updates = list(engine.updates())
    progress = [(u.stage, u.done, u.total) for u in updates if isinstance(u, Progress)]
    assert progress == [
        ("encode", 1, 1),
        *(("denoise", n, 3) for n in (1, 2, 3)),
        *(("decode", n, 3) for n in (1, 2, 3)),
    ]
    assert [u.first for u in updates if isinstance(u, Frames)] == [0, 1, 5]
    assert isinstance(updates[-1], Finished)
    assert {u.request_id for u in updates} == {request_id}
    assert updates[2].spent_s == pytest.approx(0.2), "two steps"
    assert isinstance(executor.sent[-1], messages.Release), "workers keep nothing while they wait for another request"


def test_updates_tell_how_far_quick_steps_have_come(simulated: Callable[..., Any]) -> None:
    """Several of them are done at a time, up to the last one."""
    engine, executor = simulated(step_s=0.02)
    many = {**SETTINGS, "num_inference_steps": 9, "num_frames": 25}
    (request,) = engine.prepare([pipedit.VideoRequest(prompt="x", **many)])
    engine.submit(request)
    updates = list(engine.updates())
    progress = [(u.stage, u.done, u.total) for u in updates if isinstance(u, Progress)]
    assert progress == [
        ("encode", 1, 1),
        *(("denoise", n, 9) for n in (1, 4, 7, 9)),
        *(("decode", n, 7) for n in (1, 2, 5, 7)),
    ]
    spent_s = [u.spent_s for u in updates if isinstance(u, Progress) and u.stage == "denoise"]
    assert spent_s == pytest.approx([0.02, 0.08, 0.14, 0.18])
    shown = [u for u in updates if isinstance(u, Frames)]
    assert [(u.first, len(u.frames)) for u in shown] == [(0, 1), (1, 4), (5, 12), (17, 8)]
    assert isinstance(executor.sent[-1], messages.Release)


def test_everything_wrong_is_said_at_once_and_nothing_runs(simulated: Callable[..., Any]) -> None:
    engine, executor = simulated()
    with pytest.raises(pipedit.InvalidRequestError) as caught:
        engine.generate(
            ["", "ok"], num_frames=10, height=33, num_inference_steps=0, seed=-1, guidance_scale=float("nan")
        )
    text = "\n".join(caught.value.problems)
    for part in ("prompt is empty", "9 and 13", "32 and 48", "num_inference_steps=0", "seed=-1", "guidance_scale=nan"):
        assert part in text
    with pytest.raises(pipedit.InvalidRequestError, match="did you mean num_frames"):
        engine.generate("x", num_frame=9)
    assert executor.sent == []


def test_cancel_between_updates_stops_within_one_step(simulated: Callable[..., Any]) -> None:
    engine, executor = simulated()
    (request,) = engine.prepare([pipedit.VideoRequest(prompt="x", **SETTINGS)])
    request_id = engine.submit(request)
    seen = []
    for update in engine.updates():
        seen.append(update)
        if isinstance(update, Progress) and update.stage == "denoise":
            engine.cancel(request_id)
    assert isinstance(seen[-1], Cancelled)
    assert sum(isinstance(command, messages.Denoise) for command in executor.sent) == 1
    assert isinstance(executor.sent[-1], messages.Release)


def test_an_abandoned_iterator_leaves_nothing_behind(simulated: Callable[..., Any]) -> None:
    engine, executor = simulated()
    videos = engine.generate(["a", "b", "c"], **SETTINGS)
    next(videos)
    videos.close()
    assert isinstance(executor.sent[-1], messages.Release)
    assert [video.request.prompt for video in engine.generate("d", **SETTINGS)] == ["d"]


def test_a_failed_request_raises_its_own_error_and_the_next_one_works(simulated: Callable[..., Any]) -> None:
    def failing(command: messages.Command) -> None:
        if isinstance(command, messages.Denoise) and command.request_id == "request-1":
            raise RuntimeError("no luck")

    engine, _ = simulated(failing=failing)
    with pytest.raises(RuntimeError, match="no luck"):
        list(engine.generate("a", **SETTINGS))
    assert len(list(engine.generate("b", **SETTINGS))) == 1


def test_failure_of_one_request_is_an_update_and_others_go_on(simulated: Callable[..., Any]) -> None:
    def failing(command: messages.Command) -> None:
        if command.request_id == "request-1" and isinstance(command, messages.Decode):
            raise RuntimeError("no luck")

    engine, _ = simulated(failing=failing)
    for request in engine.prepare([pipedit.VideoRequest(prompt=p, **SETTINGS) for p in "ab"]):
        engine.submit(request)
    ends = [u for u in engine.updates() if isinstance(u, (Finished, Failed))]
    assert [type(u).__name__ for u in ends] == ["Failed", "Finished"]


def test_two_iterators_on_one_engine_do_not_take_from_each_other(simulated: Callable[..., Any]) -> None:
    engine, _ = simulated()
    stream = engine.stream("first", **SETTINGS)
    shown = [next(stream)]
    (second,) = engine.generate("second", **SETTINGS)
    assert second.frames.shape == (9, 32, 48, 3)
    shown += stream
    assert np.concatenate(shown).shape == (9, 32, 48, 3)


def test_generate_inside_the_loop_of_generate(simulated: Callable[..., Any]) -> None:
    engine, _ = simulated()
    seen = []
    for video in engine.generate(["a", "b"], **SETTINGS):
        (inner,) = engine.generate(f"inside {video.request.prompt}", **SETTINGS)
        seen += [video.request.prompt, inner.request.prompt]
    assert seen == ["a", "inside a", "b", "inside b"]


def in_another_thread(action: Callable[[], Any]) -> list[BaseException]:
    """What the action raises there."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except pipedit.PipeditError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10.0)
    assert not thread.is_alive()
    return errors


def test_a_second_thread_is_refused_and_queues_nothing(simulated: Callable[..., Any]) -> None:
    errors: list[BaseException] = []

    def meanwhile(command: messages.Command) -> None:
        if isinstance(command, messages.Denoise) and command.request_id == "request-1" and not errors:
            errors.extend(in_another_thread(lambda: next(engine.stream("second", **SETTINGS))))

    engine, executor = simulated(failing=meanwhile)
    assert np.concatenate(list(engine.stream("first", **SETTINGS))).shape == (9, 32, 48, 3)
    assert "one thread at a time" in str(errors[0])
    assert {command.request_id for command in executor.sent} == {"request-1"}
    assert not engine._driver.mentioned
    assert len(list(engine.generate("again", **SETTINGS))) == 1


def test_a_request_that_a_second_thread_lost_is_cancelled_by_the_first(simulated: Callable[..., Any]) -> None:
    errors: list[BaseException] = []

    def meanwhile(command: messages.Command) -> None:
        if isinstance(command, messages.Decode) and command.request_id == "request-1" and command.chunk == 1:
            errors.extend(in_another_thread(lambda: next(old)))

    engine, executor = simulated(failing=meanwhile)
    old = engine.stream("old", **SETTINGS)
    next(old)  # the first of three chunks
    assert np.concatenate(list(engine.stream("new", **SETTINGS))).shape == (9, 32, 48, 3)
    assert "one thread at a time" in str(errors[0])
    assert isinstance([command for command in executor.sent if command.request_id == "request-1"][-1], messages.Release)
    assert not engine._driver.mentioned
    assert not engine._owned


def test_updates_leave_the_videos_of_iterators_alone(simulated: Callable[..., Any]) -> None:
    engine, _ = simulated()
    videos = engine.generate(["a", "b"], **SETTINGS)
    first = next(videos)
    (request,) = engine.prepare([pipedit.VideoRequest(prompt="c", **SETTINGS)])
    request_id = engine.submit(request)
    assert {update.request_id for update in engine.updates()} == {request_id}
    assert [first.request.prompt, *(video.request.prompt for video in videos)] == ["a", "b"]


def test_a_closed_engine_says_so(simulated: Callable[..., Any]) -> None:
    engine, _ = simulated()
    videos = engine.generate(["a", "b"], **SETTINGS)
    next(videos)
    engine.close()
    with pytest.raises(pipedit.PipeditError, match="closed"):
        next(videos)
    with pytest.raises(pipedit.PipeditError, match="closed"):
        list(engine.generate("c", **SETTINGS))
    engine.close()


def test_an_iterator_that_outlives_its_engine_waits_for_nobody(tiny_folder: Callable[[str], Path]) -> None:
    with Engine(tiny_folder("wan"), device="cpu", num_workers=2, executor=SimulatedExecutor()) as engine:
        stream = engine.stream("x", **SETTINGS)
        next(stream)  # rank 0 has answered, rank 1 has not
    thread = threading.Thread(target=stream.close, daemon=True)  # type: ignore[attr-defined]
    thread.start()
    thread.join(5.0)
    assert not thread.is_alive()


def test_an_abandoned_iterator_keeps_nothing_in_the_worker(tiny_folder: Callable[[str], Path]) -> None:
    with Engine(tiny_folder("wan"), device="cpu") as engine:
        next(engine.generate("x", **tiny_pipelines.QUICK_SETTINGS["wan"]))
        assert engine._executor._worker._held == {}  # type: ignore[union-attr]


def test_errors_come_in_the_order_of_prompts(simulated: Callable[..., Any]) -> None:
    def failing(command: messages.Command) -> None:
        if command.request_id == "request-2":
            raise RuntimeError("no luck")

    engine, _ = simulated(failing=failing)
    videos = engine.generate(["a", "b", "c"], **SETTINGS)
    assert next(videos).request.prompt == "a"
    with pytest.raises(RuntimeError, match="no luck"):
        next(videos)


def test_a_kept_error_keeps_no_tensors(tiny_folder: Callable[[str], Path]) -> None:
    kept: list[weakref.ref[Any]] = []

    def fail(*_: Any) -> None:
        large = np.zeros(10)
        kept.append(weakref.ref(large))
        raise RuntimeError("no luck")

    with Engine(tiny_folder("wan"), device="cpu") as engine:
        engine.start()
        engine._executor._worker._stages.denoise.step = fail  # type: ignore[union-attr]
        with pytest.raises(pipedit.WorkerError, match="no luck") as caught:
            list(engine.generate("x", **tiny_pipelines.QUICK_SETTINGS["wan"]))
        assert kept[0]() is None
        assert caught.value.rank == 0


def test_settings_beside_a_whole_request_are_refused(simulated: Callable[..., Any]) -> None:
    engine, _ = simulated()
    with pytest.raises(pipedit.InvalidRequestError, match="seed cannot change a VideoRequest"):
        engine.generate(pipedit.VideoRequest(prompt="x", **SETTINGS), seed=5)


def test_impossible_settings_are_refused_when_the_engine_is_made() -> None:
    with pytest.raises(pipedit.InvalidRequestError) as caught:
        Engine("no-such-model", device="tpu", dtype="int3", num_workers=0)
    text = "\n".join(caught.value.problems)
    for part in ("no-such-model", "tpu", "int3", "num_workers=0"):
        assert part in text
    with pytest.raises(pipedit.InvalidRequestError, match=r"did you mean wan2\.1-t2v-1\.3b"):
        Engine("wan2.1-t2v-1.3")


def test_real_stages_equal_plain_diffusers_and_the_trace_covers_the_work(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_folder("wan")
    settings = tiny_pipelines.QUICK_SETTINGS["wan"]
    with Engine(folder, device="cpu") as engine:
        (video,) = engine.generate("a red ball", seed=2, **settings)
        streamed = np.concatenate(list(engine.stream("a red ball", seed=2, **settings)))
        spans = engine.timeline().spans
    _, expected = tiny_pipelines.run_diffusers(folder, prompt="a red ball", seed=2, **settings)
    assert np.abs(video.frames.astype(int) - expected.astype(int)).max() <= 1
    assert np.array_equal(video.frames, streamed)
    assert {span.what for span in spans} == {"load", "encode", "step", "decode"}
    assert sum(span.what == "step" for span in spans) == 2 * settings["num_inference_steps"]
    assert video.save(tmp_path / "out.mp4").stat().st_size > 0


def test_interrupt_in_mid_step_leaves_a_usable_engine(tiny_folder: Callable[[str], Path]) -> None:
    settings = tiny_pipelines.QUICK_SETTINGS["wan"]
    with Engine(tiny_folder("wan"), device="cpu") as engine:
        (request,) = engine.prepare([pipedit.VideoRequest(prompt="x", seed=1, **settings)])
        engine.submit(request)
        updates = engine.updates()
        next(updates)
        stage = engine._executor._worker._stages.denoise  # type: ignore[union-attr]
        step, stage.step = stage.step, _interrupt
        with pytest.raises(KeyboardInterrupt):
            list(updates)
        stage.step = step
        assert any(isinstance(update, Failed) for update in engine.updates())
        assert len(list(engine.generate("y", seed=1, **settings))) == 1


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
