"""What workers do with commands, on tiny real models: every placement makes the video of one worker alone."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from pipedit.core import messages
from pipedit.core.errors import WorkerError
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Placement, Role
from pipedit.worker.failures import command_failed
from tests.worker.crew import Crew, Frames, crew, held_weights

Folder = Callable[[str], Path]
DISAGGREGATED = Placement.disaggregated(denoise=1, decode=1, encoder=Role.DECODER)
# What differs between the two families: Wan decodes frame by frame, HunyuanVideo by temporal tiles (two of them here).
SETTINGS: dict[str, dict[str, Any]] = {"wan": {}, "hunyuan": {"num_frames": 33, "height": 16, "width": 16}}


@pytest.fixture(scope="module")
def expected(tiny_folder: Folder) -> Callable[..., Frames]:
    """The video of one worker alone, step by step and chunk by chunk."""
    known: dict[tuple[Any, ...], Frames] = {}

    def video(kind: str, **settings: Any) -> Frames:
        key = (kind, *sorted(settings.items()))
        if key not in known:
            with crew(tiny_folder(kind), kind) as alone:
                known[key] = alone.video("a", alone.request(**SETTINGS[kind], **settings))
                assert alone.is_empty
        return known[key]

    return video


def near(first: Frames, second: Frames) -> bool:
    """As exact strategies are: equal up to the rounding of a level."""
    return first.shape == second.shape and int(np.abs(first.astype(int) - second).max()) <= 1


# -- one worker -----------------------------------------------------------------------------------------------------


def test_several_steps_and_chunks_in_one_command_change_nothing(
    tiny_folder: Folder, expected: Callable[..., Frames]
) -> None:
    with crew(tiny_folder("wan"), "wan") as alone:
        request = alone.request()
        assert np.array_equal(alone.video("a", request, grain=2), expected("wan"))
        assert [span.index for span in alone.spans("step")] == [0, 1, 2]
        assert [span.index for span in alone.spans("decode")] == [0, 1, 2]
        last = [event.step for event in alone.events if isinstance(event, messages.StepDone)]
        assert last == [1, 2], "the last step of each command"
        assert not np.array_equal(alone.video("b", dataclasses.replace(request, seed=4)), expected("wan"))


def test_steps_of_several_requests_may_take_turns(tiny_folder: Folder, expected: Callable[..., Frames]) -> None:
    with crew(tiny_folder("wan"), "wan") as alone:
        requests = {"a": alone.request(), "b": alone.request(num_frames=5, height=48, seed=7)}
        for request_id, request in requests.items():
            alone.encode(request_id, request)
        for step in range(3):
            for request_id, request in requests.items():
                alone.run(alone.step(request_id, request, step))
        videos = {request_id: [] for request_id in requests}  # type: dict[str, list[Frames]]
        for chunk in range(3):
            for request_id, request in requests.items():
                if chunk < alone.adapter.num_decode_chunks(request):
                    (event,) = alone.run(alone.chunk(request_id, request, chunk))
                    assert isinstance(event, messages.ChunkDecoded) and event.frames is not None
                    videos[request_id].append(event.frames)
        assert np.array_equal(np.concatenate(videos["a"]), expected("wan"))
        assert np.array_equal(np.concatenate(videos["b"]), expected("wan", num_frames=5, height=48, seed=7))


def test_text_tokens_are_those_that_take_part_in_self_attention(tiny_folder: Folder) -> None:
    with crew(tiny_folder("wan"), "wan") as alone:
        assert alone.encode("a", alone.request()) == (0, 0)
        assert alone.encode("b", alone.request(guidance_scale=1.0)) == (0,)
    with crew(tiny_folder("hunyuan"), "hunyuan") as alone:
        (short,) = alone.encode("a", alone.request(prompt="a ball"))
        long, none = alone.encode("b", alone.request(prompt="a red ball", true_cfg_scale=2.0, negative_prompt=""))
        assert 0 < none < short < long
        held = alone.workers[0]._held["b"].conditioning
        assert held is not None
        assert (held["prompt"].shape[1], held["negative"].shape[1]) == (long, none)


def test_every_answer_tells_the_peak_of_memory(tiny_folder: Folder) -> None:
    with crew(tiny_folder("wan"), "wan") as alone:
        alone.video("a", alone.request())
        peaks = [event.peak_bytes for event in alone.events]
        assert peaks == sorted(peaks)
        assert peaks[-1] >= psutil.Process().memory_info().rss * 0.9
        block = torch.ones(2**26)  # 256 MiB
        del block
        alone.release("a")
        assert alone.events[-1].peak_bytes >= psutil.Process().memory_info().rss + 2**27


# -- roles on different ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
@pytest.mark.parametrize("encoder", [Role.DENOISER, Role.DECODER])
def test_a_denoiser_and_a_decoder_make_the_video_of_one(
    kind: str, encoder: Role, tiny_folder: Folder, expected: Callable[..., Frames]
) -> None:
    placement = Placement.disaggregated(denoise=1, decode=1, encoder=encoder)
    with crew(tiny_folder(kind), kind, placement) as two:
        video = two.video("a", two.request(**SETTINGS[kind]))
        # HunyuanVideo's single-stream layers project text and latents apart where ranks may share the work.
        assert np.array_equal(video, expected(kind)) if kind == "wan" else near(video, expected(kind))
        assert two.is_empty
        encoding = int(encoder is Role.DECODER)
        roles = [{"denoise"}, {"decode"}]
        roles[encoding].add("text")
        assert [held_weights(worker) for worker in two.workers] == roles
        assert {(span.rank, span.role) for span in two.load_spans} == {
            (0, "denoiser"), (1, "decoder"), (encoding, "encoder")
        }  # fmt: skip
        fetched = [(span.rank, span.role) for span in two.spans("fetch")]
        assert fetched == [(0, "denoiser"), (1, "decoder")][1 - encoding :]
        assert all(span.payload_bytes > 0 for span in two.spans("fetch"))


def test_latents_wait_on_the_shelf_and_the_denoiser_keeps_nothing_else(tiny_folder: Folder) -> None:
    with crew(tiny_folder("wan"), "wan", DISAGGREGATED) as two:
        request = two.request()
        two.encode("a", request)
        conditioning = two.shelves[1].held_bytes
        assert (two.shelves[0].held_bytes, conditioning > 0) == (0, True)
        two.denoise("a", request)
        latents = 4 * int(np.prod(two.adapter.latent_shape(request)))
        assert [shelf.held_bytes for shelf in two.shelves] == [latents, conditioning]
        held = two.workers[0]._held["a"]
        assert (held.conditioning, held.denoising, held.latents) == (None, None, None)
        two.decode("a", request)
        assert two.workers[1]._held["a"].decoding is None
        two.release("a")
        assert two.is_empty


def test_requests_overlap_and_do_not_disturb_each_other(tiny_folder: Folder, expected: Callable[..., Frames]) -> None:
    """The third is encoded and the second denoised while the first is decoded."""
    with crew(tiny_folder("wan"), "wan", DISAGGREGATED) as two:
        requests = {name: two.request(seed=seed) for name, seed in (("a", 3), ("b", 8))}
        two.encode("a", requests["a"])
        two.denoise("a", requests["a"])
        two.encode("b", requests["b"])
        frames = []
        for index in range(3):
            step = two.start(two.step("b", requests["b"], index))
            chunk = two.start(two.chunk("a", requests["a"], index))
            event = chunk[1].result(60.0)
            assert isinstance(event, messages.ChunkDecoded) and event.frames is not None
            frames.append(event.frames)
            step[0].result(60.0)
        two.release("a")
        assert np.array_equal(np.concatenate(frames), expected("wan"))
        assert np.array_equal(two.decode("b", requests["b"]), expected("wan", seed=8))


def test_one_of_several_decodes_and_the_others_keep_nothing(
    tiny_folder: Folder, expected: Callable[..., Frames]
) -> None:
    with crew(tiny_folder("wan"), "wan", Placement.serial_decode(2)) as two:
        request = two.request()
        two.encode("a", request)
        two.denoise("a", request)
        assert two.workers[0]._held["a"].latents is not None
        assert two.workers[1]._held["a"].latents is None
        assert near(two.decode("a", request), expected("wan"))
        assert [held_weights(worker) for worker in two.workers] == [{"text", "denoise", "decode"}, {"text", "denoise"}]


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_a_request_is_decoded_by_one_or_by_all(
    kind: str, tiny_folder: Folder, expected: Callable[..., Frames], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever it is for the requests before, after, and at the same time."""
    monkeypatch.setattr("pipedit.models.wan.slabs.LEAST_ROWS", 1)
    placement = Placement.disaggregated(denoise=1, decode=2, encoder=Role.DENOISER)
    with crew(tiny_folder(kind), kind, placement) as three:
        request = three.request(**SETTINGS[kind])
        for request_id in "abc":
            three.encode(request_id, request)
            three.denoise(request_id, request)
        three.run(three.chunk("a", request, 0, ranks=(1,)))
        three.run(three.chunk("b", request, 0, ranks=(2,)))
        assert near(three.decode("c", request), expected(kind))
        for request_id, rank in (("a", 1), ("b", 2)):
            total = three.adapter.num_decode_chunks(request)
            command = three.chunk(request_id, request, 1, ranks=(rank,), num_chunks=total - 1)
            (event,) = three.run(command)
            assert isinstance(event, messages.ChunkDecoded) and event.frames is not None
            assert near(event.frames, expected(kind)[-len(event.frames) :])
            assert event.chunk == total - 1
        assert [{span.rank for span in three.spans("decode") if span.request_id == r} for r in "abc"] == [
            {1},
            {2},
            {1, 2},
        ]


# -- helpers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_a_decoder_helps_for_some_steps(kind: str, tiny_folder: Folder, expected: Callable[..., Frames]) -> None:
    with crew(tiny_folder(kind), kind, DISAGGREGATED) as two:
        request = two.request(**SETTINGS[kind])
        heads, tokens = two.adapter.heads, two.encode("a", request)
        aco = messages.Aco(helpers=((1,),), heads=(heads - 1, 1), text_tokens=tokens)
        two.run(two.step("a", request, 0))
        two.run(two.step("a", request, 1, ranks=(0, 1), aco=aco))
        done = two.run(two.step("a", request, 2, ranks=(0, 1), aco=aco))
        assert [(event.rank, event.step) for event in done if isinstance(event, messages.StepDone)] == [(0, 2), (1, 2)]
        assert [(span.rank, span.role, span.index) for span in two.spans("help")] == [
            (1, "decoder", 1), (1, "decoder", 2)
        ]  # fmt: skip
        assert [span.index for span in two.spans("step")] == [0, 1, 2]
        assert not two.workers[1]._held, "helpers keep nothing"
        assert near(two.decode("a", request), expected(kind))


# -- failures -------------------------------------------------------------------------------------------------------


def test_latents_that_were_released_are_a_named_error_and_the_next_request_is_right(
    tiny_folder: Folder, expected: Callable[..., Frames]
) -> None:
    with crew(tiny_folder("wan"), "wan", DISAGGREGATED) as two:
        request = two.request()
        two.encode("a", request)
        two.denoise("a", request)
        two.run(messages.Release(request_id="a", ranks=(0,)))
        command = two.chunk("a", request, 0)
        with pytest.raises(WorkerError, match="worker 1 failed while it was fetching latents from worker 0") as caught:
            two.run(command)
        failed = command_failed(command, 1, caught.value)
        assert (failed.error, failed.doing) == (caught.value, "decoding")
        two.release("a")
        assert two.is_empty
        assert np.array_equal(two.video("b", request), expected("wan"))


@pytest.fixture
def pair(tiny_folder: Folder) -> Iterator[Crew]:
    with crew(tiny_folder("wan"), "wan", Placement.colocated(2)) as two:
        yield two


def fail_once(worker: Any, stage: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage's method raises the next time."""
    owner = getattr(worker._stages, stage)
    original, times = getattr(owner, method), iter([True])

    def fail(*arguments: Any) -> Any:
        if next(times, False):
            raise RuntimeError("no luck")
        return original(*arguments)

    monkeypatch.setattr(owner, method, fail)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("stage", "method"), [("denoise", "step"), ("decode", "chunk")])
def test_ranks_that_wait_for_one_that_failed_fail_too_and_a_new_epoch_is_right(
    rank: int,
    stage: str,
    method: str,
    pair: Crew,
    expected: Callable[..., Frames],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipedit.models.wan.slabs.LEAST_ROWS", 1)
    request = pair.request()
    assert near(pair.video("before", request), expected("wan"))
    pair.encode("a", request)
    pair.run(pair.step("a", request, 0))
    if stage == "decode":
        pair.run(pair.step("a", request, 1, num_steps=2))
        pair.run(pair.chunk("a", request, 0))
    command = pair.step("a", request, 1) if stage == "denoise" else pair.chunk("a", request, 1)
    fail_once(pair.workers[rank], stage, method, monkeypatch)
    start_s = time.monotonic()
    errors = [future.exception(20.0) for future in pair.start(command).values()]
    assert time.monotonic() - start_s < 4.0, "before anybody loses patience"
    assert "no luck" in str(errors[rank])
    assert isinstance(errors[1 - rank], RuntimeError)
    pair.release("a")
    pair.epoch += 1
    assert near(pair.video("b", request), expected("wan"))
    assert pair.is_empty


def test_a_split_that_cannot_be_fails_its_request_only(pair: Crew, expected: Callable[..., Frames]) -> None:
    request = pair.request()
    pair.encode("a", request)
    four = pair.step("a", request, 0, parallel=ParallelConfig(ulysses_degree=4))
    errors = [future.exception(20.0) for future in pair.start(four).values()]
    assert all("there are 2" in str(error) for error in errors)
    pair.release("a")
    pair.epoch += 1
    assert near(pair.video("b", request), expected("wan"))
