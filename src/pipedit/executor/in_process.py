"""One rank in the caller's own process and thread: the simplest executor, and the one for a laptop."""

import collections
from collections.abc import Sequence

from pipedit.core.errors import CancelledError
from pipedit.core.messages import Command, Event
from pipedit.core.spans import Span
from pipedit.worker.failures import command_failed
from pipedit.worker.service import Servant

_RANK = 0


class InProcessExecutor:
    """Runs one waiting command each time `receive` is called. Nothing happens in the background."""

    def __init__(self, worker: Servant) -> None:
        self._worker: Servant | None = worker
        self._waiting: collections.deque[Command] = collections.deque()
        self._interrupted: collections.deque[Event] = collections.deque()

    def start(self, timeout_s: float) -> Sequence[Span]:
        assert self._worker is not None, "the executor was stopped"
        return self._worker.load()

    def check(self) -> None:
        """The worker lives as long as this process."""

    def send(self, command: Command) -> None:
        assert command.ranks == (_RANK,), command
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
            return (command_failed(command, _RANK, error),)
        except BaseException:
            # Ctrl-C in mid-command: the caller hears of it now, the scheduler as soon as it asks again.
            self._interrupted.append(command_failed(command, _RANK, CancelledError("interrupted")))
            raise

    def stop(self, timeout_s: float) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None
        self._waiting.clear()
        self._interrupted.clear()
