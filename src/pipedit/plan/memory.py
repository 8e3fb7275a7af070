"""Does a request fit into memory, and if not, what would? Pure arithmetic over cost profiles."""

import dataclasses
from collections.abc import Callable, Mapping

from pipedit.core.request import VideoRequest
from pipedit.core.units import MIB, format_bytes
from pipedit.plan.costs import RequestCost

# Allocator fragmentation and kernel workspaces: what the formulas do not see.
_MARGIN_PERCENT = 110
# Interpreter and libraries on the CPU (measured: 0.45 GB for the smallest run), context and kernels on a GPU.
RUNTIME_BYTES = 512 * MIB


CostOf = Callable[[VideoRequest], RequestCost]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeLadder:
    """How sizes may shrink: frames by `frame_step`, height and width by `size_multiple`."""

    frame_step: int
    size_multiple: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """Memory that is free, and whether libraries and weights are already out of it (a second request on an engine)."""

    available_bytes: int
    is_loaded: bool = False

    def needed(self, cost: RequestCost) -> int:
        if self.is_loaded:
            return _with_margin(cost.peak_bytes - cost.weight_bytes)
        return _with_margin(cost.peak_bytes) + RUNTIME_BYTES

    def holds(self, cost: RequestCost) -> bool:
        return self.needed(cost) <= self.available_bytes


def _with_margin(count: int) -> int:
    return count * _MARGIN_PERCENT // 100  # in whole numbers: floats end at 1e308, what people ask for does not


def memory_problem(
    request: VideoRequest, cost_of: CostOf, room: Room, ladder: SizeLadder, ways_out: Mapping[str, CostOf]
) -> str | None:
    """None if the request fits on one worker with every role, else a sentence that says how much is needed and what
    would fit: fewer frames, a smaller picture, or one of the `ways_out` (what to do -> the cost that it leads to)."""
    cost = cost_of(request)
    if room.holds(cost):
        return None
    text = (
        f"{request.num_frames} frames of {request.width}x{request.height} need about "
        f"{format_bytes(room.needed(cost))} of memory"
        + ("" if room.is_loaded else f" ({format_bytes(cost.weight_bytes)} of it weights)")
        + f", {format_bytes(room.available_bytes)} are free"
    )
    if not room.is_loaded and _with_margin(cost.weight_bytes) + RUNTIME_BYTES > room.available_bytes:
        return f"{text}; the weights alone do not fit: take a smaller model, or bfloat16 instead of float32"
    offers = [way for way, other_cost in ways_out.items() if room.holds(other_cost(request))]
    offers += _smaller(request, lambda r: room.holds(cost_of(r)), ladder)
    return f"{text}; " + ("would fit: " + ", or ".join(offers) if offers else "nothing smaller fits either")


def _smaller(request: VideoRequest, fits: Callable[[VideoRequest], bool], ladder: SizeLadder) -> list[str]:
    """Fewer frames at this size, and a smaller picture of about the same shape."""
    assert request.num_frames and request.height and request.width
    fewer = _largest(
        (request.num_frames - 1) // ladder.frame_step,
        lambda n: fits(dataclasses.replace(request, num_frames=n * ladder.frame_step + 1)),
    )
    offers = []
    if fewer is not None and fewer > 0:
        offers.append(f"{fewer * ladder.frame_step + 1} frames of this size")
    height, width, multiple = request.height, request.width, ladder.size_multiple

    def shrunk(tenths: int) -> VideoRequest:
        h, w = (max(round(side * tenths / 16 / multiple), 1) * multiple for side in (height, width))
        return dataclasses.replace(request, height=h, width=w)

    scale = _largest(15, lambda tenths: tenths > 0 and fits(shrunk(tenths)))
    if scale:
        small = shrunk(scale)
        offers.append(f"{request.num_frames} frames of {small.width}x{small.height}")
    return offers


def _largest(high: int, works: Callable[[int], bool]) -> int | None:
    """The largest n in 0..high with works(n), where works is true up to some point only."""
    low, best = 0, None
    while low <= high:
        middle = (low + high) // 2
        if works(middle):
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best
