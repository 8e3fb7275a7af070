"""What stages of a layer pipeline send each other: hidden states from each stage to the next, results from the last
one back to the first. Every hop has a channel of its own, so nothing queues behind what goes elsewhere.

Both ends of a hop know what comes next, so a message is only its tensors. Receives are posted before they are needed,
and sends are not waited for (double buffering): a message travels while the next one is computed.

With gloo the receiver grants every message: it tells the sender when it expects it, and how many it has taken. gloo
never wakes who waits for a send that was being written when the connection ended; who waits for a grant is woken, since
that is a receive. (A receive in the middle of a message is not woken either, so who gives up lets it arrive first.)
"""

import collections
import contextlib
import dataclasses
import datetime
from collections.abc import Sequence

import torch

from pipedit.parallel.channel import Channel, Pending
from pipedit.parallel.groups import OpenChannel

_UNDER_WAY = 2  # messages that a sender keeps while it goes on, where nothing is granted
_ARRIVES = datetime.timedelta(seconds=60)  # a message that is expected, on any link
_GIVES_UP = datetime.timedelta(seconds=2)

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
        self._taken = 0
        self._grants: collections.deque[Pending] = collections.deque()  # of what is expected

    @property
    def waiting(self) -> int:
        """Messages that were expected and not taken."""
        return len(self._expected)

    def expect(self, parcel: Parcel) -> None:
        """Starts to receive the next message. Memory: its tensors, until they are taken."""
        tensors = tuple(torch.empty(shape, dtype=parcel.dtype, device=self._device) for shape in parcel.shapes)
        coming = [self._channel.swap((None, None), (tensor, None)) for tensor in tensors]
        if self._channel.waits_on_host:
            self._grants.append(self._channel.swap((torch.tensor([self._taken]), None), (None, None)))
        self._expected.append((tensors, coming))

    def take(self) -> tuple[torch.Tensor, ...]:
        """Waits for the oldest expected message."""
        tensors, coming = self._expected.popleft()
        for pending in coming:
            pending.wait()
        self._taken += 1
        if self._grants:
            self._grants.popleft()  # the sender has it, since the message has come
        return tensors

    def abandon(self) -> None:
        self._channel.abandon()


class Outbox:
    """The sending end of a hop."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._limit = _ARRIVES if channel.waits_on_host else None
        self._leaving: collections.deque[list[Pending]] = collections.deque()
        self._gone = 0  # messages that have arrived
        self._grant = self._ask() if channel.waits_on_host else None

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        """Starts to send, as soon as the receiver expects it. Memory: the tensors, until they were taken; they must not
        change any more."""
        if self._grant is not None:
            taken, coming = self._grant
            coming.wait()
            while self._gone < int(taken):
                self._leaving.popleft()  # nothing is left to wait for
                self._gone += 1
            self._grant = self._ask()
        while self._grant is None and len(self._leaving) >= _UNDER_WAY:
            self._wait_for_oldest()
        self._leaving.append([self._channel.swap((None, tensor.contiguous()), (None, None)) for tensor in tensors])

    def flush(self) -> None:
        """Waits until everything has arrived."""
        while self._leaving:
            self._wait_for_oldest()

    def abandon(self) -> None:
        if self._channel.waits_on_host:
            self._limit = _GIVES_UP
            with contextlib.suppress(RuntimeError):
                self.flush()
        self._channel.abandon()

    def _ask(self) -> tuple[torch.Tensor, Pending]:
        """For the next message's grant: how many were taken by then, when it has come."""
        taken = torch.empty(1, dtype=torch.int64)
        return taken, self._channel.swap((None, None), (None, taken))

    def _wait_for_oldest(self) -> None:
        for pending in self._leaving.popleft():
            pending.wait(self._limit)
        self._gone += 1


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

    def abandon(self) -> None:
        """Ends the channels, after a failure too: stages that wait for this one fail. What was sent still arrives where
        it is expected."""
        for end in self._ends():
            end.abandon()

    def _ends(self) -> list[Inbox | Outbox]:
        return [end for end in (self.before, self.after, self.results_in, self.results_out) if end is not None]
