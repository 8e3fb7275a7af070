"""Process groups made among their members only, over a store that all ranks reach.

torch.distributed.new_group has to be called by every rank there is. Ranks that play different roles cannot do that:
while some of them meet, others are busy. So its backends are used directly, and torch.distributed is not initialised.
"""

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipedit.parallel.channel import Channel

# A dead neighbour is noticed at once by its closed connection, or by whoever started the ranks; this is for one that
# hangs.
TIMEOUT = datetime.timedelta(minutes=10)

# (name, members) -> this rank's end of a channel among them. The members, global ranks of which this is one, are in the
# order of their indices. All of them call it, with the same arguments, and wait for each other; nobody else takes part.
OpenChannel = Callable[[str, Sequence[int]], Channel]


def channel_opener(store: Any, *, rank: int, device: str, timeout: datetime.timedelta = TIMEOUT) -> OpenChannel:
    """Opens channels for tensors on `device`: over NCCL on CUDA, over gloo on the CPU. `store`: one of
    torch.distributed's, that all ranks reach. `timeout` limits every wait for another member, the one for its coming
    included.

    Within a store a name is used once by the same members: they would read what they wrote there the first time.
    """
    used: set[str] = set()

    def open_channel(name: str, members: Sequence[int]) -> Channel:
        if len(members) == 1:
            return Channel()
        prefix = f"{name}/{','.join(map(str, members))}"
        assert prefix not in used, f"{prefix} was opened before; after a failure go on in a new epoch"
        used.add(prefix)
        place = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
        index, size = list(members).index(rank), len(members)
        if torch.device(device).type == "cuda":
            return Channel(_nccl(place, index, size, device, timeout))
        return Channel(dist.ProcessGroupGloo(place, index, size, timeout))

    return open_channel


def default_store(prefix: str) -> Any:
    """The store of torch.distributed's default group, for names of our own. It has to be initialised."""
    group = dist.group.WORLD
    assert group is not None, "torch.distributed is not initialised"
    return dist.PrefixStore(prefix, group.get_group_store())  # type: ignore[attr-defined]


def _nccl(store: Any, index: int, size: int, device: str, timeout: datetime.timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    group: Any = dist.ProcessGroupNCCL(store, index, size, options)
    # The communicator is made by the first operation, which needs every member; later ones may skip some.
    group.allreduce([torch.zeros(1, device=device)]).wait()
    return group
