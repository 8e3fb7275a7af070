"""How a picture or a video is cut into overlapping windows. Pure arithmetic; knows no model and no tensor."""

import dataclasses
from collections import Counter
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Windows of `length` that start every `stride` positions; the last ones may be shorter."""

    length: int
    stride: int

    def lengths(self, size: int) -> Counter[int]:
        """How many windows of which length cover positions 0 to `size`. Quick for any size."""
        whole = max((size - self.length) // self.stride + 1, 0)
        lengths = Counter({self.length: whole} if whole else {})
        lengths.update(size - start for start in range(whole * self.stride, size, self.stride))
        return lengths

    def windows(self, size: int) -> list[slice]:
        """Every window over positions 0 to `size`, in order."""
        return [slice(start, min(start + self.length, size)) for start in range(0, size, self.stride)]

    def scaled_down(self, factor: int) -> "Tiling":
        return Tiling(length=self.length // factor, stride=self.stride // factor)


def tile_sizes(rows: int, columns: int, tiling: Tiling | None) -> Counter[tuple[int, int]]:
    """How many spatial tiles have which rows and columns; one tile, the whole picture, where it is not cut."""
    if tiling is None or (rows <= tiling.length and columns <= tiling.length):
        return Counter({(rows, columns): 1})
    down, across = tiling.lengths(rows), tiling.lengths(columns)
    return Counter({(h, w): down[h] * across[w] for h in down for w in across})


def areas_of(tiles: Counter[tuple[int, int]]) -> Counter[int]:
    """How many spatial tiles have which area."""
    areas: Counter[int] = Counter()
    for (rows, columns), count in tiles.items():
        areas[rows * columns] += count
    return areas


def deal(weights: Sequence[int], parts: int) -> list[int]:
    """Which of `parts` takes each item, so that their sums of weights are near each other: heaviest first, each to the
    part that has least so far. The same answer everywhere; part 0 gets the heaviest."""
    sums, owners = [0] * parts, [0] * len(weights)
    for item in sorted(range(len(weights)), key=lambda item: (-weights[item], item)):
        owner = min(range(parts), key=lambda part: (sums[part], part))
        owners[item] = owner
        sums[owner] += weights[item]
    return owners


def largest_share(weights: Counter[int], parts: int) -> int:
    """About what the busiest of `parts` gets from `deal`, for any number of items: `weights` counts how many there are
    of each weight."""
    everybody = sum(weight * (count // parts) for weight, count in weights.items())
    left = [weight for weight, count in weights.items() for _ in range(count % parts)]
    owners = deal(left, parts)
    return everybody + max(sum(w for w, owner in zip(left, owners, strict=True) if owner == p) for p in range(parts))
