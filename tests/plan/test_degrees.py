"""Choosing degrees: what is chosen can run, what is refused says what can, and balance is what the shares give."""

import dataclasses
import itertools
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipedit.core.errors import InvalidRequestError
from pipedit.core.parallel import ParallelConfig
from pipedit.core.shares import split_evenly
from pipedit.plan.degrees import MOST_WORKERS, Wanted, attention_balance, choose, degree_problems, legal_configs

WORKERS, HEADS, TOKENS = st.integers(1, 48), st.integers(1, 40), st.integers(1, 5000)
DEGREES = ("cfg_degree", "ring_degree", "ulysses_degree")


def degrees(config: ParallelConfig) -> tuple[int, int, int]:
    return config.cfg_degree, config.ring_degree, config.ulysses_degree


def can_run(config: ParallelConfig, num_workers: int, heads: int, uses_guidance: bool, tokens: int) -> bool:
    """The rules, said once more and plainly."""
    cfg, ring, ulysses = degrees(config)
    return (
        cfg * ring * ulysses == num_workers
        and cfg in ((1, 2) if uses_guidance else (1,))
        and ulysses <= heads
        and ring * ulysses <= tokens
    )


def one_problem(wanted: Wanted, *known: Any) -> str:
    (problem,) = degree_problems(wanted, *known)
    return problem


# -- what is chosen -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_workers", "heads", "uses_guidance", "expected"),
    [
        (1, 12, True, (1, 1, 1)),
        (2, 12, True, (2, 1, 1)),
        (2, 12, False, (1, 1, 2)),
        (8, 12, True, (2, 1, 4)),
        (8, 12, False, (1, 2, 4)),  # eight Ulysses ranks would wait for those with two heads
        (7, 24, False, (1, 1, 7)),
        (7, 24, True, (1, 1, 7)),  # an odd number has no halves
        (6, 40, False, (1, 1, 6)),
        (6, 40, True, (2, 1, 3)),
        (3, 12, True, (1, 1, 3)),
        (16, 8, True, (2, 1, 8)),
        (16, 8, False, (1, 2, 8)),
        (64, 40, True, (2, 4, 8)),
        (13, 12, False, (1, 13, 1)),
    ],
)
def test_examples(num_workers: int, heads: int, uses_guidance: bool, expected: tuple[int, int, int]) -> None:
    tokens = 32_760
    assert degrees(choose(Wanted(), num_workers, heads, uses_guidance, tokens)) == expected


def test_eighty_one_tokens_on_three_workers_come_out_even_and_eighty_do_too() -> None:
    assert choose(Wanted(), 3, 12, False, 81) == choose(Wanted(), 3, 12, False, 80)


@given(WORKERS, HEADS, st.booleans(), TOKENS)
def test_what_is_chosen_can_run_and_nothing_is_refused_that_can(
    num_workers: int, heads: int, uses_guidance: bool, tokens: int
) -> None:
    case = (num_workers, heads, uses_guidance, tokens)
    everything = [
        ParallelConfig(cfg_degree=cfg, ring_degree=ring, ulysses_degree=ulysses)
        for cfg, ring, ulysses in itertools.product((1, 2), range(1, num_workers + 1), range(1, num_workers + 1))
    ]
    runnable = {config for config in everything if can_run(config, *case)}
    rows = legal_configs(*case)
    assert {row.config for row in rows if row.is_legal} == runnable
    assert all(row.config.world_size == num_workers for row in rows)
    if not runnable:
        with pytest.raises(InvalidRequestError, match=r"num_workers=\d+ is too many: .*; use at most \d+"):
            choose(Wanted(), *case)
        return
    chosen = choose(Wanted(), *case)
    assert chosen in runnable
    assert chosen == rows[0].config
    assert chosen.cfg_degree == max(config.cfg_degree for config in runnable)


def test_the_rules_of_this_test_can_say_no() -> None:
    assert not can_run(ParallelConfig(cfg_degree=2), 2, 8, False, 100)
    assert not can_run(ParallelConfig(ulysses_degree=9), 9, 8, True, 100)


@given(st.sampled_from([1, 2, 4, 6, 7, 8, 12, 24]), HEADS, st.booleans(), TOKENS, st.sets(st.sampled_from(DEGREES)))
def test_what_is_wanted_is_kept(
    num_workers: int, heads: int, uses_guidance: bool, tokens: int, names: set[str]
) -> None:
    case = (num_workers, heads, uses_guidance, tokens)
    for row in legal_configs(*case):
        if row.is_legal:
            wanted = Wanted(pipesp_chunks=3, **{name: getattr(row.config, name) for name in names})
            assert degree_problems(wanted, *case) == []
            chosen = choose(wanted, *case)
            assert can_run(chosen, *case)
            assert all(getattr(chosen, name) == getattr(row.config, name) for name in names)
            assert chosen.pipesp_chunks == min(3, math.ceil(heads / chosen.ulysses_degree))


@given(WORKERS, HEADS, st.booleans(), TOKENS, st.dictionaries(st.sampled_from(DEGREES), st.integers(1, 50), min_size=1))
def test_the_nearest_that_is_offered_can_run(
    num_workers: int, heads: int, uses_guidance: bool, tokens: int, wanted: dict[str, int]
) -> None:
    case = (num_workers, heads, uses_guidance, tokens)
    for problem in degree_problems(Wanted(**wanted), *case):
        if offer := re.search(r"nearest that can: cfg_degree=(\d+), ring_degree=(\d+), ulysses_degree=(\d+)", problem):
            cfg, ring, ulysses = map(int, offer.groups())
            assert can_run(ParallelConfig(cfg_degree=cfg, ring_degree=ring, ulysses_degree=ulysses), *case)
        else:
            assert "too many" in problem


# -- what is refused ----------------------------------------------------------------------------------------------


def test_refusals_say_why_and_what_can_run() -> None:
    assert one_problem(Wanted(ulysses_degree=3), 4, 12, False, 100) == (
        "ulysses_degree=3 cannot run on 4 workers: 3 does not divide 4; "
        "nearest that can: cfg_degree=1, ring_degree=1, ulysses_degree=4"
    )
    assert one_problem(Wanted(cfg_degree=2), 4, 12, False, 100) == (
        "cfg_degree=2 cannot run on 4 workers: cfg_degree 2 needs guidance, which makes two predictions a step; the "
        "request has none; nearest that can: cfg_degree=1, ring_degree=1, ulysses_degree=4"
    )
    assert one_problem(Wanted(cfg_degree=1, ring_degree=1, ulysses_degree=3), 4, 12, True, 100).endswith(
        "together they make 3; nearest that can: cfg_degree=1, ring_degree=1, ulysses_degree=4, or num_workers=3"
    )


@pytest.mark.parametrize(
    ("wanted", "case", "said"),
    [
        (Wanted(ulysses_degree=16), (32, 12, True, 999), "12 heads cannot go round 16 Ulysses ranks (ring_degree is"),
        (Wanted(ring_degree=1, ulysses_degree=4), (16, 12, True, 999), "cfg_degree would be 4, and guidance makes two"),
        (Wanted(ring_degree=2, ulysses_degree=3), (8, 12, True, 999), "6, which they make, does not divide 8"),
        (Wanted(cfg_degree=1), (8, 12, True, 7), "7 tokens cannot go round 8 ranks"),
        (Wanted(), (8, 12, False, 7), "use at most 7"),
        (Wanted(), (16, 12, True, 7), "use at most 7, or with guidance an even number up to 14"),
        (Wanted(cfg_degree=2), (3, 12, True, 999), "2 does not divide 3"),
        (Wanted(ulysses_degree=10**5000), (4, 12, True, 999), "10^30 or more does not divide 4"),
    ],
)
def test_each_reason_is_named(wanted: Wanted, case: tuple[int, int, bool, int], said: str) -> None:
    assert said in one_problem(wanted, *case)
    with pytest.raises(InvalidRequestError):
        choose(wanted, *case)


def test_wrong_values_are_told_at_once() -> None:
    values: dict[str, Any] = {"cfg_degree": 3, "ring_degree": 0, "ulysses_degree": "4", "pipesp_chunks": 0}
    assert degree_problems(Wanted(**values), -1) == [
        "num_workers=-1 must be at least 1",
        "ring_degree=0 must be at least 1",
        "ulysses_degree='4' should be a whole number",
        "cfg_degree=3 is too many: guidance makes two predictions; use 1 or 2",
        "pipesp_chunks=0 must be at least 1, or 'auto'",
    ]
    assert degree_problems(Wanted(), MOST_WORKERS) == []
    assert "use at most 1024" in one_problem(Wanted(), 10**5000)
    assert "whole number, or 'auto'" in one_problem(Wanted(pipesp_chunks="many"), 2)
    truth: Any = True
    assert "whole number" in one_problem(Wanted(ring_degree=truth), 2)


def test_what_is_not_known_yet_refuses_nothing() -> None:
    wanted = Wanted(cfg_degree=2, ulysses_degree=16)
    assert degree_problems(wanted, 32) == degree_problems(wanted, 32, 16) == []
    assert degree_problems(wanted, 32, 15) != []
    assert degree_problems(wanted, 32, 16, False) != []
    assert degree_problems(wanted, 32, 16, True, 15) != []
    assert degree_problems(Wanted(ulysses_degree=5), 32) != []


# -- balance and words --------------------------------------------------------------------------------------------


def busiest(config: ParallelConfig, heads: int, tokens: int) -> int:
    """Query rows times heads of the rank that has most of them, from the shares that the strategies deal out."""
    shares, ulysses = split_evenly(tokens, config.sequence_degree), config.ulysses_degree
    groups = [sum(shares[first : first + ulysses]) for first in range(0, len(shares), ulysses)]
    return max(groups) * max(split_evenly(heads, ulysses))


@given(WORKERS, HEADS, TOKENS)
def test_balance_is_that_of_the_shares(num_workers: int, heads: int, tokens: int) -> None:
    for row in legal_configs(num_workers, heads, True, tokens):
        if row.is_legal:
            ideal = heads * tokens / row.config.sequence_degree
            assert row.balance == pytest.approx(ideal / busiest(row.config, heads, tokens))
            assert 0 < row.balance <= 1


def test_twelve_heads_on_eight_ranks() -> None:
    config = ParallelConfig(ulysses_degree=8)
    assert attention_balance(config, heads=12, tokens=32_760) == 0.75
    (row,) = [row for row in legal_configs(8, 12, False, 32_760) if row.config == config]
    assert row.note == (
        "12 heads on 8 ranks: 2 on 4 of them, 1 on the others, attention waits for the larger shares: 75 % efficient"
    )


def test_notes_and_reasons_of_rows() -> None:
    rows = {degrees(row.config): row for row in legal_configs(16, 8, False, 77)}
    assert rows[1, 2, 8].note.startswith("8 heads on 8 ranks: 1 each, ring of 2: about 3 % slower, 77 tokens on 16")
    assert rows[1, 16, 1].note.startswith("all 8 heads on each rank, ring of 16: about 181 % slower")
    assert "8 heads cannot go round 16" in rows[1, 1, 16].reason
    assert "needs guidance" in rows[2, 1, 8].reason
    assert not rows[2, 1, 8].is_legal
    assert {dataclasses.replace(row.config, pipesp_chunks=1).world_size for row in rows.values()} == {16}
