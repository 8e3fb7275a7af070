"""How the ranks of a run find each other: one torch.distributed process group. Knows no commands and no models."""

import dataclasses
import datetime
import ipaddress
import os
import socket
import sys

import psutil

# A dead rank is noticed by whoever started it, at once. This is for ranks that wait for each other by mistake.
_GROUP_TIMEOUT = datetime.timedelta(minutes=10)
_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the store of the process group is, and which of this rank's addresses the other ranks reach (None: not
    known, so that torch has to guess).

    The store belongs to rank 0, which gets it as `listening`: the number of an open file, a socket that listens on
    `port` already. So the port is never free for others to take, and ranks may connect before rank 0 is up.
    """

    host: str
    port: int
    world_size: int
    own_address: str | None
    timeout_s: float
    listening: int | None = None


def join_group(rendezvous: Rendezvous, *, rank: int, device: str) -> None:
    """Initialises torch.distributed; every rank calls it, and it waits for all of them. gloo for tensors on the CPU,
    and NCCL for those on CUDA devices. Imports torch."""
    import torch
    import torch.distributed as dist

    name = interface_of(rendezvous.own_address) if rendezvous.own_address else None
    if name is not None:
        # Else gloo asks for the address of this machine's name, which often is none that others can reach.
        os.environ.setdefault(_INTERFACE, name)
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.set_device(device)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        rendezvous.host,
        rendezvous.port,
        rendezvous.world_size,
        is_master=rendezvous.listening is not None,
        timeout=datetime.timedelta(seconds=rendezvous.timeout_s),
        wait_for_workers=False,
        master_listen_fd=rendezvous.listening,
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        store=store,
        rank=rank,
        world_size=rendezvous.world_size,
        timeout=_GROUP_TIMEOUT,
    )


def leave_group() -> None:
    """Undoes `join_group`, if it was called. Does not load torch for it."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def interface_of(address: str) -> str | None:
    """The network interface that has this address, or None."""
    wanted = _plain(address)
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            if entry.family in (socket.AF_INET, socket.AF_INET6) and _plain(entry.address) == wanted:
                return name
    return None


def _plain(address: str) -> str:
    """One way of writing for equal addresses, and no zone behind a percent sign."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(parsed)
