"""What a rank of a measured group does: takes its place, then answers one JSON line with one.

Used by programs under `peers/`, which bring the variants. Linux: all ranks read one clock (`time.monotonic`).
"""

import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from pipedit.bench import link_probe
from pipedit.core.spans import Span

_PORT = 29400  # each rank has a network of its own, so nobody else has taken it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank sits. `timeout_s` limits every wait for another rank."""

    rank: int
    addresses: tuple[str, ...]  # of all ranks
    core: int
    timeout_s: float

    @property
    def world_size(self) -> int:
        return len(self.addresses)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to do the work. `is_alone`: only rank 0 does it, all of it. `has_result` is False where nothing right
    comes out, because only a part of the work is done. `settle` is run before the first measurement."""

    run: Callable[[], torch.Tensor]
    is_alone: bool = False
    has_result: bool = True
    settle: Callable[[], None] | None = None
    facts: Callable[[], dict[str, Any]] = dict  # to report afterwards
    trace: Callable[[], list[Span]] | None = None  # a run that is watched


def join(place: Place) -> None:
    """One core, one thread, and the group of all ranks."""
    os.sched_setaffinity(0, {place.core})
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{place.addresses[0]}:{_PORT}",
        rank=place.rank,
        world_size=place.world_size,
        timeout=datetime.timedelta(seconds=place.timeout_s),
    )


def serve(place: Place, variants: Mapping[str, Variant], reference: torch.Tensor, **facts: Any) -> None:
    """Answers until stdin ends. `reference` is what every variant with a result has to compute here."""
    _say({"ready": True, "alone": [name for name, variant in variants.items() if variant.is_alone],
          "variants": list(variants), **facts})  # fmt: skip
    for line in sys.stdin:
        asked = json.loads(line)
        match asked["do"]:
            case "run":
                _say(measure(variants[asked["variant"]], reference))
            case "settle":
                for variant in variants.values():
                    if variant.settle is not None:
                        variant.settle()
                _say({})
            case "probe":
                dist.barrier()
                rate = link_probe.ring_rate(place.addresses, place.rank, asked["payload_bytes"], place.timeout_s)
                _say({"bits_per_s": rate})
            case "trace":
                trace = variants[asked["variant"]].trace
                assert trace is not None, f"{asked['variant']} cannot be watched"
                dist.barrier()
                _say({"spans": [dataclasses.asdict(span) for span in trace()]})
            case "facts":
                _say({name: variant.facts() for name, variant in variants.items()})
    dist.destroy_process_group()


def measure(variant: Variant, reference: torch.Tensor) -> dict[str, Any]:
    """Start and end on the common clock, and how the result compares."""
    if not variant.is_alone:
        dist.barrier()
    start = time.monotonic()
    result = variant.run()
    answer: dict[str, Any] = {"start_s": start, "end_s": time.monotonic()}
    if variant.has_result:
        answer["is_equal"] = torch.equal(result, reference)
        answer["max_difference"] = (result - reference).abs().max().item()
        result.fill_(torch.nan)  # whoever writes to the same memory next has to write it all
    return answer


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
