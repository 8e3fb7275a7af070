"""How a picture or a video is cut into overlapping windows. Pure arithmetic; knows no model and no tensor."""

import dataclasses
from collections import Counter


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

    def scaled_down(self, factor: int) -> "Tiling":
        return Tiling(length=self.length // factor, stride=self.stride // factor)


def tile_sizes(rows: int, columns: int, tiling: Tiling | None) -> Counter[tuple[int, int]]:
    """How many spatial tiles have which rows and columns; one tile, the whole picture, where it is not cut."""
    if tiling is None or (rows <= tiling.length and columns <= tiling.length):
        return Counter({(rows, columns): 1})
    down, across = tiling.lengths(rows), tiling.lengths(columns)
    return Counter({(h, w): down[h] * across[w] for h in down for w in across})
