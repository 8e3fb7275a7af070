"""Watched transfers behave as unwatched ones."""

import itertools

import pytest

from pipedit.parallel.channel import Pending
from pipedit.parallel.record import Record


class Lost:
    def wait(self) -> None:
        raise RuntimeError("connection closed by peer")


@pytest.mark.parametrize("waits", [("wait_received",), ("wait",), ("wait_received", "wait")])
def test_a_transfer_that_failed_says_so_to_whoever_waits(waits: tuple[str, ...]) -> None:
    """What was to arrive has not: without the error, attention would go on with old numbers."""
    record = Record(itertools.count(0.0).__next__)
    pending = record.watch(Pending([Lost()]), "input exchange", 0, 8)
    for wait in waits:
        with pytest.raises(RuntimeError, match="closed by peer"):
            getattr(pending, wait)()
    assert record.spans == []
