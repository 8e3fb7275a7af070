"""Commands priced by the predictor: every part is in once, and what changes nothing changes nothing."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest

from pipedit.core import messages
from pipedit.core.parallel import ParallelConfig
from pipedit.core.request import VideoRequest
from pipedit.plan.durations import DECODE, ENCODE, FETCH, ONLOAD, STEP, Piece
from pipedit.plan.hardware import make_cluster
from pipedit.plan.planned_video import PlannedVideo
from pipedit.plan.predict import Predictor
from pipedit.plan.predicted_durations import PredictedDurations
from tests.plan.planned import hunyuan, wan

PREDICTOR = Predictor(cluster=make_cluster("a6000", num_devices=8))
RANKS = tuple(range(4))
PARALLEL = ParallelConfig(ulysses_degree=4)
HELP = messages.Aco(helpers=((4,),), heads=(5, 5, 5, 5, 4), text_tokens=(256,))


def durations(video: PlannedVideo, **more: Any) -> PredictedDurations:
    return PredictedDurations.of(PREDICTOR, video.cost, **more)


def command(kind: Any, ranks: tuple[int, ...] = RANKS, **more: Any) -> Any:
    return kind(request_id="a", ranks=ranks, request=VideoRequest(prompt=""), **more)


def kinds(pieces: Any) -> list[str]:
    return [piece.what for piece in pieces]


def total(pieces: Iterable[Piece]) -> float:
    return sum(piece.seconds for piece in pieces)


def test_a_step_is_what_the_predictor_says() -> None:
    (video,) = hunyuan()
    found = durations(video).pieces(command(messages.Denoise, step=3, num_steps=2, parallel=PARALLEL))
    expected = PREDICTOR.step(video.cost, PARALLEL).total_s
    assert list(found) == [Piece(what=STEP, seconds=expected, index=index) for index in range(2)]
    helped = durations(video).pieces(command(messages.Denoise, step=3, parallel=PARALLEL, aco=HELP))
    assert total(helped) == PREDICTOR.step(video.cost, PARALLEL, HELP).total_s != expected


def test_inputs_are_fetched_once_and_only_from_others() -> None:
    (video,) = hunyuan()
    found = durations(video)
    first = command(messages.Denoise, step=0, parallel=PARALLEL, conditioning_at=7)
    assert kinds(found.pieces(first)) == [FETCH, STEP]
    assert kinds(found.pieces(dataclasses.replace(first, step=1))) == [STEP]
    assert kinds(found.pieces(dataclasses.replace(first, conditioning_at=None))) == [STEP]
    decode = command(messages.Decode, (7,), chunk=0, latents_at=0)
    assert kinds(found.pieces(decode)) == [FETCH, DECODE]
    assert kinds(found.pieces(dataclasses.replace(decode, chunk=1))) == [DECODE]
    assert found.pieces(decode)[0].payload_bytes >= video.cost.latent_bytes


@pytest.mark.parametrize("video", [*hunyuan(), *wan()])
@pytest.mark.parametrize("decoders", [1, 3])
def test_chunks_add_up_to_the_decode(video: PlannedVideo, decoders: int) -> None:
    ranks, chunks = tuple(range(decoders)), video.chunks_with(decoders)
    together = durations(video).pieces(command(messages.Decode, ranks, chunk=0, num_chunks=chunks))
    assert kinds(together) == [DECODE] * chunks
    apart = [durations(video).pieces(command(messages.Decode, ranks, chunk=chunk))[0] for chunk in range(chunks)]
    assert total(apart) == pytest.approx(total(together))
    assert total(together) == pytest.approx(PREDICTOR.decode_s(video.cost, decoders))


def test_offloaded_weights_come_once_for_each_stage() -> None:
    (video,) = wan()
    resident, offloaded = durations(video), durations(video, is_offloaded=True)
    moved = 0
    for each in (
        command(messages.Encode),
        command(messages.Denoise, step=0, parallel=PARALLEL),
        command(messages.Denoise, step=1, parallel=PARALLEL),
        command(messages.Decode, chunk=0),
        command(messages.Decode, chunk=1),
    ):
        pieces = offloaded.pieces(each)
        assert [piece for piece in pieces if piece.what != ONLOAD] == list(resident.pieces(each))
        moved += sum(piece.payload_bytes for piece in pieces if piece.what == ONLOAD)
    assert moved == video.cost.weight_bytes


def test_a_prompt_is_encoded_by_each_rank_for_itself() -> None:
    (video,) = wan()
    alone, together = (durations(video).pieces(command(messages.Encode, ranks)) for ranks in ((0,), RANKS))
    assert list(alone) == list(together)
    assert kinds(alone) == [ENCODE]
    assert total(alone) > PREDICTOR.encode_s(video.cost)
