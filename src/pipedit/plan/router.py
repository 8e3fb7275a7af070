"""Which replica gets the next request. Knows no ranks and no clock."""

import heapq
from collections.abc import Mapping, Sequence


class Router:
    """Sends each request to the replica with the least work waiting. Replicas that are alike form a pool; `counts` says
    how many there are in each, `seconds` how long a request of each kind that it serves keeps one of them."""

    def __init__(self, counts: Sequence[int], seconds: Sequence[Mapping[str, float]]) -> None:
        self._seconds = seconds
        self._pool_of = [number for number, count in enumerate(counts) for _ in range(count)]
        self._waiting_s = [0.0] * len(self._pool_of)
        self._requests = [0] * len(self._pool_of)
        # Entries with another figure than the current one are out of date; they are dropped when they come to the top.
        self._heaps: list[list[tuple[float, int]]] = [[] for _ in counts]
        for replica, pool_number in enumerate(self._pool_of):
            self._heaps[pool_number].append((0.0, replica))  # sorted, so it is a heap
        self._pools_of: dict[str, list[int]] = {}
        for number, kinds in enumerate(seconds):
            for kind in kinds:
                self._pools_of.setdefault(kind, []).append(number)

    def route(self, kind: str) -> tuple[int, int]:
        """The replica, counted over all pools, and its pool."""
        choices = []
        for number in self._pools_of[kind]:
            waiting_s, replica = self._top(number)
            choices.append((waiting_s + self._seconds[number][kind], replica, number))
        after_s, replica, pool_number = min(choices)
        self._requests[replica] += 1
        self._note(replica, after_s)
        return replica, pool_number

    def finish(self, replica: int, kind: str) -> None:
        """A request of this kind is done there."""
        self._requests[replica] -= 1
        left_s = self._waiting_s[replica] - self._seconds[self._pool_of[replica]][kind]
        self._note(replica, left_s if self._requests[replica] else 0.0)  # sums of floats leave something over

    def _note(self, replica: int, waiting_s: float) -> None:
        self._waiting_s[replica] = waiting_s
        heapq.heappush(self._heaps[self._pool_of[replica]], (waiting_s, replica))

    def _top(self, pool_number: int) -> tuple[float, int]:
        heap = self._heaps[pool_number]
        while heap[0][0] != self._waiting_s[heap[0][1]]:
            heapq.heappop(heap)
        return heap[0]
