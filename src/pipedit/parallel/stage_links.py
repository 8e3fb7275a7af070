"""What stages of a layer pipeline send each other: hidden states from each stage to the next, results from the last
one back to the first. Every hop has a channel of its own, so nothing queues behind what goes elsewhere.

Both ends of a hop know what comes next, so a message is only its tensors. Receives are posted before they are needed,
and sends are not waited for (double buffering): a message travels while the next one is computed.
"""

import collections
import dataclasses
from collections.abc import Sequence

import torch

from pipedit.parallel.channel import Channel, Pending
from pipedit.parallel.groups import OpenChannel

_UNDER_WAY = 2  # messages that a sender keeps while it goes on

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parcel:
    """Sizes of the tensors of one message, and their type."""

    shapes: tuple[Shape, ...]
    dtype: torch.dtype


class Inbox:
    """The receiving end of a hop. Messages are taken in the order in which they were expected."""

    def __init__(self, channel: Channel, device: str) -> None:
        self._channel, self._device = channel, device
        self._expected: collections.deque[tuple[tuple[torch.Tensor, ...], list[Pending]]] = collections.deque()

    @property
    def waiting(self) -> int:
        """Messages that were expected and not taken."""
        return len(self._expected)

    def expect(self, parcel: Parcel) -> None:
        """Starts to receive the next message. Memory: its tensors, until they are taken."""
        tensors = tuple(torch.empty(shape, dtype=parcel.dtype, device=self._device) for shape in parcel.shapes)
        self._expected.append((tensors, [self._channel.swap((None, None), (tensor, None)) for tensor in tensors]))

    def take(self) -> tuple[torch.Tensor, ...]:
        """Waits for the oldest expected message."""
        tensors, coming = self._expected.popleft()
        for pending in coming:
            pending.wait()
        return tensors

    def close(self) -> None:
        self._channel.close()

    def abandon(self) -> None:
        self._channel.abandon()


class Outbox:
    """The sending end of a hop."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._leaving: collections.deque[list[Pending]] = collections.deque()

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        """Starts to send; waits only for the message before the one before. The tensors must not change any more."""
        while len(self._leaving) >= _UNDER_WAY:
            self._wait_for_oldest()
        self._leaving.append([self._channel.swap((None, tensor.contiguous()), (None, None)) for tensor in tensors])

    def flush(self) -> None:
        """Waits until everything has arrived."""
        while self._leaving:
            self._wait_for_oldest()

    def close(self) -> None:
        self.flush()
        self._channel.close()

    def abandon(self) -> None:
        self._channel.abandon()

    def _wait_for_oldest(self) -> None:
        for pending in self._leaving.popleft():
            pending.wait()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageLinks:
    """One stage's ends. `before` and `after`: hidden states in and out; `results`: what the last stage sends to the
    first, an Inbox there and an Outbox here. None where the stage has no such end, or is alone."""

    before: Inbox | None = None
    after: Outbox | None = None
    results_in: Inbox | None = None
    results_out: Outbox | None = None

    @classmethod
    def open(
        cls, ranks: Sequence[int], rank: int, *, device: str, open_channel: OpenChannel, epoch: int
    ) -> "StageLinks":
        """`ranks`: the stages in order, which all do this at the same time; `rank` is one of them. `epoch` as in the
        runtime: a number that is larger than after the last failure."""
        number, last = list(ranks).index(rank), len(ranks) - 1
        if last == 0:
            return cls()

        def hop(name: str, source: int, target: int) -> Channel:
            return open_channel(f"stages/{epoch}/{name}", (ranks[source], ranks[target]))

        # Everybody meets its neighbours in the order of the hops, so nobody waits in a circle.
        before = Inbox(hop("hidden", number - 1, number), device) if number > 0 else None
        after = Outbox(hop("hidden", number, number + 1)) if number < last else None
        results_in = Inbox(hop("results", last, 0), device) if number == 0 else None
        results_out = Outbox(hop("results", last, 0)) if number == last else None
        return cls(before=before, after=after, results_in=results_in, results_out=results_out)

    def close(self) -> None:
        """Ends the channels; every stage does, when all messages were taken."""
        for end in self._ends():
            end.close()

    def abandon(self) -> None:
        """After a failure: stages that wait for this one fail too."""
        for end in self._ends():
            end.abandon()

    def _ends(self) -> list[Inbox | Outbox]:
        return [end for end in (self.before, self.after, self.results_in, self.results_out) if end is not None]
