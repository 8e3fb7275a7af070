"""Every error that pipedit raises on purpose.

PipeditError
├── InvalidRequestError (also ValueError)   the input is wrong; lists every problem at once (CLI exit 2, HTTP 4xx)
├── CheckpointError                         files of a model are missing, broken or of a refused kind
├── InsufficientMemoryError                 the work does not fit; says what would
├── NonFiniteError                          the model computed infinities or no numbers at all
├── CancelledError                          somebody cancelled the request
└── WorkerError                             a worker failed; carries its rank and what it was doing
"""

from collections.abc import Sequence


class PipeditError(Exception):
    """Base of all errors that pipedit raises on purpose."""


class InvalidRequestError(PipeditError, ValueError):
    """The input is wrong. `problems` holds every problem, one sentence each, in the user's words."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(PipeditError):
    """Files of a model are missing, broken, or of a kind that is refused (pickle)."""


class InsufficientMemoryError(PipeditError):
    """The work does not fit into memory. The message says how much is missing and what would fit."""


class NonFiniteError(PipeditError):
    """The model computed values that are infinite or not a number. The message says what to try."""


class CancelledError(PipeditError):
    """The request was cancelled before it was done."""


class WorkerError(PipeditError):
    """A worker failed while it handled a command."""

    def __init__(self, message: str, *, rank: int, doing: str) -> None:
        self.rank, self.doing = rank, doing
        super().__init__(f"worker {rank} failed while it was {doing}: {message}")
