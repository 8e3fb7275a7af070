"""DualParal's noise pool against section 6 of the paper notes, written down directly."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipedit.core.blocks import BlockPlan, Prefix
from pipedit.plan.noise_pool import noise_indices, pool_orders, pool_size

SIZES = [(4, 2), (8, 8), (10, 5), (3, 0), (1, 0), (1, 1)]


def plan_of(latents: int | None, size: int, context: int, *, compat: bool = False) -> BlockPlan:
    prefix = Prefix.RERUN if compat else Prefix.CACHE
    return BlockPlan(
        latents=latents, block_latents=size, context_latents=context, num_steps=2, prefix=prefix, compat=compat
    )


def take(count: int, size: int, context: int, seed: int = 0) -> list[tuple[int, ...]]:
    return list(itertools.islice(pool_orders(size, context, seed), count))


def shuffled(items: list[int], uniform: random.Random) -> list[int]:
    """Fisher and Yates, as in a textbook: the last place gets one of those not yet placed, and so on."""
    left, placed = list(items), list[int]()
    while len(left) > 1:
        chosen = int(uniform.random() * len(left))
        placed.append(left[chosen])
        left[chosen] = left[-1]
        left.pop()
    return [*left, *reversed(placed)]


@pytest.mark.parametrize(("size", "context"), SIZES)
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_orders_follow_the_formula(size: int, context: int, seed: int) -> None:
    """P_k = [last nc of P_{k-1} | random permutation of the first nb of P_{k-1}], from P_{-1} = 0, 1, ..."""
    uniform, before = random.Random(seed), list(range(size + context))
    for order in take(12, size, context, seed):
        assert list(order) == before[size:] + shuffled(before[:size], uniform)
        before = list(order)


def test_orders_of_a_seed_never_change() -> None:
    """Written down once: another Python, or another release, must not change anybody's video."""
    assert take(3, 4, 2, seed=5) == [(4, 5, 0, 1, 3, 2), (3, 2, 4, 5, 0, 1), (0, 1, 5, 4, 2, 3)]


@pytest.mark.parametrize(("size", "context"), SIZES)
def test_each_order_holds_the_whole_pool(size: int, context: int) -> None:
    for order in take(20, size, context):
        assert sorted(order) == list(range(size + context))


@given(size=st.integers(1, 6), data=st.data(), blocks=st.integers(1, 9), seed=st.integers(0, 2**63 - 1))
def test_a_window_holds_each_latent_of_the_pool_once(size: int, data: st.DataObject, blocks: int, seed: int) -> None:
    context = data.draw(st.integers(0, size))
    for compat in (False, True):
        plan = plan_of(size * blocks, size, context, compat=compat)
        noise = list(noise_indices(plan, seed))
        assert [len(indices) for indices in noise] == [plan.latents_of(block) for block in range(blocks)]
        for before, own in itertools.pairwise(noise):
            prefix = before[len(before) - context :]
            assert sorted(prefix + own) == list(range(pool_size(plan)))
        orders = take(blocks, size, context, seed)
        assert [indices[-size:] for indices in noise] == [order[-size:] for order in orders]
        assert noise[0] == (orders[0] if compat else orders[0][context:])


def test_neighbouring_noise_differs_in_order() -> None:
    """The control: were nothing shuffled, the windows above would hold each latent once all the same."""
    noise = list(noise_indices(plan_of(80, 8, 8), 0))
    assert len(set(noise)) == 10
    assert len({tuple(sorted(indices)) for indices in noise}) == 2  # nb = nc: two halves in turn
    assert list(noise_indices(plan_of(80, 8, 8), 1)) != noise


def test_a_shuffle_is_even() -> None:
    """Every permutation of three comes about equally often."""
    found = [order for seed in range(600) for order in take(1, 3, 0, seed)]
    assert {found.count(order) // 40 for order in itertools.permutations(range(3))} <= {1, 2, 3}


@pytest.mark.parametrize("context", [0, 2, 4])
def test_a_shorter_last_block_takes_the_first_ones(context: int) -> None:
    whole, short = plan_of(12, 4, context), plan_of(11, 4, context)
    expected = list(noise_indices(whole, 3))
    assert list(noise_indices(short, 3)) == [*expected[:-1], expected[-1][:3]]
    assert list(noise_indices(plan_of(2, 4, context), 3)) == [expected[0][:2]]


def test_going_on_from_a_later_block_gives_the_same() -> None:
    plan = plan_of(43, 4, 3)
    assert list(noise_indices(plan, 9, first_block=6)) == list(noise_indices(plan, 9))[6:]


def test_an_endless_plan_has_endless_noise_that_begins_like_any_other() -> None:
    endless = list(itertools.islice(noise_indices(plan_of(None, 4, 3), 9), 10))
    assert endless == list(noise_indices(plan_of(40, 4, 3), 9))
