"""The life and death of worker processes, with workers that need no model."""

import dataclasses
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import pipedit
from pipedit.core import messages
from pipedit.core.errors import InvalidRequestError, PipeditError, WorkerDiedError, WorkerError
from pipedit.core.spans import Span
from pipedit.engine.engine import Engine
from pipedit.engine.updates import Failed, Finished, Progress
from pipedit.executor.local_processes import ProcessLink, worker_environment
from tests.executor.stand_ins import (
    ANY,
    BOTH,
    START_S,
    STEP_1,
    await_that,
    begin,
    call,
    fake_executor,
    is_alive,
    open_files,
    run_parent,
    started,
)

SMALL: dict[str, Any] = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 3}


def test_every_rank_answers_and_the_first_one_has_the_frames() -> None:
    with started(fake_executor()) as executor:
        begin(executor, "")
        steps = call(executor, STEP_1)
        assert sorted(event.rank for event in steps) == [0, 1]
        assert all(isinstance(event, messages.StepDone) and event.spans for event in steps)
        chunks = call(executor, messages.Decode(request_id="a", ranks=BOTH, request=ANY, chunk=3))
        frames = {event.rank: event.frames for event in chunks if isinstance(event, messages.ChunkDecoded)}
        assert frames[1] is None
        assert frames[0] is not None
        assert frames[0].shape == (4, 16, 16, 3)
        assert frames[0].max() == 3
        assert executor.receive(0.0) == ()


def test_spans_of_loading_come_back_on_our_clock() -> None:
    executor, before_s = fake_executor(), time.perf_counter()
    spans = executor.start(START_S)
    executor.stop(5.0)
    assert [span.rank for span in spans] == [0, 1]
    assert all(before_s < span.start_s < time.perf_counter() for span in spans)


def test_stop_leaves_no_process_no_file_and_no_thread(recwarn: pytest.WarningsRecorder) -> None:
    before = open_files()
    with started(fake_executor()) as executor:
        pids = executor.pids
        assert all(map(is_alive, pids))
    assert not any(psutil.pid_exists(pid) for pid in pids), "zombies count too"
    assert open_files() == before
    executor.stop(5.0)
    assert not recwarn.list


def test_stopping_in_the_midst_of_a_command_does_not_wait_for_it() -> None:
    executor = fake_executor()
    executor.start(START_S)
    begin(executor, "0 hang")
    executor.send(STEP_1)
    start_s, pids = time.monotonic(), executor.pids
    executor.stop(10.0)
    assert time.monotonic() - start_s < 5.0
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize(
    ("deed", "ending", "output"),
    [("exit", "exit code 7", ("something is wrong",)), ("crash", "SIGSEGV", None)],
)
def test_a_worker_that_ends_is_a_named_error_and_takes_the_others_along(
    deed: str, ending: str, output: tuple[str, ...] | None
) -> None:
    executor = fake_executor()
    executor.start(START_S)
    pids = executor.pids
    begin(executor, f"1 {deed}")
    with pytest.raises(WorkerDiedError) as caught:
        call(executor, STEP_1)
    error = caught.value
    assert (error.rank, error.doing, error.ending) == (1, "denoising", ending)
    assert error.last_span is not None
    assert error.last_span.index == 0
    assert output is None or error.output == output
    assert not any(map(is_alive, pids))


def test_a_killed_worker_is_noticed_within_five_seconds_and_the_executor_starts_again() -> None:
    executor = fake_executor()
    executor.start(START_S)
    begin(executor, "0 hang")
    pids = executor.pids
    threading.Timer(0.3, os.kill, (pids[0], signal.SIGKILL)).start()
    start_s = time.monotonic()
    with pytest.raises(WorkerDiedError, match=r"worker 0 died while it was denoising \(SIGKILL") as caught:
        call(executor, STEP_1)
    assert time.monotonic() - start_s < 5.0
    assert "memory" in str(caught.value)
    with started(executor):
        assert not set(executor.pids) & set(pids)
        begin(executor, "")
        assert len(call(executor, STEP_1)) == 2


def test_a_failed_command_is_an_event_and_everything_lives_on() -> None:
    with started(fake_executor()) as executor:
        pids = executor.pids
        begin(executor, "1 fail")
        failed, done = call(executor, STEP_1)
        if not isinstance(failed, messages.CommandFailed):
            failed, done = done, failed
        assert isinstance(failed, messages.CommandFailed)
        assert isinstance(failed.error, WorkerError)
        assert (failed.rank, failed.error.rank, failed.doing) == (1, 1, "denoising")
        assert "RuntimeError: no luck" in str(failed.error)
        assert "fake_worker.py" in failed.error.__notes__[0], "the traceback travels as a note"
        assert isinstance(done, messages.StepDone)
        assert len(call(executor, messages.Denoise(request_id="a", ranks=BOTH, request=ANY, step=2))) == 2
        assert executor.pids == pids


FETCH = messages.Decode(request_id="a", ranks=(1,), request=ANY, chunk=0, latents_at=0)


@pytest.mark.parametrize("command", [FETCH, dataclasses.replace(STEP_1, ranks=(1,))], ids=["fetch", "meet"])
def test_a_rank_that_fails_because_another_is_dead_is_not_the_one_to_blame(command: messages.Command) -> None:
    executor = fake_executor()
    executor.start(START_S)
    begin(executor, f"1 kill {executor.pids[0]}")
    with pytest.raises(WorkerDiedError, match="worker 0 died while it was waiting for work"):
        call(executor, command)


def test_a_rank_that_cannot_fetch_from_one_that_lives_has_failed_itself() -> None:
    with started(fake_executor()) as executor:
        begin(executor, "1 fail")
        start_s = time.monotonic()
        (failed,) = call(executor, FETCH)
        assert time.monotonic() - start_s < 1.0, "nobody waits for others to answer"
        assert isinstance(failed, messages.CommandFailed)
        assert (failed.rank, failed.doing) == (1, "decoding")


def test_an_error_that_cannot_be_sent_comes_as_text() -> None:
    with started(fake_executor()) as executor:
        begin(executor, "0 fail unportably")
        errors = [event.error for event in call(executor, STEP_1) if isinstance(event, messages.CommandFailed)]
    assert len(errors) == 1
    assert "UnportableError: has a lambda" in str(errors[0])


def test_ranks_that_wait_for_one_that_failed_are_stopped_and_its_error_is_told() -> None:
    executor = fake_executor(grace_s=1.0)
    executor.start(START_S)
    pids, start_s = executor.pids, time.monotonic()
    begin(executor, "0 fail while others hang")
    executor.send(STEP_1)
    events: list[messages.Event] = []
    while not events:
        events += executor.receive(5.0)
    assert [(type(event), event.rank) for event in events] == [(messages.CommandFailed, 0)]
    with pytest.raises(WorkerDiedError, match=r"worker 1 .*no answer within 1 s after worker 0 had failed"):
        executor.receive(5.0)
    assert time.monotonic() - start_s < 5.0
    assert not any(map(is_alive, pids))


def test_a_start_that_takes_too_long_names_the_ranks() -> None:
    executor, before = fake_executor("1 hang"), open_files()
    with pytest.raises(WorkerError, match=r"worker 1 was not ready within 3 s"):
        executor.start(3.0)
    assert open_files() == before
    assert executor.pids == ()


@pytest.mark.parametrize(
    ("deed", "kind", "message"),
    [("fail", WorkerError, "worker 1 failed while it was starting: RuntimeError: no luck"),
     ("exit", WorkerDiedError, r"worker 1 died while it was starting \(exit code 7\)(.|\n)*something is wrong")],
)  # fmt: skip
def test_a_worker_that_cannot_start_is_a_named_error(deed: str, kind: type[WorkerError], message: str) -> None:
    executor = fake_executor(f"1 {deed}")
    with pytest.raises(kind, match=message):
        executor.start(START_S)
    assert executor.pids == ()


def test_a_program_that_is_not_there_is_a_named_error() -> None:
    executor = fake_executor()
    executor._program = ("/no/such/program",)
    with pytest.raises(WorkerError, match="no process could be started"):
        executor.start(START_S)


def test_workers_leave_ctrl_c_to_their_parent_and_stdout_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with started(fake_executor()) as executor:
        begin(executor, "0 print")
        for pid in executor.pids:
            os.kill(pid, signal.SIGINT)
        assert len(call(executor, STEP_1)) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "not for stdout" in captured.err


@pytest.mark.parametrize("prompt", ["0 hang", ""], ids=["killed", "forgetful"])
def test_no_worker_outlives_its_parent(tmp_path: Path, prompt: str) -> None:
    parent, pids = run_parent(tmp_path, prompt)
    with parent:
        assert len(pids) == 2
        if prompt:
            assert all(map(is_alive, pids))
            parent.kill()
        assert parent.wait(10.0) == (-signal.SIGKILL if prompt else 0)
    assert await_that(lambda: not any(map(is_alive, pids)), 5.0)


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="has no real-time signals")
def test_an_ending_by_a_signal_without_a_name_has_its_number() -> None:
    number = signal.SIGRTMIN + 1
    program = (sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})")
    link = ProcessLink(0, program=program, environment=os.environ)
    assert link.ending == f"signal {number}"
    link.close()


def test_each_worker_gets_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("pipedit.executor.local_processes.usable_cores", lambda: 5)
    assert worker_environment(2)["OMP_NUM_THREADS"] == "2"
    assert worker_environment(8)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert worker_environment(2)["OMP_NUM_THREADS"] == "3"


# -- under an engine ------------------------------------------------------------------------------------------------


def test_a_death_fails_what_had_begun_and_the_rest_gets_fresh_workers() -> None:
    executor = fake_executor()
    with Engine(device="cpu", num_workers=2, executor=executor) as engine:
        requests = [pipedit.VideoRequest(prompt=prompt, **SMALL) for prompt in ("1 exit", "fine")]
        for request in engine.prepare(requests):
            engine.submit(request)
        first_pids: list[int] = []
        endings: list[Failed | Finished] = []
        for update in engine.updates():
            if isinstance(update, Progress) and not first_pids:
                first_pids += executor.pids
            if isinstance(update, Failed | Finished):
                endings.append(update)
        assert [type(ending) for ending in endings] == [Failed, Finished]
        assert isinstance(endings[0], Failed)
        assert isinstance(endings[0].error, WorkerDiedError)
        assert not set(first_pids) & set(executor.pids)
        with pytest.raises(WorkerDiedError):
            list(engine.generate("0 exit", **SMALL))
        assert len(list(engine.generate("fine again", **SMALL))) == 1


def test_a_death_between_requests_costs_none() -> None:
    executor = fake_executor()
    with Engine(device="cpu", num_workers=2, executor=executor) as engine:
        assert len(list(engine.generate("one", **SMALL))) == 1
        os.kill(executor.pids[1], signal.SIGKILL)
        assert await_that(lambda: executor._links[1].has_ended, 5.0)
        assert len(list(engine.generate("two", **SMALL))) == 1


def test_one_rank_that_fails_while_the_other_waits_fails_its_request_only() -> None:
    with Engine(device="cpu", num_workers=2, executor=fake_executor(grace_s=0.5)) as engine:
        with pytest.raises(WorkerError, match="no luck") as caught:
            list(engine.generate("1 fail while others hang", **SMALL))
        assert type(caught.value) is WorkerError
        assert caught.value.rank == 1
        assert len(list(engine.generate("fine", **SMALL))) == 1


def test_seconds_are_those_of_one_rank_and_not_of_all_together() -> None:
    with Engine(device="cpu", num_workers=2, executor=fake_executor()) as engine:
        (video,) = engine.generate("fine", **SMALL)
        spans = [span for span in engine.timeline().spans if span.what == "step"]
    assert {span.rank for span in spans} == {0, 1}
    assert video.seconds["step"] == pytest.approx(sum(span.duration_s for span in spans if span.rank == 0))


def test_cancel_stops_within_one_step() -> None:
    with Engine(device="cpu", num_workers=2, executor=fake_executor()) as engine:
        (request,) = engine.prepare([pipedit.VideoRequest(prompt="long", **SMALL | {"num_inference_steps": 50})])
        request_id, steps = engine.submit(request), 0
        for update in engine.updates():
            steps += isinstance(update, Progress) and update.stage == "denoise"
            engine.cancel(request_id)
        assert steps <= 1


# -- errors travel --------------------------------------------------------------------------------------------------

SPAN = Span(request_id="a", rank=1, role="denoiser", what="step", start_s=1.0, end_s=2.0, index=4)


@pytest.mark.parametrize(
    "error",
    [
        PipeditError("plain"),
        InvalidRequestError(["one", "two"]),
        WorkerError("broken", rank=3, doing="denoising"),
        WorkerDiedError("exit code 1", rank=2, doing="decoding", last_span=SPAN, output=("a", "b")),
    ],
)
def test_errors_survive_pickling(error: PipeditError) -> None:
    error.add_note("where it was")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)
