"""The executor contract: how the engine starts ranks, sends them commands and hears from them."""

from collections.abc import Sequence
from typing import Protocol

from pipedit.core.messages import Command, Event
from pipedit.core.spans import Span


class Executor(Protocol):
    """Commands go down, events come up; one event for each rank that a command names. Every wait has a limit."""

    def start(self, timeout_s: float) -> Sequence[Span]:
        """Starts and loads every rank; returns their "load" spans. Called before anything else, and again, for fresh
        ranks, after a WorkerDiedError. Raises PipeditError where a rank cannot start or load, or takes too long; then
        none is left."""

    def check(self) -> None:
        """Raises WorkerDiedError if a rank has ended that nobody asked to. Does not wait."""

    def send(self, command: Command) -> None:
        """Hands the command to every rank in `command.ranks`. Does not wait for it to be done."""

    def receive(self, timeout_s: float) -> Sequence[Event]:
        """Events that have come in; waits for the first one for at most `timeout_s`, then returns an empty sequence.

        Raises WorkerDiedError within 5 s of the death of a rank. All ranks are stopped then, and what was in flight
        gets no answer."""

    def stop(self, timeout_s: float) -> None:
        """Ends every rank and frees what it held. Can be called twice."""
