"""Every error that pipedit raises on purpose.

PipeditError
├── InvalidRequestError (also ValueError)   the input is wrong; lists every problem at once (CLI exit 2, HTTP 4xx)
├── CheckpointError                         files of a model are missing, broken or of a refused kind
├── InsufficientMemoryError                 the work does not fit; says what would
├── NonFiniteError                          the model computed infinities or no numbers at all
├── CancelledError                          somebody cancelled the request
└── WorkerError                             a worker failed; carries its rank and what it was doing
    └── WorkerDiedError                     its process is gone, and with it every request under way

All of them survive pickling, because they come from other processes too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from pipedit.core.spans import Span


class PipeditError(Exception):
    """Base of all errors that pipedit raises on purpose."""


class InvalidRequestError(PipeditError, ValueError):
    """The input is wrong. `problems` holds every problem, one sentence each, in the user's words."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,), _notes(self)


class CheckpointError(PipeditError):
    """Files of a model are missing, broken, or of a kind that is refused (pickle)."""


class InsufficientMemoryError(PipeditError):
    """The work does not fit into memory. The message says how much is missing and what would fit."""


class NonFiniteError(PipeditError):
    """The model computed values that are infinite or not a number. The message says what to try."""


class CancelledError(PipeditError):
    """The request was cancelled before it was done."""


class SnapshotError(PipeditError):
    """A run cannot be saved, or what was saved of one is torn, foreign, or of something else. The message names the
    file and says what to do."""


class WorkerError(PipeditError):
    """A worker failed while it handled a command."""

    def __init__(self, message: str, *, rank: int, doing: str) -> None:
        self.message, self.rank, self.doing = message, rank, doing
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        return f"worker {self.rank} failed while it was {self.doing}: {self.message}"

    def __reduce__(self) -> tuple[Any, ...]:
        return self._maker(), (self.message,), _notes(self)

    def _maker(self) -> Callable[[str], "WorkerError"]:
        return functools.partial(type(self), rank=self.rank, doing=self.doing)


class WorkerDiedError(WorkerError):
    """A worker is gone. `ending` says how (an exit code, a signal's name, ...), `last_span` is the last piece of work
    that it finished, `output` the last lines that it wrote to stderr."""

    def __init__(
        self, ending: str, *, rank: int, doing: str, last_span: Span | None = None, output: Sequence[str] = ()
    ) -> None:
        self.last_span, self.output = last_span, tuple(output)
        super().__init__(ending, rank=rank, doing=doing)

    @property
    def ending(self) -> str:
        return self.message

    def _sentence(self) -> str:
        parts = [f"worker {self.rank} died while it was {self.doing} ({self.ending})"]
        if self.last_span is not None:
            index = "" if self.last_span.index is None else f" {self.last_span.index}"
            parts.append(f"the last thing that it finished was {self.last_span.what}{index}")
        said = ["; ".join(parts)]
        if self.output:
            said.append("its last words were:")
        return "\n".join([*said, *(f"  {line}" for line in self.output)])

    def _maker(self) -> Callable[[str], WorkerError]:
        return functools.partial(
            type(self), rank=self.rank, doing=self.doing, last_span=self.last_span, output=self.output
        )


def _notes(error: BaseException) -> dict[str, Any] | None:
    notes = getattr(error, "__notes__", None)
    return {"__notes__": notes} if notes else None
