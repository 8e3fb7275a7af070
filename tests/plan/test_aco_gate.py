"""Help has to pay: what the gate tries, when it decides, and how heads are dealt."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipedit.core.parallel import ParallelConfig
from pipedit.plan.aco_gate import SAMPLES, WARM_UP, AcoGate, AcoMode, helper_groups, shares_with_help


def try_out(gate: AcoGate, seconds: Callable[[int, int], float], *, choices: int = 3, steps: int = 40) -> list[int]:
    """`seconds(choice, how often it was taken before)`. Returns what was chosen, step by step."""
    chosen: list[int] = []
    for _ in range(steps):
        choice = gate.choose("key", choices)
        gate.note("key", choice, seconds(choice, chosen.count(choice)))
        chosen.append(choice)
    return chosen


def constant(*seconds: float) -> Callable[[int, int], float]:
    return lambda choice, _: seconds[choice]


def test_help_that_is_slower_is_switched_off() -> None:
    chosen = try_out(AcoGate(AcoMode.AUTO), constant(1.0, 1.2, 1.1))
    assert set(chosen[3 * (WARM_UP + SAMPLES) :]) == {0}


def test_the_fastest_help_is_kept() -> None:
    gate = AcoGate(AcoMode.AUTO)
    chosen = try_out(gate, constant(1.0, 0.7, 0.8))
    assert set(chosen[3 * (WARM_UP + SAMPLES) :]) == {1}
    assert set(try_out(AcoGate(AcoMode.AUTO), constant(1.0, 0.9, 0.8))[3 * (WARM_UP + SAMPLES) :]) == {2}
    assert gate.decided("key") == 1
    assert gate.decided("another key") is None


@pytest.mark.parametrize(("with_help", "expected"), [(0.96, 1), (0.98, 0), (1.0, 0)])
def test_help_must_win_by_more_than_noise(with_help: float, expected: int) -> None:
    gate = AcoGate(AcoMode.AUTO)
    try_out(gate, constant(1.0, with_help), choices=2)
    assert gate.decided("key") == expected


def test_trying_is_short_and_fair() -> None:
    chosen = try_out(AcoGate(AcoMode.AUTO), constant(1.0, 2.0, 3.0))
    trial = chosen[: 3 * (WARM_UP + SAMPLES)]
    assert all(trial.count(choice) == WARM_UP + SAMPLES for choice in range(3))
    assert trial[:3] == [0, 1, 2], "in turn, so that a machine that slows down treats all alike"


def test_what_the_first_step_of_each_choice_took_decides_nothing() -> None:
    """Whatever it says: buffers are made then."""

    def misleading(choice: int, before: int) -> float:
        return (0.0 if choice == 0 else 100.0) if before < WARM_UP else (1.0, 0.5)[choice]

    gate = AcoGate(AcoMode.AUTO)
    try_out(gate, misleading, choices=2)
    assert gate.decided("key") == 1

    def tempting(choice: int, before: int) -> float:
        return (100.0 if choice == 0 else 0.0) if before < WARM_UP else (0.5, 1.0)[choice]

    gate = AcoGate(AcoMode.AUTO)
    try_out(gate, tempting, choices=2)
    assert gate.decided("key") == 0


@pytest.mark.parametrize("disturbed", [0, 1])
@pytest.mark.parametrize("at", range(WARM_UP, WARM_UP + SAMPLES))
def test_one_disturbed_step_changes_nothing(disturbed: int, at: int) -> None:
    """Weights of another expert were fetched, or another program ran."""

    def seconds(choice: int, before: int) -> float:
        return 50.0 if (choice, before) == (disturbed, at) else (1.0, 0.8)[choice]

    gate = AcoGate(AcoMode.AUTO)
    try_out(gate, seconds, choices=2)
    assert gate.decided("key") == 1


def test_it_does_not_decide_before_every_choice_was_measured() -> None:
    gate = AcoGate(AcoMode.AUTO)
    for _ in range(50):  # steps with help are never reported: their requests are cancelled
        if (choice := gate.choose("key", 2)) == 0:
            gate.note("key", choice, 1.0)
    assert gate.decided("key") is None


def test_a_decision_stands() -> None:
    gate = AcoGate(AcoMode.AUTO)
    try_out(gate, constant(1.0, 0.5, 0.5))
    before = gate.decided("key")
    try_out(gate, constant(0.1, 9.0, 9.0))
    assert gate.decided("key") == before


def test_each_key_is_tried_by_itself() -> None:
    gate = AcoGate(AcoMode.AUTO)
    try_out(gate, constant(1.0, 0.5, 0.5))
    assert gate.choose("another", 3) == 0
    gate.note("another", 0, 1.0)
    assert gate.choose("another", 3) == 1


def test_on_always_deals_as_the_paper_does_and_off_never() -> None:
    assert set(try_out(AcoGate(AcoMode.ON), constant(1.0, 9.0, 9.0))) == {1}
    assert set(try_out(AcoGate(AcoMode.OFF), constant(9.0, 1.0, 1.0))) == {0}
    assert AcoGate(AcoMode.ON).choose("key", 1) == 0, "where nobody can help, nobody does"
    assert AcoGate(AcoMode.AUTO).choose("key", 1) == 0


def test_steps_without_a_figure_mean_no_help() -> None:
    gate = AcoGate(AcoMode.AUTO)
    try_out(gate, constant(0.0, 0.0, 0.0))
    assert gate.decided("key") == 0


# -- dealing heads and ranks -----------------------------------------------------------------------------------------


def test_shares_of_24_heads_on_7_denoisers_and_1_helper() -> None:
    assert shares_with_help(24, 7, 1) == [(3,) * 8, (4, 3, 3, 3, 3, 3, 3, 2)]


def test_nobody_can_help_with_too_few_heads() -> None:
    assert shares_with_help(4, 4, 1) == []
    assert shares_with_help(4, 2, 0) == []
    assert shares_with_help(4, 3, 1) == [(1, 1, 1, 1)], "half of one head is one head: the same again"


@given(heads=st.integers(1, 64), denoisers=st.integers(1, 8), helpers=st.integers(0, 8))
def test_every_head_is_dealt_once_and_nobody_is_left_without(heads: int, denoisers: int, helpers: int) -> None:
    ways = shares_with_help(heads, denoisers, helpers)
    assert len(ways) == len(set(ways))
    for shares in ways:
        assert sum(shares) == heads
        assert len(shares) == denoisers + helpers
        assert min(shares) >= 1
        assert max(shares[:denoisers]) - min(shares[:denoisers]) <= 1
        assert max(shares[denoisers:]) <= max(shares[:denoisers]), "helpers never have more than denoisers"
    assert bool(ways) == (helpers > 0 and heads >= denoisers + helpers)


@given(idle=st.lists(st.integers(0, 20), unique=True, max_size=9), cfg=st.integers(1, 2), ring=st.integers(1, 2))
def test_as_many_helpers_for_each_group_and_none_for_rings(idle: list[int], cfg: int, ring: int) -> None:
    groups = helper_groups(idle, ParallelConfig(cfg_degree=cfg, ring_degree=ring, ulysses_degree=2))
    assert len(groups) == cfg
    assert {len(group) for group in groups} == {len(idle) // cfg if ring == 1 else 0}
    helpers = list(itertools.chain(*groups))
    assert len(helpers) == len(set(helpers))
    assert set(helpers) <= set(idle)
