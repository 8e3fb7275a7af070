"""Requests that have not begun, in the order of their turns: by priority, then by age, and nobody waits for ever."""

import heapq
from typing import Generic, TypeVar

from pipedit.plan.jobs import Job

JobT = TypeVar("JobT", bound=Job)


class WaitingLine(Generic[JobT]):
    """A queue of jobs; every operation takes logarithmic time. The oldest one is promoted after `patience` younger ones
    were taken before it, and so on with the next oldest."""

    def __init__(self, *, patience: int) -> None:
        self._patience = patience
        self._waiting: dict[int, JobT] = {}  # by number
        # Both speak of jobs that have left, too: that is dropped when it comes to the top.
        self._by_turn: list[tuple[bool, int, int]] = []  # orders, which end with the number
        self._by_age: list[int] = []  # numbers

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def first(self) -> JobT:
        """Whose turn is next. The line must not be empty."""
        while self._by_turn[0][-1] not in self._waiting:
            heapq.heappop(self._by_turn)
        return self._waiting[self._by_turn[0][-1]]

    def push(self, job: JobT) -> None:
        self._waiting[job.number] = job
        heapq.heappush(self._by_turn, job.order())
        heapq.heappush(self._by_age, job.number)

    def pop(self) -> JobT:
        job = self.first
        self.remove(job)
        if self._waiting and (oldest := self._oldest).number < job.number:
            self._note_overtaking(oldest)
        return job

    def remove(self, job: JobT) -> None:
        del self._waiting[job.number]

    @property
    def _oldest(self) -> JobT:
        while self._by_age[0] not in self._waiting:
            heapq.heappop(self._by_age)
        return self._waiting[self._by_age[0]]

    def _note_overtaking(self, job: JobT) -> None:
        job.overtaken += 1
        if job.overtaken >= self._patience and not job.is_promoted:
            job.is_promoted = True
            heapq.heappush(self._by_turn, job.order())  # an earlier one; the old one comes up when the job has left
