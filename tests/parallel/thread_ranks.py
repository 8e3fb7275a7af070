"""Ranks that are threads of this process, joined by queues: the quick way to test what is built on a channel."""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import torch

from pipedit.parallel.channel import Channel, Pending
from pipedit.parallel.groups import OpenChannel
from pipedit.parallel.rows import ChannelRows

Result = TypeVar("Result")
TIMEOUT_S = 30.0

Boxes = dict[tuple[int, int], "queue.Queue[torch.Tensor]"]  # sender, receiver -> what is under way


class ThreadChannel:
    """What a `Channel` does, between threads. `sent_values` counts what left this member."""

    def __init__(self, size: int, index: int, boxes: Boxes) -> None:
        self.size, self.index, self._boxes = size, index, boxes
        self.sent_values = 0

    def swap(self, outgoing: Sequence[torch.Tensor | None], incoming: Sequence[torch.Tensor | None]) -> Pending:
        assert len(outgoing) == len(incoming) == self.size
        for member, tensor in enumerate(outgoing):
            if tensor is not None and tensor.numel() > 0:
                assert tensor.is_contiguous()
                self._boxes[self.index, member].put(tensor.clone())
                self.sent_values += tensor.numel() if member != self.index else 0
        for member, tensor in enumerate(incoming):
            if tensor is not None and tensor.numel() > 0 and not (member == self.index and outgoing[member] is tensor):
                assert tensor.is_contiguous()
                arrived = self._boxes[member, self.index].get(timeout=TIMEOUT_S)
                assert arrived.dtype == tensor.dtype and arrived.numel() == tensor.numel()
                tensor.copy_(arrived.view_as(tensor))
        return Pending()


def run_on_threads(
    size: int, function: Callable[[ChannelRows], Result], group: type[ChannelRows] = ChannelRows
) -> list[Result]:
    """`function(group)` in `size` threads, each with its place in the group; what they return, by rank. Everything
    sent must have been taken."""
    boxes: Boxes = {(a, b): queue.Queue() for a in range(size) for b in range(size)}

    def opener(rank: int) -> OpenChannel:
        return lambda _name, _members: cast(Channel, ThreadChannel(size, rank, boxes))

    ranks = range(size)
    groups = [group(ranks=ranks, rank=rank, device="cpu", open_channel=opener(rank)) for rank in ranks]
    with ThreadPoolExecutor(size) as threads:
        results = list(threads.map(function, groups))
    left = {way: box.qsize() for way, box in boxes.items() if box.qsize() and way[0] != way[1]}
    assert not left, f"sent and never taken: {left}"
    return results
