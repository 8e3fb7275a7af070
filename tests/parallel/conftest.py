"""Groups of ranks that stay for a whole test session, because starting them costs seconds."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.parallel.ranks import Ranks, ranks


@pytest.fixture(scope="session")
def gloo() -> Iterator[Callable[[int], Ranks]]:
    """`gloo(n)` is a group of n ranks, started when it is first asked for."""
    groups: dict[int, Ranks] = {}
    with ExitStack() as stack:

        def group(world_size: int) -> Ranks:
            if world_size not in groups:
                groups[world_size] = stack.enter_context(ranks(world_size))
            return groups[world_size]

        yield group
