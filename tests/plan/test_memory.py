"""Predicting whether a request fits, and what would."""

import dataclasses
import re

from pipedit.core.request import VideoRequest
from pipedit.core.units import MIB
from pipedit.plan.costs import Operations, PartBytes, RequestCost, TransformerCost
from pipedit.plan.memory import SizeLadder, memory_problem

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


def fits(request: VideoRequest, available_bytes: int) -> bool:
    return memory_problem(request, cost_of, available_bytes, LADDER) is None


def test_enough_memory_is_no_problem() -> None:
    needed = cost_of(REQUEST).peak_bytes
    assert fits(REQUEST, int(needed * 1.2))
    assert not fits(REQUEST, needed)  # the margin counts


def test_the_offers_fit_and_are_the_largest_that_do() -> None:
    available = 1024 * MIB
    text = memory_problem(REQUEST, cost_of, available, LADDER)
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
    text = memory_problem(REQUEST, cost_of, 90 * MIB, LADDER)
    assert text is not None
    assert "the weights alone do not fit" in text
    assert "would fit" not in text


def test_says_so_when_nothing_smaller_fits() -> None:
    text = memory_problem(REQUEST, cost_of, int(110.1 * MIB), LADDER)
    assert text is not None
    assert "nothing smaller fits" in text
