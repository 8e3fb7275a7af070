"""The choice of chunks: deterministic given the times, never clearly slower than plain Ulysses."""

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipedit.parallel.tuning import MARGIN, ROUNDS, Tuner, decide


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def same(seconds: Sequence[float]) -> Sequence[float]:
    return seconds


def _run(costs: Sequence[float], calls: int, agree: object = same) -> tuple[Tuner, list[int]]:
    clock = Clock()
    tuner, chosen = Tuner(torch.device("cpu"), clock), []
    for _ in range(calls):
        candidate = tuner.choose("shape", len(costs))
        watch = tuner.start()
        clock.now += costs[candidate]
        tuner.finish("shape", watch, agree)  # type: ignore[arg-type]
        chosen.append(candidate)
    return tuner, chosen


def test_every_candidate_is_tried_in_turn_and_the_fastest_is_kept() -> None:
    tuner, chosen = _run([1.0, 0.8, 0.7, 0.9], calls=ROUNDS * 4 + 3)
    assert chosen[: ROUNDS * 4] == [0, 1, 2, 3] * ROUNDS
    assert chosen[ROUNDS * 4 :] == [2, 2, 2]
    assert tuner.best("shape") == 2 and tuner.is_settled("shape") and not tuner.is_settled("other")


def test_ranks_settle_on_the_agreed_times_not_their_own() -> None:
    tuner, _ = _run([1.0, 0.5], calls=ROUNDS * 2, agree=lambda _seconds: [1.0, 2.0])
    assert tuner.best("shape") == 0


def test_the_first_call_of_each_candidate_does_not_count() -> None:
    clock = Clock()
    tuner = Tuner(torch.device("cpu"), clock)
    for call in range(ROUNDS * 2):
        candidate = tuner.choose("shape", 2)
        watch = tuner.start()
        clock.now += 100.0 if call == 1 else (1.0, 0.5)[candidate]
        tuner.finish("shape", watch, same)
    assert tuner.best("shape") == 1


@given(st.lists(st.floats(0.001, 10.0), min_size=1, max_size=6))
def test_the_choice_is_never_slower_than_plain(seconds: list[float]) -> None:
    best = decide(seconds)
    assert seconds[best] <= seconds[0]
    assert best == 0 or seconds[best] < MARGIN * seconds[0]
