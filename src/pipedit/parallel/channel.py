"""A channel: point-to-point swaps of tensors among the ranks of one process group, in the background.

Each direction of traffic has a channel, and so a process group (on CUDA: a communicator and its stream), of its own:
what leaves never queues behind what arrives.
"""

import contextlib
import datetime
import enum
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Transport(enum.StrEnum):
    """Grouped sends and receives, or the all-to-all of the backend (NCCL), which does the same with fewer messages."""

    POINT_TO_POINT = "point_to_point"
    COLLECTIVE = "collective"


_TAG = 0  # messages are told apart by their order
_NEVER_SENT = 1
_AT_ONCE = datetime.timedelta(milliseconds=1)


class Pending:
    """A swap on its way. Holds its tensors until it is waited for."""

    def __init__(self, receives: Sequence[Any] = (), sends: Sequence[Any] = (), keep: Sequence[Any] = ()) -> None:
        self._receives, self._sends, self._keep = tuple(receives), tuple(sends), tuple(keep)

    def wait_received(self) -> None:
        """What comes in is there (on CUDA: the current stream waits for it). What goes out may still be read."""
        receives, self._receives = self._receives, ()
        for work in receives:
            work.wait()

    def wait(self, limit: datetime.timedelta | None = None) -> None:
        """Both ways are done: all buffers may be used again. Calling it twice is harmless. `limit`, for gloo only: for
        each send, beyond which the group fails."""
        self.wait_received()
        sends, self._sends = self._sends, ()
        for work in sends:
            work.wait() if limit is None else work.wait(limit)
        self._keep = ()


class Channel:
    """This rank's end of one process group, for one direction of traffic. A channel of one member only copies."""

    def __init__(self, group: Any = None) -> None:
        """`group`: a backend of torch.distributed (see groups.py), None where this rank is the only member."""
        self._group = group
        self.size: int = 1 if group is None else group.size()
        self.index: int = 0 if group is None else group.rank()
        self._is_nccl = group is not None and group.name() == "nccl"

    @property
    def waits_on_host(self) -> bool:
        """Whether waiting for a swap holds up this thread (gloo) or only what is computed later on the device."""
        return not self._is_nccl

    def close(self) -> None:
        """Ends the process group; every member does. Nothing may be on its way."""
        if self._group is not None:
            self._group.shutdown()
        self._group = None

    def abandon(self) -> None:
        """Ends the process group after a failure, whatever is on its way. With gloo, members that wait for this one
        fail at once; with NCCL when their timeout is over."""
        group, self._group = self._group, None
        if group is None:
            return
        if self._is_nccl:
            group.abort()
            return
        # gloo has no such call, but closes all connections of a group when a receive runs out of time.
        with contextlib.suppress(RuntimeError):
            group.recv([torch.empty(1)], (self.index + 1) % self.size, _NEVER_SENT).wait(_AT_ONCE)

    def swap(
        self,
        outgoing: Sequence[torch.Tensor | None],
        incoming: Sequence[torch.Tensor | None],
        transport: Transport = Transport.POINT_TO_POINT,
    ) -> Pending:
        """Starts to send outgoing[i] to member i and to fill incoming[i] from member i; all contiguous, None or empty
        where nothing goes that way. What one member sends another expects, in equal size and order of calls. The own
        entry is copied at once. Memory: none of its own; the tensors are held until the result is waited for.

        Every receive is posted before the first send: both directions of the link are then used at once (gloo's
        all_to_all often is half-duplex for large messages).
        """
        assert len(outgoing) == len(incoming) == self.size
        own_out, own_in = outgoing[self.index], incoming[self.index]
        if own_in is not None and own_out is not None and own_in is not own_out:
            own_in.copy_(own_out.view_as(own_in))
        if transport is Transport.COLLECTIVE and self._is_nccl:
            return self._all_to_all(outgoing, incoming)
        receives, sends = self._travelling(incoming), self._travelling(outgoing)
        if self._is_nccl:
            return self._batched(sends, receives)
        received = [self._group.recv([x], i, _TAG) for i, x in receives]
        # Each starts with its successor, so that not everybody sends to the same member first.
        sends.sort(key=lambda entry: (entry[0] - self.index) % self.size)
        sent = [self._group.send([x], i, _TAG) for i, x in sends]
        return Pending(received, sent, [outgoing, incoming])

    def _travelling(self, tensors: Sequence[torch.Tensor | None]) -> list[tuple[int, torch.Tensor]]:
        """What really goes to or comes from others, with the member."""
        return [(i, x) for i, x in enumerate(tensors) if i != self.index and x is not None and x.numel() > 0]

    def _batched(
        self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]]
    ) -> Pending:
        """NCCL wants them in one group: a lone receive would block the stream on which the send has to run."""
        if not sends and not receives:
            return Pending()
        self._group._start_coalescing()
        for member, tensor in receives:
            self._group.recv([tensor], member, _TAG)
        for member, tensor in sends:
            self._group.send([tensor], member, _TAG)
        return Pending([self._group._end_coalescing()], keep=[sends, receives])

    def _all_to_all(self, outgoing: Sequence[torch.Tensor | None], incoming: Sequence[torch.Tensor | None]) -> Pending:
        some = next(x for x in (*outgoing, *incoming) if x is not None)
        nothing = some.new_empty(0)
        out = [nothing if x is None or i == self.index else x.flatten() for i, x in enumerate(outgoing)]
        back = [nothing if x is None or i == self.index else x.view(-1) for i, x in enumerate(incoming)]
        return Pending([self._group.alltoall(back, out)], keep=[out, back, outgoing, incoming])

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of each value over the members, which all call this."""
        if self._group is not None:
            self._group.allreduce([values], dist.ReduceOp.MAX).wait()
        return values
