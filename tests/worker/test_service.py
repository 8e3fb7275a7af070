"""The serve loop leaves its worker closed, however it ends."""

import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pipedit.core import messages
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.core.spans import Span
from pipedit.models.adapter import Precision
from pipedit.worker.service import Ready, StartFailed, Stop, WorkerSpec, serve
from pipedit.worker.settings import WorkerSettings

FLOAT32 = Precision(text_encoder="float32", transformer="float32", vae="float32")
SPEC = WorkerSpec(
    model="",
    settings=WorkerSettings(device="cpu", precision=FLOAT32),
    rank=1,
    placement=Placement.colocated(2),
    key=b"secret",
)
RELEASE = messages.Release(request_id="a", ranks=(1,))
FAILING = messages.Decode(request_id="a", ranks=(0, 1), request=VideoRequest(prompt=""), chunk=0)


class Noting:
    """A worker that notes what happens to it."""

    def __init__(self, fails: bool) -> None:
        self._fails = fails
        self.done: list[str] = []
        self.may_recover = threading.Event()

    def load(self) -> tuple[Span, ...]:
        if self._fails:
            raise RuntimeError("no luck")
        return ()

    def handle(self, command: messages.Command) -> messages.Event:
        self.done.append("handle")
        if isinstance(command, messages.Decode):
            raise RuntimeError("no luck")
        return messages.Released(request_id=command.request_id, rank=1)

    def recover(self) -> None:
        self.done.append("recover")
        self.may_recover.wait(10.0)

    def close(self) -> None:
        self.done.append("close")


def talk(worker: Noting, say: Callable[[Any], None]) -> list[Any]:
    """What `serve` returns or raises, while `say` holds the other end of its link."""
    ours, theirs = multiprocessing.Pipe()
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(serve(theirs, lambda _spec: worker))
        except EOFError as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    ours.send(SPEC)
    say(ours)
    ours.close()
    thread.join(10.0)
    theirs.close()
    return result


def test_a_worker_is_closed_when_it_is_stopped() -> None:
    def say(link: Any) -> None:
        assert isinstance(link.recv(), Ready)
        link.send(RELEASE)
        assert isinstance(link.recv(), messages.Released)
        link.send(Stop())

    worker = Noting(fails=False)
    assert talk(worker, say) == [True]
    assert worker.done == ["handle", "close"]


def test_a_failure_is_told_of_before_others_are_let_down() -> None:
    worker = Noting(fails=False)

    def say(link: Any) -> None:
        assert isinstance(link.recv(), Ready)
        link.send(FAILING)
        assert link.poll(10.0)
        assert isinstance(link.recv(), messages.CommandFailed), "though it has not recovered yet"
        worker.may_recover.set()
        link.send(RELEASE)
        assert isinstance(link.recv(), messages.Released)
        link.send(Stop())

    assert talk(worker, say) == [True]
    assert worker.done == ["handle", "recover", "handle", "close"]


def test_a_worker_is_closed_when_the_other_end_is_gone() -> None:
    worker = Noting(fails=False)
    (error,) = talk(worker, lambda link: link.recv())
    assert isinstance(error, EOFError)
    assert worker.done == ["close"]


def test_a_worker_that_cannot_load_is_closed() -> None:
    def say(link: Any) -> None:
        failed = link.recv()
        assert isinstance(failed, StartFailed)
        assert "no luck" in str(failed.error)

    worker = Noting(fails=True)
    assert talk(worker, say) == [False]
    assert worker.done == ["close"]


@pytest.mark.parametrize("shown", [repr, str])
def test_the_key_is_not_shown(shown: Callable[[object], str]) -> None:
    assert "secret" not in shown(SPEC)
