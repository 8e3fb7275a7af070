"""What a strategy did and when, as spans: attention, waits, and transfers in the background.

Off unless asked for, and then it costs nothing. Times are those of the host's clock, so it is for CPU ranks; on CUDA
the work runs behind the host's back and a profiler sees more.
"""

import contextlib
import dataclasses
import datetime
import threading
from collections.abc import Callable, Iterator

from pipedit.core.spans import Span
from pipedit.parallel.channel import Pending


class Record:
    """Collects spans while it has a clock. Their role is "compute" ("attention", "wait") or "network" ("input
    exchange", "output exchange", with the bytes that come in or go out), their index the chunk."""

    def __init__(self, clock: Callable[[], float] | None = None, *, rank: int = 0) -> None:
        self._clock, self._rank = clock, rank
        self.spans: list[Span] = []

    @contextlib.contextmanager
    def measure(self, what: str, chunk: int) -> Iterator[None]:
        if self._clock is None:
            yield
            return
        start_s = self._clock()
        yield
        self.spans.append(dataclasses.replace(self._begun("compute", what, chunk, start_s), end_s=self._clock()))

    def watch(self, pending: Pending, what: str, chunk: int, payload_bytes: int) -> Pending:
        """The same transfer; while recording, a thread waits for it, to see when it was really there."""
        if self._clock is None or payload_bytes == 0:
            return pending
        span = self._begun("network", what, chunk, self._clock(), payload_bytes)
        return _Watched(pending, self.spans, self._clock, span)

    def _begun(self, role: str, what: str, chunk: int, start_s: float, payload_bytes: int = 0) -> Span:
        return Span(
            request_id="", rank=self._rank, role=role, what=what, start_s=start_s, end_s=start_s, index=chunk,
            payload_bytes=payload_bytes,
        )  # fmt: skip


class _Watched(Pending):
    def __init__(self, pending: Pending, spans: list[Span], clock: Callable[[], float], span: Span) -> None:
        super().__init__()
        self._pending, self._spans, self._clock, self._span = pending, spans, clock, span
        self._error: RuntimeError | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def wait_received(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def wait(self, limit: datetime.timedelta | None = None) -> None:
        self.wait_received()
        self._pending.wait(limit)

    def _watch(self) -> None:
        try:
            self._pending.wait_received()
        except RuntimeError as error:  # what torch.distributed raises; for whoever waits
            self._error = error
        else:
            self._spans.append(dataclasses.replace(self._span, end_s=self._clock()))
