"""A command under way on a worker: what was done for it, what can go wrong, and when the device has done it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipedit.core.errors import InsufficientMemoryError
from pipedit.core.placement import Role
from pipedit.core.spans import Span

Clock = Callable[[], float]


@dataclasses.dataclass(kw_only=True)
class Run:
    """A command under way, and the spans of what was done for it so far."""

    request_id: str
    rank: int
    clock: Clock
    spans: list[Span] = dataclasses.field(default_factory=list)

    def note(
        self,
        role: Role,
        what: str,
        start_s: float,
        index: int | None = None,
        payload_bytes: int = 0,
        end_s: float | None = None,
        block: int | None = None,
    ) -> None:
        """Something that has ended, now or at `end_s`."""
        end_s = self.clock() if end_s is None else end_s
        self.spans.append(
            Span(
                request_id=self.request_id, rank=self.rank, role=role, what=what, start_s=start_s, end_s=end_s,
                index=index, block=block, payload_bytes=payload_bytes,
            )
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """What every event tells."""
        return {"request_id": self.request_id, "rank": self.rank, "spans": tuple(self.spans)}


def synchronize(device: str) -> None:
    """Waits for the device, so that a span ends when the work does and a cancel takes hold within one step."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def naming_lack_of_memory(device: str) -> Iterator[None]:
    """Turns the several ways in which an allocation fails into one error that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # The CPU allocator raises a plain RuntimeError, which only its text tells from others.
        is_memory = not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError)
        if not is_memory and "can't allocate memory" not in str(error):
            raise
        raise InsufficientMemoryError(
            f"{device} ran out of memory: take fewer frames, a smaller picture, or spatial tiling of the VAE"
        ) from error
