"""Turns in the waiting line: priority, age, and nobody for ever."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipedit.plan.jobs import Job, Work
from pipedit.plan.waiting_line import WaitingLine
from tests.plan.scheduled_ranks import REQUEST


def make_job(number: int, priority: int = 0, name: str | None = None) -> Job:
    work = Work(num_steps=1, num_chunks=1, priority=priority)
    return Job(request_id=name or f"r{number}", request=REQUEST, work=work, number=number)


def line_of(*priorities: int, patience: int = 8) -> tuple[WaitingLine[Job], list[Job]]:
    line: WaitingLine[Job] = WaitingLine(patience=patience)
    jobs = [make_job(number, p) for number, p in enumerate(priorities)]
    for job in jobs:
        line.push(job)
    return line, jobs


def pop_all(line: WaitingLine[Job]) -> list[int]:
    return [line.pop().number for _ in range(len(line))]


def test_equals_keep_their_order() -> None:
    line, _ = line_of(0, 0, 0, 0)
    assert pop_all(line) == [0, 1, 2, 3]


def test_higher_priority_goes_first() -> None:
    line, _ = line_of(0, 2, 1, 2)
    assert pop_all(line) == [1, 3, 2, 0]


def test_first_is_who_pops() -> None:
    line, jobs = line_of(0, 1)
    assert line.first is jobs[1]
    assert line.pop() is jobs[1]
    assert line.first is jobs[0]
    assert len(line) == 1


def test_the_oldest_is_promoted_after_so_many_went_before_it() -> None:
    line, _ = line_of(0, 0, *[1] * 10, patience=3)
    assert pop_all(line) == [2, 3, 4, 0, 5, 6, 7, 1, 8, 9, 10, 11]


def test_who_is_promoted_goes_before_every_priority() -> None:
    line, jobs = line_of(0, 5, patience=1)
    line.push(make_job(2, 9))
    assert line.pop().number == 2
    assert jobs[0].is_promoted
    assert pop_all(line) == [0, 1]


def test_older_ones_that_go_first_overtake_nobody() -> None:
    line, jobs = line_of(0, 0, 0)
    pop_all(line)
    assert [job.overtaken for job in jobs] == [0, 0, 0]


def test_who_has_left_is_not_called() -> None:
    line, jobs = line_of(1, 0, 0, 1)
    for job in (jobs[0], jobs[1]):
        line.remove(job)
    assert pop_all(line) == [3, 2]


def test_who_comes_back_keeps_the_old_place() -> None:
    line, jobs = line_of(0, 0, 0)
    first = line.pop()
    line.push(first)
    assert pop_all(line) == [0, 1, 2]
    assert jobs[0] is first


def test_a_new_job_does_not_inherit_the_place_of_one_with_the_same_id() -> None:
    line, jobs = line_of(0, 0)
    line.remove(jobs[0])
    line.push(make_job(2, name="r0"))
    assert pop_all(line) == [1, 2]


def test_a_job_that_was_promoted_elsewhere_comes_back_to_the_front() -> None:
    line, _ = line_of(3, 3)
    promoted = make_job(7)
    promoted.is_promoted = True
    line.push(promoted)
    assert pop_all(line) == [7, 0, 1]


def test_promoted_ones_go_by_age() -> None:
    """Else one of low priority could be promoted and still wait for ever, for others that are promoted after it."""
    old, young = make_job(0, 0), make_job(1, 5)
    assert young.order() < old.order()
    old.is_promoted = young.is_promoted = True
    assert old.order() < young.order()


def naive_next(waiting: list[Job]) -> Job:
    oldest = min(waiting, key=lambda job: job.number)
    return oldest if oldest.is_promoted else min(waiting, key=Job.order)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), patience=st.integers(1, 4))
def test_it_does_what_a_sorted_list_would_do(seed: int, patience: int) -> None:
    """Random comings, goings and returns."""
    rng = random.Random(seed)
    line: WaitingLine[Job] = WaitingLine(patience=patience)
    waiting, gone = list[Job](), list[Job]()
    for number in range(60):
        action = rng.random()
        if action < 0.5 or not waiting:
            job = gone.pop() if gone and action < 0.1 else make_job(number, rng.randrange(3))
            line.push(job)
            waiting.append(job)
        elif action < 0.6:
            job = rng.choice(waiting)
            line.remove(job)
            waiting.remove(job)
        else:
            expected = naive_next(waiting)
            assert line.first is expected
            assert line.pop() is expected
            waiting.remove(expected)
            gone.append(expected)
        assert len(line) == len(waiting)


@pytest.mark.parametrize("arriving", [1, 2])
def test_nobody_waits_longer_than_patience_allows(arriving: int) -> None:
    """However many of higher priority keep coming: the k-th of the low ones goes within k (patience + 1) turns."""
    patience, low = 4, 5
    line, jobs = line_of(*[0] * low, patience=patience)
    number, popped = low, list[int]()
    while jobs[-1].number not in popped:
        for _ in range(arriving):
            line.push(make_job(number, 1))
            number += 1
        popped.append(line.pop().number)
    for place, job in enumerate(jobs, start=1):
        assert popped.index(job.number) + 1 <= place * (patience + 1)


def test_a_long_line_is_no_slower() -> None:
    """A hundred thousand wait. Generous: it takes about half a second, and quadratic time would take hours."""
    start = time.monotonic()
    line: WaitingLine[Job] = WaitingLine(patience=8)
    jobs = [make_job(number, number % 3) for number in range(100_000)]
    for job in jobs:
        line.push(job)
    for job in jobs[::2]:
        line.remove(job)
    for _ in range(1_000):
        line.pop()
    assert time.monotonic() - start < 10
