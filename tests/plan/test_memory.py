"""Predicting whether a request fits, and what would."""

import dataclasses
import re

from pipedit.core.parallel import ParallelConfig
from pipedit.core.request import VideoRequest
from pipedit.core.units import MIB
from pipedit.plan.costs import Operations, PartBytes, RequestCost, TransformerCost
from pipedit.plan.memory import RUNTIME_BYTES, Need, Room, SizeLadder, memory_problem

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


def need_of(request: VideoRequest) -> Need:
    return Need.of(cost_of(request))


def problem(request: VideoRequest, available_bytes: int, **room: bool) -> str | None:
    loaded = room.get("is_loaded", False)
    runtime = 0 if loaded else RUNTIME_BYTES  # the tests below count what the request itself needs
    return memory_problem(request, need_of, Room(available_bytes=available_bytes + runtime, **room), LADDER, {})


def fits(request: VideoRequest, available_bytes: int) -> bool:
    return problem(request, available_bytes) is None


def test_enough_memory_is_no_problem() -> None:
    need = need_of(REQUEST)
    needed = need.weights + need.working
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
    room = int(need_of(REQUEST).working * 1.15)
    assert problem(REQUEST, room) is not None
    assert problem(REQUEST, room, is_loaded=True) is None


def test_a_way_out_is_offered_only_where_it_helps() -> None:
    def tiled(request: VideoRequest) -> Need:
        parts = {"vae": PartBytes(weights=100 * MIB, working=MIB)}
        return Need.of(dataclasses.replace(cost_of(request), parts=parts))

    room = Room(available_bytes=RUNTIME_BYTES + 300 * MIB)
    text = memory_problem(REQUEST, need_of, room, LADDER, {"tiling": tiled, "prayer": need_of})
    assert text is not None
    assert "would fit: tiling, or" in text
    assert "prayer" not in text


def test_every_worker_in_a_memory_counts() -> None:
    one, three = need_of(REQUEST), Need.of(cost_of(REQUEST), num_workers=3)
    assert (three.weights, three.working) == (3 * one.weights, 3 * one.working)
    room = Room(available_bytes=0)
    assert abs(room.needed(three) - 3 * room.needed(one)) <= 3
    text = memory_problem(REQUEST, lambda _: three, room, LADDER, {})
    assert text is not None
    assert "on 3 workers need about" in text


def test_shared_tokens_share_the_transformers_activations_but_not_the_text() -> None:
    parts = {"text_encoder": PartBytes(weights=1, working=10), "transformer": PartBytes(weights=1, working=1000)}
    cost = dataclasses.replace(cost_of(REQUEST), latent_tokens=900, text_tokens=100, latent_bytes=7, parts=parts)

    def working(**degrees: int) -> int:
        return Need.of(cost, ParallelConfig(**degrees)).working - cost.latent_bytes

    assert working() == working(cfg_degree=2) == 1000
    assert working(ulysses_degree=9) == 300  # 100 tokens and the text, and half as much again for the exchange
    assert working(ring_degree=9) == 400
    assert working(ulysses_degree=900) == 151


def test_fewer_workers_are_offered_where_the_weights_of_all_do_not_fit() -> None:
    three = Need.of(cost_of(REQUEST), num_workers=3)
    room = Room(available_bytes=RUNTIME_BYTES + 6 * 1024 * MIB // 2)
    heavy = dataclasses.replace(three, weights=room.available_bytes)
    text = memory_problem(REQUEST, lambda _: heavy, room, LADDER, {"1 worker": need_of})
    assert text is not None
    assert "would fit: 1 worker" in text
    assert "the weights alone" in str(memory_problem(REQUEST, lambda _: heavy, room, LADDER, {}))
