"""A channel: point-to-point swaps of tensors among the ranks of one process group, in the background.

Each direction of traffic has a channel, and so a process group (on CUDA: a communicator and its stream), of its own:
what leaves never queues behind what arrives.
"""

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


class Pending:
    """A swap on its way. Holds its tensors until it is waited for."""

    def __init__(self, receives: Sequence[Any] = (), sends: Sequence[Any] = (), keep: Sequence[Any] = ()) -> None:
        self._receives, self._sends, self._keep = tuple(receives), tuple(sends), tuple(keep)

    def wait_received(self) -> None:
        """What comes in is there (on CUDA: the current stream waits for it). What goes out may still be read."""
        receives, self._receives = self._receives, ()
        for work in receives:
            work.wait()

    def wait(self) -> None:
        """Both ways are done: all buffers may be used again. Calling it twice is harmless."""
        self.wait_received()
        sends, self._sends = self._sends, ()
        for work in sends:
            work.wait()
        self._keep = ()


class Channel:
    """One process group and one direction of traffic. A channel of one member only copies."""

    def __init__(self, ranks: Sequence[int], rank: int, group: dist.ProcessGroup | None = None) -> None:
        """`ranks`: global ranks of the members in order; `rank` is this one; `group` may be None for one member."""
        assert group is not None or len(ranks) == 1, ranks
        self.ranks, self.index, self.group = tuple(ranks), list(ranks).index(rank), group
        self._is_nccl = group is not None and dist.get_backend(group) == "nccl"

    @classmethod
    def open(
        cls,
        groups: Sequence[Sequence[int]],
        rank: int,
        *,
        device: torch.device,
        timeout: datetime.timedelta,
    ) -> "Channel":
        """Makes a process group for each of `groups` (disjoint; one holds `rank`) and returns the one of `rank`.

        Every rank of torch.distributed calls this, with the same groups and in the same order: torch names process
        groups by how many there were before, and groups that are made among some ranks only may get other names on
        each of them and then wait for ever.
        """
        backend = "nccl" if device.type == "cuda" else "gloo"
        mine = None
        for ranks in groups:
            group = dist.new_group(list(ranks), timeout=timeout, backend=backend) if len(ranks) > 1 else None
            if rank in ranks:
                mine = cls(ranks, rank, group)
        assert mine is not None, f"rank {rank} is in none of {groups}"
        if mine.group is not None and backend == "nccl":
            # The communicator is made by the first operation, which needs every member; later ones may skip some.
            dist.all_reduce(torch.zeros(1, device=device), group=mine.group)
        return mine

    def close(self) -> None:
        """Ends the process group; every member does. Nothing may be on its way."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None

    @property
    def size(self) -> int:
        return len(self.ranks)

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
        received = [dist.irecv(x, src=self.ranks[i], group=self.group) for i, x in receives]
        # Each starts with its successor, so that not everybody sends to the same member first.
        sends.sort(key=lambda entry: (entry[0] - self.index) % self.size)
        sent = [dist.isend(x, dst=self.ranks[i], group=self.group) for i, x in sends]
        return Pending(received, sent, [outgoing, incoming])

    def _travelling(self, tensors: Sequence[torch.Tensor | None]) -> list[tuple[int, torch.Tensor]]:
        """What really goes to or comes from others, with the member."""
        return [(i, x) for i, x in enumerate(tensors) if i != self.index and x is not None and x.numel() > 0]

    def _batched(
        self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]]
    ) -> Pending:
        """NCCL wants them in one group: a lone receive would block the stream on which the send has to run."""
        operations = [dist.P2POp(dist.irecv, x, self.ranks[i], self.group) for i, x in receives]
        operations += [dist.P2POp(dist.isend, x, self.ranks[i], self.group) for i, x in sends]
        works = dist.batch_isend_irecv(operations) if operations else []
        return Pending(works, keep=[sends, receives])

    def _all_to_all(self, outgoing: Sequence[torch.Tensor | None], incoming: Sequence[torch.Tensor | None]) -> Pending:
        some = next(x for x in (*outgoing, *incoming) if x is not None)
        nothing = some.new_empty(0)
        out = [nothing if x is None or i == self.index else x.flatten() for i, x in enumerate(outgoing)]
        back = [nothing if x is None or i == self.index else x.view(-1) for i, x in enumerate(incoming)]
        work = dist.all_to_all(back, out, group=self.group, async_op=True)
        return Pending([work], keep=[out, back, outgoing, incoming])

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of each value over the members, which all call this."""
        if self.group is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values
