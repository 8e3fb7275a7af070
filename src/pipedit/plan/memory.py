"""Does a request fit into memory, and if not, what would? Pure arithmetic over cost profiles."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Role
from pipedit.core.request import VideoRequest
from pipedit.core.units import MIB, format_bytes
from pipedit.plan.costs import PartBytes, RequestCost

# Allocator fragmentation and kernel workspaces: what the formulas do not see.
_MARGIN_PERCENT = 110
# Interpreter and libraries on the CPU (measured: 0.45 GB for the smallest run), context and kernels on a GPU.
RUNTIME_BYTES = 512 * MIB
# What sharing the tokens adds to a worker's share of activations: what it sends and receives of q, k, v and the output,
# and with a ring two more pairs of keys and values and the sum of what it has seen, in float32.
_EXCHANGE_PERCENT, _RING_PERCENT = 150, 200
_ROLE_OF_PART = {"text_encoder": Role.ENCODER, "transformer": Role.DENOISER, "vae": Role.DECODER}  # by the first words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """What one memory has to hold at the worst moment, in bytes, for all of the `num_workers` that live in it. Each of
    them has its own libraries and weights."""

    weights: int
    working: int
    num_workers: int = 1

    @classmethod
    def of(
        cls,
        cost: RequestCost,
        parallel: ParallelConfig | None = None,
        *,
        num_workers: int = 1,
        roles: Collection[Role] = tuple(Role),
        helping: int = 0,
    ) -> "Need":
        """`num_workers` workers with these roles, denoisers each with its share of the tokens as in `parallel`.
        `helping`: bytes that a decoder needs on top to help with attention (`help_bytes`).

        Cautious: every worker is counted with a whole text encoder, and with the VAE's part that `cost` was asked for,
        all at the same moment; of the transformer's activations a worker has those of its tokens and of all the text,
        and room for the exchange.
        """
        parallel = parallel or ParallelConfig()
        parts = {name: part for name, part in cost.parts.items() if role_of_part(name) in roles}
        working = max(
            _shared_working(cost, part.working, parallel) if name.startswith("transformer") else part.working
            for name, part in parts.items()
        )
        return cls(
            weights=num_workers * sum(part.weights for part in parts.values()),
            working=num_workers * (working + cost.latent_bytes + helping),
            num_workers=num_workers,
        )

    @classmethod
    def offloaded(
        cls, cost: RequestCost, parallel: ParallelConfig | None = None, *, roles: Collection[Role] = tuple(Role)
    ) -> "Need":
        """A worker whose weights wait in host memory: the text encoders, one transformer, or the VAE is on the device
        at a time."""
        together: dict[str, dict[str, PartBytes]] = {}
        for name, part in cost.parts.items():
            if (role := role_of_part(name)) in roles:
                together.setdefault(name if role is Role.DENOISER else role, {})[name] = part
        needs = (cls.of(dataclasses.replace(cost, parts=parts), parallel) for parts in together.values())
        return max(needs, key=lambda need: need.weights + need.working)

    @classmethod
    def together(cls, needs: Sequence["Need"]) -> "Need":
        """Of workers that live in one memory."""
        return cls(
            weights=sum(need.weights for need in needs),
            working=sum(need.working for need in needs),
            num_workers=sum(need.num_workers for need in needs),
        )


def role_of_part(name: str) -> Role:
    """Of a part of a RequestCost, such as "text_encoder_2": who needs it."""
    return next(role for start, role in _ROLE_OF_PART.items() if name.startswith(start))


def _shared_working(cost: RequestCost, working: int, parallel: ParallelConfig) -> int:
    degree = parallel.sequence_degree
    if degree == 1:
        return working
    rows = -(-cost.latent_tokens // degree) + cost.text_tokens
    percent = _EXCHANGE_PERCENT if parallel.ring_degree == 1 else _RING_PERCENT
    return working * rows * percent // ((cost.latent_tokens + cost.text_tokens) * 100)


NeedOf = Callable[[VideoRequest], Need]


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

    def needed(self, need: Need) -> int:
        return _with_margin(need.working) + (0 if self.is_loaded else _at_rest(need))

    def holds(self, need: Need) -> bool:
        return self.needed(need) <= self.available_bytes


def _at_rest(need: Need) -> int:
    """Weights and libraries, before there is a request."""
    return _with_margin(need.weights) + RUNTIME_BYTES * need.num_workers


def _with_margin(count: int) -> int:
    return count * _MARGIN_PERCENT // 100  # in whole numbers: floats end at 1e308, what people ask for does not


def memory_problem(
    request: VideoRequest, need_of: NeedOf, room: Room, ladder: SizeLadder, ways_out: Mapping[str, NeedOf]
) -> str | None:
    """None if the request fits, else a sentence that says how much is needed and what would fit: fewer frames, a
    smaller picture, or one of the `ways_out` (what to do -> the need that it leads to)."""
    need = need_of(request)
    if room.holds(need):
        return None
    workers = f" on {need.num_workers} workers" if need.num_workers > 1 else ""
    text = (
        f"{request.num_frames} frames of {request.width}x{request.height}{workers} need about "
        f"{format_bytes(room.needed(need))} of memory"
        + ("" if room.is_loaded else f" ({format_bytes(need.weights)} of it weights)")
        + f", {format_bytes(room.available_bytes)} are free"
    )
    offers = [way for way, other_need in ways_out.items() if room.holds(other_need(request))]
    if not offers and not room.is_loaded and _at_rest(need) > room.available_bytes:
        return f"{text}; the weights alone do not fit: take a smaller model, or bfloat16 instead of float32"
    offers += _smaller(request, lambda r: room.holds(need_of(r)), ladder)
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
