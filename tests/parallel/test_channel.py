"""Channels on NCCL, as far as they can be tested without it: which calls its backend gets, and in which order."""

from typing import Any

import torch

from pipedit.parallel.channel import Channel, Transport
from pipedit.parallel.groups import channel_opener

Calls = list[tuple[Any, ...]]


class Work:
    def wait(self) -> None: ...


class Nccl:
    """Writes down what is asked of it. This is member 1 of 3."""

    def __init__(self) -> None:
        self.calls: Calls = []

    def name(self) -> str:
        return "nccl"

    def size(self) -> int:
        return 3

    def rank(self) -> int:
        return 1

    def send(self, tensors: list[torch.Tensor], member: int, _tag: int) -> Work:
        return self._note("send", [x.numel() for x in tensors], member)

    def recv(self, tensors: list[torch.Tensor], member: int, _tag: int) -> Work:
        return self._note("recv", [x.numel() for x in tensors], member)

    def alltoall(self, output: list[torch.Tensor], given: list[torch.Tensor]) -> Work:
        return self._note("alltoall", [x.numel() for x in output], [x.numel() for x in given])

    def _start_coalescing(self) -> None:
        self._note("start")

    def _end_coalescing(self) -> Work:
        return self._note("end")

    def abort(self) -> None:
        self._note("abort")

    def shutdown(self) -> None:
        self._note("shutdown")

    def _note(self, *call: Any) -> Work:
        self.calls.append(call)
        return Work()


def swap(outgoing: tuple[int, ...], incoming: tuple[int, ...], transport: Transport) -> Calls:
    """Calls for so many elements to and from each member."""
    group = Nccl()
    out, back = ([torch.zeros(count) for count in counts] for counts in (outgoing, incoming))
    Channel(group).swap(out, back, transport).wait()
    return group.calls


def test_sends_and_receives_are_one_group_and_nothing_is_no_group() -> None:
    calls = swap((2, 1, 0), (3, 1, 4), Transport.POINT_TO_POINT)
    assert calls == [("start",), ("recv", [3], 0), ("recv", [4], 2), ("send", [2], 0), ("end",)]
    assert swap((0, 1, 0), (0, 1, 0), Transport.POINT_TO_POINT) == []


def test_the_collective_leaves_the_own_part_out() -> None:
    assert swap((2, 1, 0), (3, 1, 4), Transport.COLLECTIVE) == [("alltoall", [3, 0, 4], [2, 0, 0])]


def test_groups_end_in_order_or_at_once() -> None:
    for end, call in ((Channel.close, "shutdown"), (Channel.abandon, "abort")):
        group = Nccl()
        channel = Channel(group)
        end(channel)
        end(channel)
        assert group.calls == [(call,)]


def test_a_rank_alone_needs_no_group() -> None:
    channel = channel_opener(None, rank=7, device="cuda")("name", (7,))
    assert (channel.size, channel.index) == (1, 0)
    incoming: list[torch.Tensor | None] = [torch.zeros(3)]
    channel.swap([torch.ones(3)], incoming).wait()
    assert incoming[0] is not None and incoming[0].all()
    assert channel.max(torch.tensor([2.0])).tolist() == [2.0]
    channel.abandon()
