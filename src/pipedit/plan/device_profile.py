"""What a device does per second, measured once and kept as a JSON file: `pipedit bench device` writes it, planning
and simulation read it."""

import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipedit.core.errors import InvalidRequestError
from pipedit.core.staging import write_text_whole
from pipedit.plan.costs import Operations

KINDS = ("attention", "linear", "convolution")
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """One measurement: operations per second of one kind of work at one shape (dimension name -> size)."""

    kind: str
    dtype: str
    shape: Mapping[str, int]
    operations_per_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """`device` is the hardware's name; `source` says on which model's shapes, commit and versions it was measured."""

    device: str
    memory_bytes: int
    rates: tuple[Rate, ...]
    source: Mapping[str, Any]

    def operations_per_s(self, kind: str) -> float:
        """The median over the measured shapes. Raises KeyError where the kind was not measured."""
        found = [rate.operations_per_s for rate in self.rates if rate.kind == kind]
        if not found:
            raise KeyError(f"the profile of {self.device} holds no {kind} rate")
        return statistics.median(found)

    def seconds(self, operations: Operations) -> float:
        """Time of the operations, one after the other at the measured rates."""
        by_kind = dataclasses.asdict(operations)
        return sum((by_kind[kind] / self.operations_per_s(kind) for kind in KINDS if by_kind[kind]), 0.0)


def write_profile(profile: DeviceProfile, path: Path) -> None:
    content = {"format": _FORMAT, **dataclasses.asdict(profile)}
    write_text_whole(path, json.dumps(content, indent=1) + "\n")


def read_profile(path: Path) -> DeviceProfile:
    """Raises InvalidRequestError for a file that is no profile."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            raise ValueError("it has another format number")
        rates = tuple(Rate(**rate) for rate in content.pop("rates"))
        return DeviceProfile(rates=rates, **content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"{path} is not a device profile ({error}); pipedit bench device writes one"
        raise InvalidRequestError([message]) from error
