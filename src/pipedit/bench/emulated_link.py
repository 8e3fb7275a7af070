"""A link to ranks that are not there: takes as long as a real one of a stated rate, so that one device can show what a
strategy hides. Nothing is received; what this rank would send comes back to it, so that buffers hold sensible numbers.

On the CPU a transfer only takes time. On CUDA it is copies within the device's memory on a side stream, one for each
message, each followed by a spinning thread until a link of the rate would have delivered it: so it uses the memory and
the scheduling of the GPU about as a real transfer does, which a mere wait would not.
"""

import abc
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from pipedit.parallel.channel import Channel, Pending, Transport

Message = tuple[torch.Tensor, torch.Tensor]  # what leaves, and what arrives instead of it: of equal size


class EmulatedLink(abc.ABC):
    """One full-duplex link of a rank. All its channels share it and are served in the order in which they post, since
    on a real rank, too, both directions of an exchange send through the same port."""

    def __init__(self, bytes_per_s: float) -> None:
        """`bytes_per_s` each way; math.inf: as fast as it goes."""
        self._bytes_per_s = bytes_per_s

    @abc.abstractmethod
    def open_line(self) -> Any:
        """What each channel has of its own."""

    @abc.abstractmethod
    def transfer(self, messages: Sequence[Message], line: Any) -> Any:
        """Starts it; returns what can be waited for."""

    @abc.abstractmethod
    def take_busy_s(self) -> float:
        """How long it carried something since it was last asked."""


class EmulatedChannel(Channel):
    """A group of `size` in which this rank is the first and the others are not there; for even splits only."""

    def __init__(self, size: int, link: EmulatedLink | None) -> None:
        """Without a link everything is there at once, and nothing moves."""
        super().__init__()
        self.size, self._link = size, link
        self._line = link.open_line() if link else None

    def swap(
        self,
        outgoing: Sequence[torch.Tensor | None],
        incoming: Sequence[torch.Tensor | None],
        transport: Transport = Transport.POINT_TO_POINT,
    ) -> Pending:
        if self._link is None:
            return Pending()
        pairs = zip(outgoing, incoming, strict=True)
        messages = [(sent, got) for sent, got in pairs if sent is not None and got is not None and got is not sent]
        assert all(sent.numel() == got.numel() for sent, got in messages), "splits are not even"
        return Pending([self._link.transfer(messages, self._line)])


def open_link(device: torch.device, bytes_per_s: float) -> EmulatedLink:
    return CopyingLink(device, bytes_per_s) if device.type == "cuda" else SleepingLink(bytes_per_s)


def _size_bytes(messages: Sequence[Message]) -> int:
    return sum(sent.nbytes for sent, _ in messages)


class SleepingLink(EmulatedLink):
    """On the CPU. Data are ready when they are posted there, so the time of arrival is known at once."""

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__(bytes_per_s)
        self._free_at_s = self._busy_s = 0.0

    def open_line(self) -> None:
        return None

    def transfer(self, messages: Sequence[Message], line: None) -> "_Arrival":
        for sent, got in messages:
            got.copy_(sent.view_as(got))
        took_s = _size_bytes(messages) / self._bytes_per_s
        self._busy_s += took_s
        self._free_at_s = max(time.perf_counter(), self._free_at_s) + took_s
        return _Arrival(self._free_at_s)

    def take_busy_s(self) -> float:
        busy_s, self._busy_s = self._busy_s, 0.0
        return busy_s


class _Arrival:
    def __init__(self, at_s: float) -> None:
        self._at_s = at_s

    def wait(self) -> None:
        time.sleep(max(self._at_s - time.perf_counter(), 0.0))


class CopyingLink(EmulatedLink):
    """On CUDA. Each channel has a stream of high priority, as communicators do."""

    def __init__(self, device: torch.device, bytes_per_s: float) -> None:
        super().__init__(bytes_per_s)
        self._device = device
        self._free: torch.cuda.Event | None = None
        self._transfers: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._cycles_per_s = _measure_cycles_per_s(device)
        self._copied_bytes_per_s = _measure_copied_bytes_per_s(device)

    def open_line(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device, priority=-1)

    def transfer(self, messages: Sequence[Message], line: torch.cuda.Stream) -> "_Copied":
        line.wait_stream(torch.cuda.current_stream(self._device))  # what leaves is written by then
        if self._free is not None:
            line.wait_event(self._free)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(line):
            start.record()
            for sent, got in messages:
                got.copy_(sent.view_as(got), non_blocking=True)
                if (cycles := self._spare_cycles(sent.nbytes)) > 0:
                    torch.cuda._sleep(cycles)
            end.record()
        self._free = end
        self._transfers.append((start, end))
        return _Copied(end, self._device)

    def take_busy_s(self) -> float:
        """After a synchronisation. Longer than the rate says where attention slows the copies down, or a GPU under
        load lowers its clock, which the spinning counts in."""
        transfers, self._transfers = self._transfers, []
        return float(sum(start.elapsed_time(end) for start, end in transfers)) / 1000

    def _spare_cycles(self, payload_bytes: int) -> int:
        """Cycles between the end of an undisturbed copy and the time at which the link would have delivered it."""
        if math.isinf(self._bytes_per_s):
            return 0
        spare_s = payload_bytes / self._bytes_per_s - payload_bytes / self._copied_bytes_per_s
        return int(spare_s * self._cycles_per_s)


class _Copied:
    def __init__(self, end: torch.cuda.Event, device: torch.device) -> None:
        self._end, self._device = end, device

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._end)


def _measure_cycles_per_s(device: torch.device, cycles: int = 20_000_000) -> float:
    return cycles / _elapsed_s(device, lambda: torch.cuda._sleep(cycles))


def _measure_copied_bytes_per_s(device: torch.device, size_bytes: int = 64 << 20) -> float:
    source, target = (torch.empty(size_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return size_bytes / _elapsed_s(device, lambda: target.copy_(source))


def _elapsed_s(device: torch.device, work: Any) -> float:
    """Seconds of the second of two runs."""
    with torch.cuda.device(device):
        for _ in range(2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1000
