"""How the ranks of a run find each other: over one store of torch.distributed. Knows no commands and no models."""

import dataclasses
import datetime
import ipaddress
import os
import socket
from typing import Any

import psutil

_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the store of the run is, and which of this rank's addresses the other ranks reach (None: not
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


def join_group(rendezvous: Rendezvous, *, device: str) -> Any:
    """The store of torch.distributed that all ranks reach, by which process groups are made (pipedit.parallel.groups).
    Waits for rank 0. torch.distributed itself is not initialised: that would need all ranks at once. Imports torch,
    and settles which network interface and which CUDA device its backends use."""
    import torch
    import torch.distributed as dist

    name = interface_of(rendezvous.own_address) if rendezvous.own_address else None
    if name is not None:
        # Else gloo asks for the address of this machine's name, which often is none that others can reach.
        os.environ.setdefault(_INTERFACE, name)
    for name in filter(None, os.environ.get(_INTERFACE, "").split(",")):
        dist.ProcessGroupGloo.create_device(interface=name)  # raises here, and not only in the first step
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    return dist.TCPStore(  # type: ignore[attr-defined]
        rendezvous.host,
        rendezvous.port,
        rendezvous.world_size,
        is_master=rendezvous.listening is not None,
        timeout=datetime.timedelta(seconds=rendezvous.timeout_s),
        wait_for_workers=False,
        master_listen_fd=rendezvous.listening,
    )


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
