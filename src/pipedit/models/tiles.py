"""How a picture or a video is cut into overlapping windows. Pure arithmetic; knows no model and no tensor."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Windows of `length` that start every `stride` positions; the last ones may be shorter."""

    length: int
    stride: int

    def windows(self, size: int) -> tuple[range, ...]:
        """The windows over positions 0 to `size`, in order."""
        return tuple(range(start, min(start + self.length, size)) for start in range(0, size, self.stride))

    def scaled_down(self, factor: int) -> "Tiling":
        return Tiling(length=self.length // factor, stride=self.stride // factor)


def tile_sizes(rows: int, columns: int, tiling: Tiling | None) -> list[tuple[int, int]]:
    """Rows and columns of every spatial tile; one tile, the whole picture, where it is not cut."""
    if tiling is None or (rows <= tiling.length and columns <= tiling.length):
        return [(rows, columns)]
    return [(len(down), len(across)) for down in tiling.windows(rows) for across in tiling.windows(columns)]
