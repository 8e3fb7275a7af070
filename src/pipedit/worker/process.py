"""The life of a process that is nothing but a worker: its signals, its link, and its end when the parent is gone."""

import argparse
import contextlib
import gc
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from pipedit.core.spans import Span
from pipedit.worker.service import Build, Servant, build_worker, serve

ABANDONED = 3  # exit code of a worker whose controller went away
_POLL_MS = 500


def run_process(arguments: Sequence[str], build: Build = build_worker) -> NoReturn:
    """Serves on the link that was inherited as an open file (`--link NUMBER`), then ends the process."""
    # Ctrl-C in a terminal goes to every process there. The parent decides what it means, and stops us if it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="pipedit.worker", description="A worker; started by pipedit, not by people.")
    parser.add_argument("--link", type=int, required=True)
    number = parser.parse_args(arguments).link
    os.set_inheritable(number, False)
    link: Connection[Any, Any] = Connection(number)
    HangUpWatch(number, parent=os.getppid()).start()
    gc.disable()  # imports and loading make millions of objects that stay; searching among them finds nothing
    try:
        has_started = serve(link, lambda spec: _Settling(build(spec)))
    except (EOFError, ConnectionError):
        end_abandoned()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if has_started else 1)  # memory goes back with the process; object by object it would take a second


def end_abandoned() -> NoReturn:
    """Ends this process at once, because nobody is left who would give it work."""
    with contextlib.suppress(OSError):  # who read stderr may be gone too
        os.write(2, b"pipedit: a worker ends, because the process that it worked for is gone\n")
    os._exit(ABANDONED)


class HangUpWatch(threading.Thread):
    """Ends this process as soon as the other end of a link is gone, whatever the main thread is at: computing, or
    waiting for another rank. torch releases the interpreter lock in both.

    `parent` is the process that started us, where that is who holds the other end: a copy of the link in a forked
    child of it then keeps nobody alive.
    """

    def __init__(self, link: int, *, parent: int | None = None) -> None:
        super().__init__(name="hang-up watch", daemon=True)
        self._link, self._parent = link, parent
        self._over = threading.Event()

    def run(self) -> None:
        poller = select.poll()
        # Linux tells with RDHUP that the other end of a network link was closed; HUP is always told.
        poller.register(self._link, getattr(select, "POLLRDHUP", 0))
        while not self._over.is_set():
            is_gone = bool(poller.poll(_POLL_MS)) or (self._parent is not None and os.getppid() != self._parent)
            if is_gone and not self._over.is_set():
                end_abandoned()

    def end(self) -> None:
        """Call before the link is closed on this side."""
        self._over.set()
        self.join(2 * _POLL_MS / 1000)


class _Settling:
    """A worker after whose loading garbage is collected again, without ever looking at what was there before."""

    def __init__(self, worker: Servant) -> None:
        self._worker, self.handle, self.recover, self.close = worker, worker.handle, worker.recover, worker.close

    def load(self) -> tuple[Span, ...]:
        spans = self._worker.load()
        gc.freeze()
        gc.enable()
        return spans
