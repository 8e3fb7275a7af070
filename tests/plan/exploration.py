"""Visits every state that a small world can come into. Knows nothing of what the world is."""

import contextlib
import dataclasses
import pickle
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic, TypeVar

WorldT = TypeVar("WorldT")
Move = tuple[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules(Generic[WorldT]):
    """`moves`: what may happen next; it may change its world, which is then thrown away. `make`: lets it happen. Both
    raise AssertionError where something is wrong. `key`: equal for states that behave alike."""

    moves: Callable[[WorldT], Iterable[Move]]
    make: Callable[[WorldT, Move], None]
    key: Callable[[WorldT], Hashable]


def explore(start: WorldT, rules: Rules[WorldT]) -> Iterator[WorldT]:
    """Each state that can be reached, once. Raises AssertionError, with the way there, for the first one that is wrong,
    and in the end if it is possible to go round in circles."""
    seen = {rules.key(start): 0}
    waiting: list[tuple[bytes, tuple[Move, ...]]] = [(pickle.dumps(start, -1), ())]
    edges: list[list[int]] = [[]]
    number = 0
    while number < len(waiting):
        blob, way = waiting[number]
        waiting[number] = (b"", ())
        with _telling(way):
            moves = list(rules.moves(pickle.loads(blob)))
        for move in moves:
            world = pickle.loads(blob)
            with _telling((*way, move)):
                rules.make(world, move)
            key = rules.key(world)
            if key not in seen:
                seen[key] = len(waiting)
                waiting.append((pickle.dumps(world, -1), (*way, move)))
                edges.append([])
                yield world
            edges[number].append(seen[key])
        number += 1
    assert is_acyclic(edges), "it is possible to go round in circles"


@contextlib.contextmanager
def _telling(way: tuple[Move, ...]) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        error.add_note(f"after {list(way)}")
        raise


def is_acyclic(edges: list[list[int]]) -> bool:
    entering = [0] * len(edges)
    for targets in edges:
        for target in targets:
            entering[target] += 1
    free = [state for state, count in enumerate(entering) if count == 0]
    done = 0
    while free:
        done += 1
        for target in edges[free.pop()]:
            entering[target] -= 1
            if entering[target] == 0:
                free.append(target)
    return done == len(edges)
