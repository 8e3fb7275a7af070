"""Workers in processes of their own, of which one is killed (SIGKILL) at a chosen moment. For checks and tests.

Knows neither why a moment was chosen nor what should come of it.
"""

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from pipedit.core.errors import WorkerDiedError
from pipedit.core.messages import Command, Event
from pipedit.core.placement import Placement
from pipedit.core.spans import Span
from pipedit.executor.links import GRACE_S
from pipedit.executor.local_processes import WORKER_PROGRAM, LocalProcessExecutor
from pipedit.worker.settings import WorkerSettings

_LOOK_S = 0.005
_PATIENCE_S = 30.0  # for a process that is to be killed to be there, and to be gone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strike:
    """Kill `rank`, `delay_s` after a command of which `is_moment` holds was sent; `skip`: after so many others of them.
    `is_moment` None: after the workers were told to start."""

    rank: int
    delay_s: float
    is_moment: Callable[[Command], bool] | None
    skip: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Death:
    """A loss of workers, as the executor's caller learnt of it: `after_s` later, from the kill or from when it asked
    first after it. `command` is what the rank that is blamed was at, None if at nothing."""

    error: WorkerDiedError
    command: Command | None
    after_s: float


class StrikingExecutor(LocalProcessExecutor):
    """`deaths` grows with each loss. Past `deadline_s` (time.monotonic) calls raise TimeoutError instead of waiting:
    whatever hangs is found."""

    def __init__(
        self,
        *,
        model: str,
        settings: WorkerSettings,
        placement: Placement,
        program: Sequence[str] = WORKER_PROGRAM,
        grace_s: float = GRACE_S,
    ) -> None:
        super().__init__(model=model, settings=settings, placement=placement, program=program, grace_s=grace_s)
        self.deadline_s = math.inf
        self.deaths: list[Death] = []
        self._at_work: dict[int, Command] = {}  # by rank, until its answer is handed on
        self._strike: Strike | None = None
        self._skip = 0
        self._struck_s = 0.0
        self._thread: threading.Thread | None = None

    def arm(self, strike: Strike) -> None:
        """For one strike, at the moment that it names."""
        self._strike, self._skip = strike, strike.skip

    def disarm(self) -> bool:
        """Waits for a strike under way. Returns whether there was one since `arm`."""
        has_struck, self._strike = self._strike is None, None
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)
        self._thread = None
        return has_struck

    def strike_now(self, rank: int) -> None:
        """Kills a rank, and waits until its process is gone."""
        self._kill(Strike(rank=rank, delay_s=0.0, is_moment=None))
        limit_s = time.monotonic() + _PATIENCE_S
        while not self._links[rank].wait(_LOOK_S) and time.monotonic() < limit_s:
            pass

    # -- the contract, watched ----------------------------------------------------------------------------------

    def start(self, timeout_s: float) -> Sequence[Span]:
        self._at_work.clear()
        if self._strike is not None and self._strike.is_moment is None:
            self._begin_strike(self._strike)
        with self._watching() as left_s:
            return super().start(min(timeout_s, left_s))

    def check(self) -> None:
        with self._watching():
            super().check()

    def send(self, command: Command) -> None:
        super().send(command)
        self._at_work.update(dict.fromkeys(command.ranks, command))
        strike = self._strike
        if strike is not None and strike.is_moment is not None and strike.is_moment(command):
            self._skip -= 1
            if self._skip < 0:
                self._begin_strike(strike)

    def receive(self, timeout_s: float) -> Sequence[Event]:
        with self._watching() as left_s:
            events = super().receive(min(timeout_s, left_s))
        for event in events:
            self._at_work.pop(event.rank, None)
        return events

    # -- inside -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _watching(self) -> Iterator[float]:
        """Yields the seconds that are left."""
        asked_s = time.monotonic()
        if asked_s > self.deadline_s:
            raise TimeoutError(f"there is no end to it: workers are at {sorted(self._at_work.items())}")
        try:
            yield self.deadline_s - asked_s
        except WorkerDiedError as error:
            if self.deaths and self.deaths[-1].error is error:  # calls within calls
                self.deaths.pop()
            after_s = time.monotonic() - max(asked_s, self._struck_s)
            self.deaths.append(Death(error=error, command=self._at_work.get(error.rank), after_s=after_s))
            raise

    def _begin_strike(self, strike: Strike) -> None:
        self._strike = None
        self._thread = threading.Thread(target=self._kill, args=(strike,), name="strike", daemon=True)
        self._thread.start()

    def _kill(self, strike: Strike) -> None:
        time.sleep(strike.delay_s)
        limit_s = time.monotonic() + _PATIENCE_S
        while len(pids := self.pids) <= strike.rank:
            if time.monotonic() > limit_s:
                return
            time.sleep(_LOOK_S)
        self._struck_s = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[strike.rank], signal.SIGKILL)
