"""Network namespaces with a limited link each, one for every rank of a benchmark. Linux, root, iproute2.

All names begin with "pd" and the id of this process, so that two runs never meet and what a killed run left behind is
recognised. Knows nothing of what is sent.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from pipedit.core.errors import PipeditError

DEVICE = "eth0"  # of each namespace
MAX_RANKS = 64
# Smaller, and every 64 KiB packet is split, which costs a core; larger, and idle time earns credit that makes
# transfers in pieces look faster than they are.
_BURST = "80kb"
_QUEUE = "8mb"
_NAME = re.compile(r"pd(\d+)(?:br|r\d+)")
_TIMEOUT_S = 20.0
_SYSTEM_FOLDERS = "/usr/sbin:/sbin"  # often missing in PATH


def requirement_problem() -> str | None:
    """Why there can be no namespaces here; begins with "needs"."""
    found = []
    if sys.platform != "linux":
        found.append("this is not Linux")
    elif os.geteuid() != 0:
        found.append("this process is not root")
    found += [f"{program} is not installed" for program in ("ip", "tc") if _find(program) is None]
    return f"needs root and iproute2 (ip, tc): {', '.join(found)}" if found else None


class Network:
    """`size` namespaces on one bridge. Made by `network`, which also removes it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._limits: list[float | None] = [None] * size

    def address(self, rank: int) -> str:
        return f"10.77.0.{rank + 1}"

    def enter(self, rank: int) -> list[str]:
        """What to put before a command line that shall run in the namespace of a rank."""
        return [_program("ip"), "netns", "exec", _name(rank)]

    def limit(self, bits_per_s: float | None) -> None:
        """Limits what each rank can send; None takes the limit off. What is on its way stays on its way."""
        for rank, before in enumerate(self._limits):
            if bits_per_s is not None:
                _limit(_name(rank), DEVICE, bits_per_s)
            elif before is not None:
                _run("tc", "-n", _name(rank), "qdisc", "del", "dev", DEVICE, "root")
            self._limits[rank] = bits_per_s

    def limit_inside(self, rank: int, bits_per_s: float) -> None:
        """Limits what processes in the namespace of a rank send to each other, both ways together."""
        _limit(_name(rank), "lo", bits_per_s)


@contextlib.contextmanager
def network(size: int) -> Iterator[Network]:
    """Builds a network and removes it whatever happens; before, it removes what processes that are no more have left
    behind. One at a time in a process. Raises PipeditError where it cannot be built."""
    assert 1 <= size <= MAX_RANKS, size
    if problem := requirement_problem():
        raise PipeditError(f"a network of ranks {problem}")
    _remove(lambda process: not psutil.pid_exists(process))
    try:
        _build(size)
        yield Network(size)
    finally:
        _remove(lambda process: process == os.getpid())


def _build(size: int) -> None:
    bridge = f"pd{os.getpid()}br"
    _run("ip", "link", "add", bridge, "type", "bridge")
    _run("ip", "link", "set", bridge, "up")
    for rank in range(size):
        name = _name(rank)
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", name, "type", "veth", "peer", "name", DEVICE, "netns", name)
        _run("ip", "link", "set", name, "master", bridge, "up")
        _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", name, "address", "add", f"{Network(size).address(rank)}/24", "dev", DEVICE)
        _run("ip", "-n", name, "link", "set", DEVICE, "up")


def _remove(belongs: Callable[[int], bool]) -> None:
    """Removes links and namespaces of every process id that `belongs`."""

    def chosen(listed: list[dict[str, Any]], key: str) -> list[str]:
        names = [str(entry[key]) for entry in listed]
        return [name for name in names if (match := _NAME.fullmatch(name)) and belongs(int(match[1]))]

    for link in chosen(_listed("link"), "ifname"):
        _run("ip", "link", "del", link)
    for namespace in chosen(_listed("netns"), "name"):
        _run("ip", "netns", "del", namespace)


def _listed(kind: str) -> list[dict[str, Any]]:
    said = _run("ip", "-j", kind, "list")
    entries: list[dict[str, Any]] = json.loads(said) if said.strip() else []
    return entries


def _limit(namespace: str, device: str, bits_per_s: float) -> None:
    bucket = ("tbf", "rate", f"{round(bits_per_s)}bit", "burst", _BURST, "limit", _QUEUE)
    _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *bucket)


def _name(rank: int) -> str:
    """Of a namespace, and of the end of its link on this side. Interfaces take 15 characters."""
    return f"pd{os.getpid()}r{rank}"


def _find(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path=_SYSTEM_FOLDERS)


def _program(name: str) -> str:
    path = _find(name)
    assert path is not None, name  # checked by requirement_problem
    return path


def _run(program: str, *arguments: str) -> str:
    """What the program wrote to stdout. Raises PipeditError with what it complained about."""
    command = [_program(program), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except subprocess.TimeoutExpired:
        raise PipeditError(f"{' '.join(command)} took more than {_TIMEOUT_S:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise PipeditError(f"{' '.join(command)} failed: {error.stderr.strip()}") from None
    return done.stdout
