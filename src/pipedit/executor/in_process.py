"""One rank in the caller's own process and thread: the simplest executor, and the one for a laptop."""

import collections
import traceback
from collections.abc import Sequence

from pipedit.core import messages
from pipedit.core.errors import CancelledError, PipeditError, WorkerError
from pipedit.core.messages import Command, CommandFailed, Event
from pipedit.core.spans import Span
from pipedit.worker.worker import Worker

_DOING = {
    messages.Encode: "encoding the prompt",
    messages.Denoise: "denoising",
    messages.Decode: "decoding",
    messages.Release: "releasing a request",
}


class InProcessExecutor:
    """Runs one waiting command each time `receive` is called. Nothing happens in the background."""

    def __init__(self, worker: Worker) -> None:
        self._worker: Worker | None = worker
        self._waiting: collections.deque[Command] = collections.deque()
        self._interrupted: collections.deque[Event] = collections.deque()

    def start(self, timeout_s: float) -> Sequence[Span]:
        assert self._worker is not None, "the executor was stopped"
        return self._worker.load()

    def send(self, command: Command) -> None:
        assert command.ranks == (0,), command
        self._waiting.append(command)

    def receive(self, timeout_s: float) -> Sequence[Event]:
        assert self._worker is not None, "the executor was stopped"
        if self._interrupted:
            return (self._interrupted.popleft(),)
        assert self._waiting, "receive without a command would wait for ever"
        command = self._waiting.popleft()
        try:
            return (self._worker.handle(command),)
        except Exception as error:  # noqa: BLE001 - any failure of the work belongs to its request
            return (_failed(command, error),)
        except BaseException:
            # Ctrl-C in mid-command: the caller hears of it now, the scheduler as soon as it asks again.
            self._interrupted.append(_failed(command, CancelledError("interrupted")))
            raise

    def stop(self, timeout_s: float) -> None:
        self._worker = None
        self._waiting.clear()
        self._interrupted.clear()


def _failed(command: Command, error: Exception) -> CommandFailed:
    doing = _DOING[type(command)]
    # Whoever keeps the error must not keep the tensors of the stage that failed.
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    if not isinstance(error, PipeditError):
        original, error = error, WorkerError(f"{type(error).__name__}: {error}", rank=0, doing=doing)
        error.__cause__ = original
    return CommandFailed(request_id=command.request_id, rank=0, doing=doing, error=error)
