"""What a decode stage asks of the ranks that share its work. Knows no model and no transport.

The pictures of a video are cut into slabs of rows, or into tiles; rank 0 of the group puts the frames together, or,
where everybody wants the video, each rank does.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class RowGroup(Protocol):
    """Ranks that decode one video together, numbered from top to bottom. Rank 0 gives the frames out.

    Each method but `shares` waits for the other ranks: all that take part call it, in the same order of calls.
    """

    @property
    def size(self) -> int: ...

    @property
    def index(self) -> int: ...

    def begin(self) -> None:
        """Before the first picture of a video. All ranks of the group call it."""

    def shares(self, total: int, members: int) -> tuple[int, ...]:
        """How many of `total` rows each rank takes, where the first `members` ranks take any. They differ by at most
        one, the first ones are larger; the last are 0 where there are fewer rows than members."""

    def with_edges(self, tensors: Sequence["torch.Tensor"], members: int) -> list["torch.Tensor"]:
        """Each tensor [..., rows, columns] with the nearest row of the rank above put on top and that of the rank
        below underneath; nothing where the picture ends. The first `members` ranks call it, and their tensors are
        equal in all but the number of rows. All tensors travel in one message each way."""

    def gather_rows(self, tensor: "torch.Tensor", shares: Sequence[int]) -> "torch.Tensor":
        """[..., shares[index], columns] on each rank that has a share -> [..., sum(shares), columns] on all of them."""

    def collect(self, own: "torch.Tensor", counts: Sequence[int]) -> list["torch.Tensor"] | None:
        """Everybody's `own` (one dimension, one data type, any length) on rank 0, in order; None on the others.
        Rank 0 says how many values it expects of whom in `counts`; the others' `counts` are not read. A rank with
        nothing to give may leave the call out."""

    def pass_on(self, outgoing: "torch.Tensor | None", incoming: "torch.Tensor | None") -> None:
        """Sends to the next rank (the last one to rank 0) and fills `incoming` from the one before; both contiguous,
        None where nothing goes that way. Who sends and who expects must agree."""


class VideoGroup(RowGroup, Protocol):
    """Ranks of which each gets the whole video."""

    def gather_all(self, own: "torch.Tensor | None") -> "list[torch.Tensor | None]":
        """Everybody's `own`, of any shape and data type, on all ranks, in their order; None from who has nothing. All
        ranks of the group call it."""
