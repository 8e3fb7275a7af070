"""Channels between threads of one process whose transfers are as late as they may be, on the CPU or on one CUDA device.

A transfer is made by the receiver when it waits, on CUDA after a pause on a side stream: whoever reads too early or
writes too early into what is still leaving gets wrong numbers. It stands in for ranks on CUDA where there is one GPU,
since NCCL refuses two ranks on one and gloo has no point-to-point transfer of CUDA tensors.
"""

import collections
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from pipedit.parallel.channel import Channel, Pending, Transport
from pipedit.parallel.groups import OpenChannel

Result = TypeVar("Result")
TIMEOUT_S = 60.0
PAUSE_CYCLES = 2_000_000  # about a millisecond


class Board:
    """Where senders leave word. Keys are (channel, sender, receiver, number of the message)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._boxes: dict[Any, queue.Queue[Any]] = {}

    def box(self, *key: Any) -> "queue.Queue[Any]":
        with self._lock:
            return self._boxes.setdefault(key, queue.Queue())


class StreamChannel(Channel):
    """`name` tells the channels of one board apart."""

    @classmethod
    def opener(cls, board: Board, rank: int) -> OpenChannel:
        """For ranks that are threads on the CPU."""

        def open_channel(name: str, members: Sequence[int]) -> Channel:
            if len(members) == 1:
                return Channel()
            return cls(board, (name, *members), len(members), list(members).index(rank), torch.device("cpu"))

        return open_channel

    def __init__(self, board: Board, name: Any, size: int, index: int, device: torch.device) -> None:
        super().__init__()
        self.size, self.index = size, index
        self._board, self._name, self._device = board, name, device
        self._numbers: collections.Counter[tuple[int, int]] = collections.Counter()
        self._line = torch.cuda.Stream(device) if device.type == "cuda" else None

    def swap(
        self,
        outgoing: Sequence[torch.Tensor | None],
        incoming: Sequence[torch.Tensor | None],
        transport: Transport = Transport.POINT_TO_POINT,
    ) -> Pending:
        assert len(outgoing) == len(incoming) == self.size
        ready = torch.cuda.current_stream(self._device).record_event() if self._line else None
        sends, receives = [], []
        for member, (sent, got) in enumerate(zip(outgoing, incoming, strict=True)):
            if member == self.index:
                if sent is not None and got is not None and got is not sent:
                    got.copy_(sent.view_as(got))
                continue
            if sent is not None and sent.numel():
                assert sent.is_contiguous()
                done: queue.Queue[Any] = queue.Queue()
                self._box(self.index, member).put((sent, ready, done))
                sends.append(_Waitable(lambda done=done: self._follow(done.get(timeout=TIMEOUT_S))))  # type: ignore[misc]
            if got is not None and got.numel():
                assert got.is_contiguous()
                box = self._box(member, self.index)
                receives.append(_Waitable(lambda box=box, got=got: self._receive(box, got, ready)))  # type: ignore[misc]
        return Pending(receives, sends)

    def max(self, values: torch.Tensor) -> torch.Tensor:
        others = [member != self.index for member in range(self.size)]
        incoming = [torch.empty_like(values) if is_other else None for is_other in others]
        self.swap([values if is_other else None for is_other in others], incoming).wait()
        return torch.stack([values if each is None else each for each in incoming]).amax(0)

    def _box(self, sender: int, receiver: int) -> "queue.Queue[Any]":
        number = self._numbers[sender, receiver]
        self._numbers[sender, receiver] += 1
        return self._board.box(self._name, sender, receiver, number)

    def _receive(self, box: "queue.Queue[Any]", target: torch.Tensor, ready: Any) -> None:
        sent, sent_ready, done = box.get(timeout=TIMEOUT_S)
        assert sent.dtype == target.dtype and sent.numel() == target.numel()
        if self._line is None:
            target.copy_(sent.view_as(target))
            done.put(None)
            return
        self._line.wait_event(sent_ready)
        self._line.wait_event(ready)
        with torch.cuda.stream(self._line):
            torch.cuda._sleep(PAUSE_CYCLES)
            target.copy_(sent.view_as(target), non_blocking=True)
            arrived = self._line.record_event()
        done.put(arrived)
        self._follow(arrived)

    def _follow(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


class _Waitable:
    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait


def run_members(size: int, device: torch.device, member: Callable[[Board, int], Result]) -> list[Result]:
    """`member(board, index)` in `size` threads, on CUDA each with a stream of its own; what they return, in order."""
    board = Board()

    def run(index: int) -> Result:
        on_cuda = device.type == "cuda"
        stream = torch.cuda.stream(torch.cuda.Stream(device)) if on_cuda else contextlib.nullcontext()
        with torch.inference_mode(), stream:
            result = member(board, index)
            if on_cuda:
                torch.cuda.synchronize(device)  # before buffers are freed that others may still read
            return result

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))
