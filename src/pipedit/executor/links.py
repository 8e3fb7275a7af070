"""Ranks at the far ends of connections: commands out, events in, and what happens when one of them fails or dies.

Knows neither how ranks are started nor what they compute. No shared memory is used: commands, events and frames travel
through sockets, which the system closes with the processes.
"""

import abc
import contextlib
import dataclasses
import os
import queue
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from pipedit.core.errors import WorkerDiedError, WorkerError
from pipedit.core.messages import Command, CommandFailed, Event, Exchanging
from pipedit.core.spans import Span
from pipedit.worker.failures import doing
from pipedit.worker.service import STARTING, Ready, StartFailed, Stop

GRACE_S = 5.0  # how long the other ranks of a command may stay silent after one of them has failed
_LOOK_S = 1.0  # how often to look after processes whose connection somebody else may hold open
_EXIT_S = 2.0  # from the end of a connection to the end of its process
_TERM_S = 1.0
_GLANCE_S = 0.2  # how long a death may take to show after somebody else has felt it


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Gone:
    """The connection has ended; `reason` is empty where it was just closed."""

    reason: str = ""


class Link:
    """One rank as its controller sees it: a socket, and a thread that reads from it."""

    def __init__(self, rank: int, end: socket.socket) -> None:
        self.rank, self._socket = rank, end
        self.connection: Connection[Any, Any] = Connection(os.dup(end.fileno()))
        self.gone: _Gone | None = None
        self.clock_offset_s = 0.0  # our clock minus the rank's
        self._reader: threading.Thread | None = None

    def begin(self, inbox: "queue.SimpleQueue[tuple[Link, Any]]") -> None:
        """From now on messages go to the inbox. Reading in the background keeps ranks from waiting for us, and a
        message whole when Ctrl-C comes."""
        self._reader = threading.Thread(target=self._read, args=(inbox,), name=f"worker {self.rank}", daemon=True)
        self._reader.start()

    def _read(self, inbox: "queue.SimpleQueue[tuple[Link, Any]]") -> None:
        while self.gone is None:
            try:
                message = self.connection.recv()
            except (EOFError, OSError):
                message = self.gone = _Gone()
            except Exception as error:  # noqa: BLE001 - unpickling can raise anything
                message = self.gone = _Gone(reason=f"sent what cannot be read, {type(error).__name__}: {error}")
            inbox.put((self, message))

    def send(self, message: Any) -> None:
        """Does nothing if the rank is gone: the reader tells of that."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the reader
        if self._reader is not None:
            self._reader.join(_EXIT_S)
        self.connection.close()
        self._socket.close()

    # -- what a rank's process adds -----------------------------------------------------------------------------

    @property
    def has_ended(self) -> bool:
        return self.gone is not None

    @property
    def ending(self) -> str:
        """How it ended. May wait for a moment until that is known."""
        return (self.gone and self.gone.reason) or "its connection was closed; its own output may say why"

    @property
    def output(self) -> tuple[str, ...]:
        """The last lines that it wrote to stderr, as far as they come here."""
        return ()

    def wait(self, timeout_s: float) -> bool:
        """Waits until the rank has left; False if it has not."""
        if self._reader is not None:
            self._reader.join(max(timeout_s, 0.0))
        return self.has_ended

    def terminate(self) -> None:
        """The hang-up makes a rank elsewhere end itself."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        self.terminate()


@dataclasses.dataclass(kw_only=True)
class _Failing:
    """A command that one rank has failed at while others still owe their answer. What came in is held back: if another
    rank has died, that explains the failure and not the other way round."""

    until_s: float
    held: list[Event] = dataclasses.field(default_factory=list)


class LinkedExecutor(abc.ABC):
    """An `Executor` over links. A rank has at most one command in flight."""

    # A worker in the midst of a command reads `Stop` only after it. Nobody waits for its answer, so it is just ended.
    _patience_with_busy_s = 0.5

    def __init__(self, *, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s
        self._links: list[Link] = []  # in the order of ranks
        self._inbox: queue.SimpleQueue[tuple[Link, Any]] = queue.SimpleQueue()
        self._in_flight: dict[int, Command] = {}
        self._failing: dict[str, _Failing] = {}
        self._last_spans: dict[int, Span] = {}
        self._is_up = False
        self._lost: WorkerDiedError | None = None  # to be raised by the next call
        # Whoever forgets to stop us leaves no processes behind, at the end of the interpreter either.
        self._finalizer = weakref.finalize(self, _end_of, self._links, os.getpid())

    @abc.abstractmethod
    def _open_links(self, deadline_s: float) -> None:
        """Appends a link for each rank to `self._links`, one by one as they come up, and sends each its WorkerSpec."""

    # -- the contract -------------------------------------------------------------------------------------------

    def start(self, timeout_s: float) -> Sequence[Span]:
        assert not self._links, "stop the executor before it is started again"
        self._forget()
        deadline_s = time.monotonic() + timeout_s
        try:
            self._open_links(deadline_s)
            for link in self._links:
                link.begin(self._inbox)
            spans = self._await_ready(deadline_s, timeout_s)
        except BaseException:
            self._end(0.0)
            raise
        self._is_up = True
        return spans

    def check(self) -> None:
        if self._lost is None:
            ended = self._ended()
            if ended is None:
                return
            self._bury(ended)
        self._raise_lost()

    def send(self, command: Command) -> None:
        for link in self._links:
            if link.rank in command.ranks:
                assert link.rank not in self._in_flight, (command, self._in_flight[link.rank])
                self._in_flight[link.rank] = command
                link.send(command)

    def receive(self, timeout_s: float) -> Sequence[Event]:
        deadline_s = time.monotonic() + timeout_s
        while True:
            if self._lost is not None:
                self._raise_lost()
            now_s = time.monotonic()
            if events := self._give_up_waiting(now_s):
                return events
            soonest_s = min([deadline_s, now_s + _LOOK_S, *(failing.until_s for failing in self._failing.values())])
            try:
                link, message = self._inbox.get(timeout=max(soonest_s - now_s, 0.0))
            except queue.Empty:
                self.check()
                if time.monotonic() >= deadline_s:
                    return ()
                continue
            if isinstance(message, _Gone):
                self._bury(link)
            elif events := self._take(link, message):
                return events

    def stop(self, timeout_s: float) -> None:
        patience_s = max(timeout_s - _TERM_S, 0.0)
        self._end(min(patience_s, self._patience_with_busy_s) if self._in_flight else patience_s)
        self._forget()

    # -- inside -------------------------------------------------------------------------------------------------

    def _await_ready(self, deadline_s: float, timeout_s: float) -> list[Span]:
        spans: dict[int, tuple[Span, ...]] = {}
        while len(spans) < len(self._links):
            try:
                link, message = self._inbox.get(timeout=min(max(deadline_s - time.monotonic(), 0.0), _LOOK_S))
            except queue.Empty:
                if time.monotonic() >= deadline_s:
                    raise not_ready([link for link in self._links if link.rank not in spans], timeout_s) from None
                if any(link.has_ended for link in self._links):
                    self.check()
                continue
            match message:
                case Ready():
                    spans[link.rank] = _shifted(message.spans, link.clock_offset_s)
                case StartFailed():
                    raise message.error
                case _:
                    self._bury(link)
                    self._raise_lost()
        return [span for rank in sorted(spans) for span in spans[rank]]

    def _take(self, link: Link, event: Event) -> Sequence[Event]:
        """What may be told of now that this has come in."""
        event = dataclasses.replace(event, spans=_shifted(event.spans, link.clock_offset_s))
        if event.spans:
            self._last_spans[link.rank] = event.spans[-1]
        command, request_id = self._in_flight.pop(link.rank), event.request_id
        if isinstance(event, CommandFailed) and isinstance(command, Exchanging) and request_id not in self._failing:
            self._failing[request_id] = _Failing(until_s=time.monotonic() + self._grace_s)
        if request_id not in self._failing:
            return (event,)
        self._failing[request_id].held.append(event)
        if self._silent(request_id):
            return ()
        held = self._failing.pop(request_id).held
        if (dead := self._glance()) is None:
            return held
        self._bury(dead)
        return ()

    def _glance(self) -> Link | None:
        """A rank that has just died. It may have taken no part in a command that failed, and yet be the reason: others
        fetch from it, and rank 0 keeps the store by which they meet."""
        until_s = time.monotonic() + _GLANCE_S
        while (dead := self._ended()) is None and time.monotonic() < until_s:
            time.sleep(_GLANCE_S / 20)
        return dead

    def _ended(self) -> Link | None:
        return next((link for link in self._links if link.has_ended), None)

    def _silent(self, request_id: str) -> list[int]:
        """Ranks that still owe an answer for the request."""
        return [rank for rank, command in self._in_flight.items() if command.request_id == request_id]

    def _give_up_waiting(self, now_s: float) -> Sequence[Event]:
        """Ranks that wait for one that has failed never answer: after a grace all are stopped. Returns what was held
        back; the loss is raised by the next call."""
        for request_id, failing in self._failing.items():
            if now_s >= failing.until_s:
                rank, failed = self._silent(request_id)[0], failing.held[0].rank
                why = f"stopped, because it gave no answer within {self._grace_s:g} s after worker {failed} had failed"
                self._lose(self._links[rank], why)
                return failing.held
        return ()

    def _bury(self, link: Link) -> None:
        self._lose(link, link.ending, link.output)

    def _lose(self, link: Link, ending: str, output: Sequence[str] = ()) -> None:
        """Stops every rank, and remembers why."""
        command = self._in_flight.get(link.rank)
        self._lost = WorkerDiedError(
            ending,
            rank=link.rank,
            doing=doing(command) if command is not None else "waiting for work" if self._is_up else STARTING,
            last_span=self._last_spans.get(link.rank),
            output=output,
        )
        self._end(0.0)

    def _raise_lost(self) -> NoReturn:
        lost, self._lost = self._lost, None
        assert lost is not None
        self._forget()
        raise lost

    def _forget(self) -> None:
        self._in_flight.clear()
        self._failing.clear()
        self._last_spans.clear()
        self._inbox = queue.SimpleQueue()
        self._is_up, self._lost = False, None

    def _end(self, polite_s: float) -> None:
        _end_links(self._links, polite_s)


def not_ready(links: Sequence[Link], timeout_s: float) -> WorkerError:
    """The error for ranks that did not come up in time."""
    ranks = [link.rank for link in links]
    named = f"worker {ranks[0]} was" if len(ranks) == 1 else f"workers {', '.join(map(str, ranks))} were"
    lines = [f"{named} not ready within {timeout_s:g} s"]
    for link in links:
        if link.output:
            lines += [f"worker {link.rank} wrote:", *(f"  {line}" for line in link.output)]
    return WorkerError("\n".join(lines), rank=ranks[0], doing=STARTING)


def _shifted(spans: Sequence[Span], offset_s: float) -> tuple[Span, ...]:
    if not offset_s:
        return tuple(spans)
    return tuple(dataclasses.replace(s, start_s=s.start_s + offset_s, end_s=s.end_s + offset_s) for s in spans)


def _end_links(links: list[Link], polite_s: float) -> None:
    """Asks every rank to leave, then makes it; empties the list."""
    try:
        if polite_s > 0:
            for link in links:
                link.send(Stop())
            _wait_for(links, polite_s)
        if remaining := [link for link in links if not link.wait(0.0)]:
            for link in remaining:
                link.terminate()
            _wait_for(remaining, _TERM_S)
    finally:  # an impatient second Ctrl-C leaves nobody behind either
        for link in links:
            link.kill()
        _wait_for(links, _EXIT_S)
        for link in links:
            link.close()
        links.clear()


def _wait_for(links: Sequence[Link], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    for link in links:
        link.wait(deadline_s - time.monotonic())


def _end_of(links: list[Link], owner: int) -> None:
    """For an executor that nobody has stopped. A forked child of its owner must not do it."""
    if os.getpid() == owner:
        _end_links(links, 1.0)
