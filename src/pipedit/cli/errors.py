"""From what went wrong to what people read and scripts test: one report, one exit code.

0    done                          2    the input is wrong: every problem is listed
1    it failed                     130  interrupted (Ctrl-C); 128 + N for signal N, such as 143 for SIGTERM
"""

import contextlib
import dataclasses
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import typer

from pipedit.cli.console import Session
from pipedit.core.errors import (
    InsufficientMemoryError,
    InvalidRequestError,
    PipeditError,
    WorkerDiedError,
    WorkerError,
)

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_DEBUG_HINT = "pipedit --debug ... shows where it happened"
_STOPPING_SIGNALS = ("SIGTERM", "SIGHUP")  # by name: Windows lacks the second


class StoppedError(BaseException):
    """A signal asked the process to end. Like KeyboardInterrupt, no error of the work: nothing may swallow it."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What went wrong, in full sentences, and what to do about it where that is not said there."""

    kind: str
    messages: tuple[str, ...]
    hints: tuple[str, ...] = ()
    exit_code: int = FAILED

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "messages": list(self.messages),
            "hints": list(self.hints),
            "exit_code": self.exit_code,
        }


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Inside, the signals that end processes raise StoppedError, so that half-written files are removed."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise StoppedError(number)

    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    numbers = [getattr(signal, name) for name in _STOPPING_SIGNALS if hasattr(signal, name)]
    # What the parent process has set to be ignored (nohup) stays ignored.
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe(error: BaseException) -> Problem:
    """What to tell about an exception that ended a command."""
    match error:
        case InvalidRequestError():
            return Problem(kind="bad_input", messages=error.problems, exit_code=BAD_INPUT)
        case InsufficientMemoryError():
            return Problem(kind="memory", messages=tuple(str(error).splitlines()))
        case WorkerDiedError():  # a traceback would show where we waited for it, and not what it was at
            return Problem(kind="worker", messages=(str(error),))
        case WorkerError():
            return Problem(kind="worker", messages=(str(error),), hints=(_DEBUG_HINT,))
        case PipeditError():
            kind = "failure" if type(error) is PipeditError else type(error).__name__.removesuffix("Error").lower()
            return Problem(kind=kind, messages=tuple(str(error).splitlines()))
        case typer.TyperException():
            return _usage(error)
        case KeyboardInterrupt():
            return Problem(kind="interrupted", messages=("interrupted",), exit_code=INTERRUPTED)
        case StoppedError():
            return Problem(kind="interrupted", messages=(f"stopped by {error}",), exit_code=128 + error.number)
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Problem(kind="unexpected", messages=(said,), hints=(_DEBUG_HINT,))


def together(problems: Sequence[Problem]) -> Problem:
    """Several problems as one, which ends like the first."""
    return dataclasses.replace(
        problems[0],
        messages=tuple(message for problem in problems for message in problem.messages),
        hints=tuple(dict.fromkeys(hint for problem in problems for hint in problem.hints)),
    )


def tell(problem: Problem, session: Session) -> None:
    """On stderr for people and, with --json, in the document for scripts."""
    for message in problem.messages:
        session.terminal.error(message)
    for hint in problem.hints:
        session.terminal.hint(hint)
    session.report["error"] = problem.as_json()


def show_traceback(error: BaseException, session: Session) -> None:
    session.terminal.err.print("".join(traceback.format_exception(error)), end="", soft_wrap=True)


def _usage(error: typer.TyperException) -> Problem:
    """A command line that cannot be understood. Typer's sentence, in our form."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "pipedit"
    # Empty: a group without a command, whose help is already on the screen.
    message = error.format_message().removesuffix(".") or f"{command} needs a command"
    hints = [f"see {command} --help"]
    unknown = getattr(error, "option_name", "--")
    if command.endswith("generate") and (not unknown.startswith("--") or any(c.isspace() for c in unknown)):
        hints.insert(0, f'put -- before a prompt that begins with a dash: {command} -- "-10 degrees"')
    return Problem(
        kind="bad_input",
        messages=(message[:1].lower() + message[1:],),
        hints=tuple(hints),
        exit_code=BAD_INPUT,
    )
