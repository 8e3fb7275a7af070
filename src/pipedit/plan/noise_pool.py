"""DualParal's coordinated noise: all blocks start from the same few noise latents, each in another order.

Only indices into that pool: who draws the noise, and where it lives, is not known here.
"""

import itertools
import random
from collections.abc import Iterator

from pipedit.core.blocks import BlockPlan


def pool_size(plan: BlockPlan) -> int:
    """How many noise latents there are for the whole video."""
    return plan.block_latents + plan.context_latents


def pool_orders(block_latents: int, context_latents: int, seed: int) -> Iterator[tuple[int, ...]]:
    """P_0, P_1, ...: the order of the pool for each block, without end. Each is the last `context_latents` of the one
    before, which its neighbour ends with, and then the others of it, shuffled."""
    uniform = random.Random(seed).random
    pool = tuple(range(block_latents + context_latents))
    while True:
        others = list(pool[:block_latents])
        for last in range(block_latents - 1, 0, -1):
            # Fisher and Yates by hand: Python promises the same sequence of random() for ever, but not of shuffle().
            chosen = int(uniform() * (last + 1))
            others[last], others[chosen] = others[chosen], others[last]
        pool = (*pool[block_latents:], *others)
        yield pool


def noise_indices(plan: BlockPlan, seed: int, first_block: int = 0) -> Iterator[tuple[int, ...]]:
    """The pool's indices for the latents of block `first_block`, of the next, and so on; endless if the plan is.

    A block takes the last `block_latents` of its order, a shorter one the first of those, so that in the window of its
    predecessor's end and its own latents none occurs twice. With `compat` block 0 takes all. Going on from a later
    block means shuffling for all before it: microseconds each.
    """
    orders = pool_orders(plan.block_latents, plan.context_latents, seed)
    for block, order in enumerate(itertools.islice(orders, plan.num_blocks)):
        if block >= first_block:
            size = plan.latents_of(block)
            start = 0 if size > plan.block_latents else plan.context_latents
            yield order[start : start + size]
