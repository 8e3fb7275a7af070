"""The second half of `bench faults`: requests that are cancelled at random times, among others that are not."""

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from pipedit.bench.fault_subject import LEVELS, REQUESTS, Outcome, Resources, Subject
from pipedit.engine.updates import Cancelled, Finished

MOST_AT_A_TIME = 4
SAMPLES = (0.2, 0.6, 1.0)  # of the cancels, when memory is looked at: from the first time on it shall not grow
GROWTH_BYTES = 32 * 2**20  # what allocators may do; a request's tensors, kept 200 times, would be more
_SHARE = 0.7  # of the time that a batch takes: later most requests are over
_NOT_BEGUN = "not begun"


@dataclasses.dataclass(kw_only=True)
class Tally:
    """What became of the requests. `stages`: how far those had come that were cancelled."""

    cancels: int = 0
    batches: int = 0
    cancelled: int = 0
    finished_nevertheless: int = 0
    untouched: int = 0
    largest_difference: float = 0.0
    stages: dict[str, int] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


class _Canceller(threading.Thread):
    """Cancels requests at given times, in seconds from its start, as another thread of a caller would."""

    def __init__(self, cancel: Callable[[str], None], at_s: Mapping[str, float]) -> None:
        super().__init__(name="canceller", daemon=True)
        self._cancel, self._at_s, self._is_over = cancel, at_s, threading.Event()

    def run(self) -> None:
        start_s = time.monotonic()
        for request_id, at_s in sorted(self._at_s.items(), key=lambda entry: entry[1]):
            if self._is_over.wait(max(start_s + at_s - time.monotonic(), 0.0)):
                return
            self._cancel(request_id)

    def end(self) -> None:
        """The requests are over; those that it has not come to were not cancelled."""
        self._is_over.set()
        self.join()


def run_cancels(subject: Subject, count: int, rng: random.Random, say: Callable[[str], None]) -> dict[str, Any]:
    """Batches of random requests until `count` of them were told to end. JSON-ready."""
    tally, memory, used = Tally(), [], []
    pids = subject.executor.pids
    for share in SAMPLES:
        while tally.cancels < share * count:
            _batch(subject, count - tally.cancels, rng, tally)
        _judge(subject, subject.run(range(len(REQUESTS))), set(), tally)
        memory.append(subject.worker_memory())
        used.append(Resources.now())
    growth = [after - before for before, after in zip(memory[0], memory[-1], strict=True)]
    ours = used[-1].memory_bytes - used[0].memory_bytes
    tally.problems += used[-1].problems(used[0])
    if max(*growth, ours) > GROWTH_BYTES:
        tally.problems.append(f"memory grew: {ours} bytes here, {growth} in the workers")
    if subject.executor.pids != pids:
        tally.problems.append("workers were lost")
    say(f"{tally.cancels} cancels in {tally.batches} batches: {'; '.join(tally.problems) or 'all is well'}")
    return {
        **dataclasses.asdict(tally),
        "worker_memory_bytes": memory,
        "growth_bytes": ours,
    }


def _batch(subject: Subject, most: int, rng: random.Random, tally: Tally) -> None:
    numbers = rng.choices(range(len(REQUESTS)), k=rng.randint(1, MOST_AT_A_TIME))
    outcome = subject.submit(numbers, [rng.choice((0, 0, 1)) for _ in numbers])
    doomed = rng.sample(sorted(outcome.requests), k=min(rng.randint(1, len(numbers)), most))
    lasts_s = _SHARE * subject.batch_s * len(numbers) / len(REQUESTS)
    at_once = rng.random() < 0.25
    same_s = rng.uniform(0.0, lasts_s)
    canceller = _Canceller(
        subject.engine.cancel, {one: same_s if at_once else rng.uniform(0.0, lasts_s) for one in doomed}
    )
    canceller.start()
    try:
        subject.finish(outcome)
    finally:
        canceller.end()
    tally.batches += 1
    tally.cancels += len(doomed)
    _judge(subject, outcome, set(doomed), tally)


def _judge(subject: Subject, outcome: Outcome, doomed: set[str], tally: Tally) -> None:
    for request_id, number in outcome.requests.items():
        ending = outcome.endings.get(request_id)
        if isinstance(ending, Cancelled) and request_id in doomed:
            tally.cancelled += 1
            stage = outcome.stages.get(request_id, _NOT_BEGUN)
            tally.stages[stage] = tally.stages.get(stage, 0) + 1
        elif isinstance(ending, Finished):
            tally.finished_nevertheless += request_id in doomed
            tally.untouched += request_id not in doomed
            levels = subject.difference(outcome, request_id)
            tally.largest_difference = max(tally.largest_difference, levels)
            if levels > LEVELS:
                tally.problems.append(f"the video of request {number} differs by {levels:g}")
        else:
            tally.problems.append(f"request {number}{' (cancelled)' * (request_id in doomed)} ended with {ending}")
