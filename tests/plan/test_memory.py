"""Predicting whether a request fits, and what would."""

import dataclasses
import re

from pipedit.core.request import VideoRequest
from pipedit.core.units import MIB
from pipedit.plan.costs import Operations, PartBytes, RequestCost, TransformerCost
from pipedit.plan.memory import RUNTIME_BYTES, Room, SizeLadder, memory_problem

NOTHING = Operations()
LADDER = SizeLadder(frame_step=4, size_multiple=16)
REQUEST = VideoRequest(prompt="x", num_frames=81, height=480, width=832)


def cost_of(request: VideoRequest) -> RequestCost:
    """100 MiB of weights, and a kilobyte of working memory for every 16 pixels of every frame."""
    assert request.num_frames and request.height and request.width
    working = request.num_frames * request.height * request.width * 64
    return RequestCost(
        num_steps=1, num_chunks=1, forwards_per_step=1, latent_tokens=1, text_tokens=1, latent_bytes=0, encode=NOTHING,
        forward=TransformerCost(front=NOTHING, layers=(), back=NOTHING), decode_first_chunk=NOTHING,
        decode_chunk=NOTHING, parts={"transformer": PartBytes(weights=100 * MIB, working=working)},
    )  # fmt: skip


def problem(request: VideoRequest, available_bytes: int, **room: bool) -> str | None:
    loaded = room.get("is_loaded", False)
    runtime = 0 if loaded else RUNTIME_BYTES  # the tests below count what the request itself needs
    return memory_problem(request, cost_of, Room(available_bytes=available_bytes + runtime, **room), LADDER, {})


def fits(request: VideoRequest, available_bytes: int) -> bool:
    return problem(request, available_bytes) is None


def test_enough_memory_is_no_problem() -> None:
    needed = cost_of(REQUEST).peak_bytes
    assert fits(REQUEST, int(needed * 1.2))
    assert not fits(REQUEST, needed)  # the margin counts


def test_the_offers_fit_and_are_the_largest_that_do() -> None:
    available = 1024 * MIB
    text = problem(REQUEST, available)
    assert text is not None
    frames = int(re.search(r"would fit: (\d+) frames of this size", text)[1])  # type: ignore[index]
    assert frames % 4 == 1
    assert fits(dataclasses.replace(REQUEST, num_frames=frames), available)
    assert not fits(dataclasses.replace(REQUEST, num_frames=frames + 4), available)
    width, height = map(int, re.search(r"or 81 frames of (\d+)x(\d+)", text).groups())  # type: ignore[union-attr]
    assert width % 16 == 0
    assert height % 16 == 0
    assert fits(dataclasses.replace(REQUEST, width=width, height=height), available)


def test_weights_that_do_not_fit_are_named_as_the_reason() -> None:
    text = problem(REQUEST, 90 * MIB)
    assert text is not None
    assert "the weights alone do not fit" in text
    assert "would fit" not in text


def test_says_so_when_nothing_smaller_fits() -> None:
    text = problem(REQUEST, int(110.1 * MIB))
    assert text is not None
    assert "nothing smaller fits" in text


def test_loaded_weights_are_not_counted_again() -> None:
    needed_by_work = cost_of(REQUEST).peak_bytes - cost_of(REQUEST).weight_bytes
    room = int(needed_by_work * 1.15)
    assert problem(REQUEST, room) is not None
    assert problem(REQUEST, room, is_loaded=True) is None


def test_a_way_out_is_offered_only_where_it_helps() -> None:
    def tiled(request: VideoRequest) -> RequestCost:
        return dataclasses.replace(cost_of(request), parts={"vae": PartBytes(weights=100 * MIB, working=MIB)})

    room = Room(available_bytes=RUNTIME_BYTES + 300 * MIB)
    text = memory_problem(REQUEST, cost_of, room, LADDER, {"tiling": tiled, "prayer": cost_of})
    assert text is not None
    assert "would fit: tiling, or" in text
    assert "prayer" not in text
