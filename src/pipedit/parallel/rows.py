"""Rows of pictures shared by the ranks of one channel: edges, whole pictures, pieces brought to the first rank.

All of it moves values and changes none. Knows no model; decode stages call it (see `RowGroup` in models).
"""

import itertools
from collections.abc import Sequence

import torch

from pipedit.core.shares import split_evenly
from pipedit.parallel.channel import Channel
from pipedit.parallel.groups import OpenChannel

# What a tensor that nobody announced looks like, as numbers: its data type, then its dimensions.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8)
_NOTHING = -1
_MOST_DIMENSIONS = 5


class ChannelRows:
    """Ranks in the order of their rows, over a channel of their own: calls of different strategies on one channel would
    have to come in the same order everywhere.

    Methods block (on CUDA: the current stream waits), so what they were handed may be changed afterwards.
    """

    def __init__(self, *, ranks: Sequence[int], rank: int, device: str, open_channel: OpenChannel) -> None:
        """`ranks`: global ranks that decode together, in order; `rank` is this one. Does not communicate yet."""
        self.size, self.index = len(ranks), list(ranks).index(rank)
        self._ranks, self._device, self._open_channel = tuple(ranks), torch.device(device), open_channel
        self._epoch = 0
        self._channel: Channel | None = None

    def begin(self, epoch: int = 0) -> None:
        """Before anything else. All ranks of the group call it, and wait for each other the first time. In a larger
        `epoch` than before the group is made anew: something failed, and messages may be left in the old one."""
        assert epoch >= self._epoch, (epoch, self._epoch)
        if epoch > self._epoch:
            self.reset()
            self._epoch = epoch
        if self._channel is None:
            self._channel = self._open_channel(f"rows/{epoch}", self._ranks)

    def reset(self) -> None:
        """Ends the group after a failure, so that ranks which wait for this one fail too (with gloo, at once). It is
        made anew in the next epoch."""
        if self._channel is not None:
            self._channel.abandon()
        self._channel = None

    def close(self) -> None:
        """Ends the group; every rank calls it."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None

    def shares(self, total: int, members: int) -> tuple[int, ...]:
        assert 1 <= members <= self.size, (members, self.size)
        return (*split_evenly(total, members), *[0] * (self.size - members))

    def with_edges(self, tensors: Sequence[torch.Tensor], members: int) -> list[torch.Tensor]:
        """Memory: a copy of each tensor, and of its two outermost rows."""
        outgoing, incoming = self._nothing(), self._nothing()
        above = self.index - 1 if self.index > 0 else None
        below = self.index + 1 if self.index + 1 < members else None
        for neighbour, row in ((above, 0), (below, -1)):
            if neighbour is not None:
                edges = torch.cat([x[..., row, :].flatten() for x in tensors])
                outgoing[neighbour], incoming[neighbour] = edges, torch.empty_like(edges)
        self._swap(outgoing, incoming)
        tops = _unpacked(None if above is None else incoming[above], tensors)
        bottoms = _unpacked(None if below is None else incoming[below], tensors)
        return [torch.cat([*top, x, *bottom], dim=-2) for top, x, bottom in zip(tops, tensors, bottoms, strict=True)]

    def gather_rows(self, tensor: torch.Tensor, shares: Sequence[int]) -> torch.Tensor:
        """Memory: the whole tensor twice for a moment."""
        assert tensor.shape[-2] == shares[self.index] > 0, (tensor.shape, shares, self.index)
        own, columns = tensor.contiguous(), tensor.shape[-1]
        incoming = [own.new_empty(*tensor.shape[:-2], rows, columns) for rows in shares]
        incoming[self.index] = own
        outgoing = [own if rows > 0 else None for rows in shares]
        self._swap(outgoing, incoming)
        return torch.cat(incoming, dim=-2)

    def collect(self, own: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor] | None:
        assert own.ndim == 1, own.shape
        outgoing, incoming = self._nothing(), self._nothing()
        if self.index > 0:
            outgoing[0] = own.contiguous()
            self._swap(outgoing, incoming)
            return None
        assert counts[0] == len(own), (counts, own.shape)
        pieces = [own, *(own.new_empty(count) for count in counts[1:])]
        incoming[1:] = pieces[1:]
        self._swap(outgoing, incoming)
        return pieces

    def gather_all(self, own: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Memory: the tensors of all ranks. Two messages each way, and the host waits for the first."""
        own = None if own is None else own.contiguous()
        header = torch.tensor(_header(own), device=self._device)
        headers = [torch.empty_like(header) for _ in range(self.size)]
        self._swap([header] * self.size, headers)
        incoming = [_announced(numbers, self._device) for numbers in torch.stack(headers).tolist()]
        incoming[self.index] = own
        self._swap([own] * self.size, incoming)
        return incoming

    def pass_on(self, outgoing: torch.Tensor | None, incoming: torch.Tensor | None) -> None:
        out, back = self._nothing(), self._nothing()
        out[(self.index + 1) % self.size] = outgoing
        back[(self.index - 1) % self.size] = incoming
        self._swap(out, back)

    def _swap(self, outgoing: Sequence[torch.Tensor | None], incoming: Sequence[torch.Tensor | None]) -> None:
        assert self._channel is not None, "begin first"
        self._channel.swap(outgoing, incoming).wait()

    def _nothing(self) -> list[torch.Tensor | None]:
        return [None] * self.size


def _header(tensor: torch.Tensor | None) -> list[int]:
    if tensor is None:
        return [_NOTHING] * (1 + _MOST_DIMENSIONS)
    assert tensor.ndim <= _MOST_DIMENSIONS, tensor.shape
    return [_DTYPES.index(tensor.dtype), *tensor.shape, *[_NOTHING] * (_MOST_DIMENSIONS - tensor.ndim)]


def _announced(header: Sequence[int], device: torch.device) -> torch.Tensor | None:
    dtype, *shape = header
    if dtype == _NOTHING:
        return None
    return torch.empty([size for size in shape if size != _NOTHING], dtype=_DTYPES[dtype], device=device)


def _unpacked(edges: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """One row for each tensor, in a list; empty lists where no edges came."""
    if edges is None:
        return [[] for _ in tensors]
    sizes = [x[..., :1, :].numel() for x in tensors]
    assert sum(sizes) == len(edges), (sizes, edges.shape)
    starts = itertools.accumulate(sizes, initial=0)
    return [
        [edges[start : start + size].view_as(x[..., :1, :])]
        for start, size, x in zip(starts, sizes, tensors, strict=False)
    ]
