"""Does a request fit into memory, and if not, what would? Pure arithmetic over cost profiles."""

import dataclasses
from collections.abc import Callable

from pipedit.core.request import VideoRequest
from pipedit.core.units import format_bytes
from pipedit.plan.costs import RequestCost

# Allocator fragmentation, kernel workspaces, the interpreter: what the formulas do not see.
_MARGIN = 1.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeLadder:
    """How sizes may shrink: frames by `frame_step`, height and width by `size_multiple`."""

    frame_step: int
    size_multiple: int


def memory_problem(
    request: VideoRequest, cost_of: Callable[[VideoRequest], RequestCost], available_bytes: int, ladder: SizeLadder
) -> str | None:
    """None if the request fits into `available_bytes` on one worker with every role, else a sentence that says how
    much is needed and what would fit."""
    cost = cost_of(request)
    needed = int(cost.peak_bytes * _MARGIN)
    if needed <= available_bytes:
        return None
    text = (
        f"{request.num_frames} frames of {request.width}x{request.height} need about {format_bytes(needed)} of memory "
        f"({format_bytes(cost.weight_bytes)} of it weights), {format_bytes(available_bytes)} are free"
    )
    if cost.weight_bytes * _MARGIN > available_bytes:
        return f"{text}; the weights alone do not fit: take a smaller model, or bfloat16 instead of float32"
    smaller = _largest_fitting(request, lambda r: cost_of(r).peak_bytes * _MARGIN <= available_bytes, ladder)
    return f"{text}; {smaller or 'nothing smaller fits either'}"


def _largest_fitting(
    request: VideoRequest, fits: Callable[[VideoRequest], bool], ladder: SizeLadder
) -> str | None:
    """Fewer frames at this size, or else a smaller picture of the same shape."""
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
    return "would fit: " + ", or ".join(offers) if offers else None


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
