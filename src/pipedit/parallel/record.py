"""What a strategy did and when: attention, waits, and transfers in the background, for pictures and for benches.

Off unless asked for, and then it costs nothing. Times are those of the host's clock, so it is for CPU ranks; on CUDA
the work runs behind the host's back and a profiler sees more.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator

from pipedit.parallel.channel import Pending


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """`what` is "attention", "wait", "input exchange" or "output exchange"; times in seconds."""

    what: str
    chunk: int
    start_s: float
    end_s: float
    payload_bytes: int = 0


class Record:
    """Collects entries while it has a clock."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock
        self.entries: list[Entry] = []

    @contextlib.contextmanager
    def measure(self, what: str, chunk: int) -> Iterator[None]:
        if self._clock is None:
            yield
            return
        start = self._clock()
        yield
        self.entries.append(Entry(what=what, chunk=chunk, start_s=start, end_s=self._clock()))

    def watch(self, pending: Pending, what: str, chunk: int, payload_bytes: int) -> Pending:
        """The same transfer; while recording, a thread waits for it, to see when it was really there."""
        if self._clock is None or payload_bytes == 0:
            return pending
        return _Watched(
            pending,
            self,
            self._clock,
            Entry(what=what, chunk=chunk, start_s=self._clock(), end_s=0.0, payload_bytes=payload_bytes),
        )


class _Watched(Pending):
    def __init__(self, pending: Pending, record: Record, clock: Callable[[], float], entry: Entry) -> None:
        super().__init__()
        self._pending, self._record, self._clock, self._entry = pending, record, clock, entry
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def wait_received(self) -> None:
        self._thread.join()

    def wait(self) -> None:
        self._thread.join()
        self._pending.wait()

    def _watch(self) -> None:
        self._pending.wait_received()
        self._record.entries.append(dataclasses.replace(self._entry, end_s=self._clock()))
