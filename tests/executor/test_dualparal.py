"""Videos made block by block, by the engine on real workers: the same on any number of stages, while frames come out,
requests are cancelled, and workers fail. Most workers are threads (see thread_workers.py)."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipedit import Engine, VideoRequest
from pipedit.core.errors import InvalidRequestError, WorkerError
from pipedit.engine.updates import Cancelled, Failed, Frames, Progress
from pipedit.worker.block_worker import BlockWorker
from tests import tiny_pipelines
from tests.executor.thread_workers import ThreadExecutor, threaded

Folder = Callable[[str], Path]
Video = np.ndarray[Any, np.dtype[np.uint8]]

# Every way to divide the work; the tiny models have few layers.
WAYS: dict[str, dict[str, Any]] = {
    "2": {"num_workers": 2},
    "2, encoder last": {"num_workers": 2, "encode_on": "decode"},
    "1+1": {"denoise_workers": 1, "decode_workers": 1},
    "2+1": {"denoise_workers": 2, "decode_workers": 1},
    "2+1, encoder first": {"denoise_workers": 2, "decode_workers": 1, "encode_on": "denoise"},
}
KINDS = ("wan", "wan22", "wan_ti2v", "hunyuan")
CUT: dict[str, Any] = {"block_size": 2, "context": 1}


def request_of(kind: str, **changes: Any) -> VideoRequest:
    settings = {**tiny_pipelines.QUICK_SETTINGS[kind], "num_frames": 21, "prompt": "a red ball", "seed": 3}
    return VideoRequest(**{**settings, **changes})


def other_of(kind: str) -> VideoRequest:
    """Another length, guidance and number of steps."""
    guided = {"true_cfg_scale": 3.0, "negative_prompt": "blue"} if kind == "hunyuan" else {"guidance_scale": 1.0}
    return request_of(kind, prompt="a blue square", seed=4, num_frames=13, num_inference_steps=2, **guided)


def make(engine: Engine, *requests: VideoRequest) -> list[Video]:
    return [video.frames for video in engine.generate(list(requests))]


@pytest.fixture(scope="module")
def alone(tiny_folder: Folder) -> Callable[..., list[Video]]:
    """What one worker in this process makes."""

    @functools.cache
    def run(kind: str, prefix: str = "cache") -> list[Video]:
        with Engine(tiny_folder(kind), device="cpu", strategy="dualparal", prefix=prefix, **CUT) as engine:
            return make(engine, request_of(kind), other_of(kind))

    return run


def near(videos: list[Video], expected: list[Video]) -> bool:
    return all(
        one.shape == other.shape and int(np.abs(one.astype(int) - other).max()) <= 1
        for one, other in zip(videos, expected, strict=True)
    )


@pytest.mark.parametrize(("kind", "way"), [*itertools.product(KINDS, WAYS)])
def test_any_number_of_stages_makes_the_videos_of_one(
    kind: str, way: str, tiny_folder: Folder, alone: Callable[..., list[Video]]
) -> None:
    with threaded(tiny_folder(kind), strategy="dualparal", **WAYS[way], **CUT) as (engine, executor):
        assert near(make(engine, request_of(kind), other_of(kind)), alone(kind))
        assert nothing_is_left(executor)


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_the_published_prefix_too(kind: str, tiny_folder: Folder, alone: Callable[..., list[Video]]) -> None:
    with threaded(tiny_folder(kind), strategy="dualparal", num_workers=2, prefix="rerun", **CUT) as (engine, _):
        assert near(make(engine, request_of(kind), other_of(kind)), alone(kind, "rerun"))
    assert not near(alone(kind, "rerun"), alone(kind)), "the two kinds of prefix cannot be told apart"


def nothing_is_left(executor: ThreadExecutor) -> bool:
    for worker in executor.workers.values():
        assert isinstance(worker, BlockWorker)
        if worker._shelf.held_bytes or worker._decoders:
            return False
        if worker._work is not None and (worker._work._context.entries or worker._work._denoiser is not None):
            return False
    return True


# -- what each worker holds -----------------------------------------------------------------------------------------


def test_each_worker_holds_its_layers_only(tiny_folder: Folder) -> None:
    with threaded(tiny_folder("wan"), strategy="dualparal", **WAYS["2+1"], **CUT) as (_, executor):
        first, second, third = (executor.workers[rank] for rank in range(3))
        for worker, layers in ((first, 2), (second, 1)):
            (transformer,) = worker._stages.block.modules
            assert (
                len({name.split(".")[1] for name, p in transformer.named_parameters() if "blocks." in name}) == layers
            )
        assert third._stages._block is None
        assert [worker._stages._decode is not None for worker in (first, second, third)] == [False, False, True]


# -- while it runs --------------------------------------------------------------------------------------------------


def test_frames_come_out_while_later_ones_are_noise(tiny_folder: Folder) -> None:
    with threaded(tiny_folder("wan"), strategy="dualparal", **WAYS["1+1"], **CUT) as (engine, _):
        (request,) = engine.prepare([request_of("wan", num_frames=61)])
        engine.submit(request)
        first: int | None = None
        denoised, frames = list[int](), 0
        for update in engine.updates():
            if isinstance(update, Frames):
                assert update.first == frames
                frames += len(update.frames)
                first = first if first is not None else denoised[-1]
            if isinstance(update, Progress) and update.stage == "denoise":
                denoised.append(update.done)
                assert update.total == 8 * 3
        assert frames == 61
        assert denoised == sorted(denoised) and denoised[-1] == 24
        assert first is not None and first < 20, "the first frames came when almost everything was denoised"


def test_a_stream_of_arrays(tiny_folder: Folder, alone: Callable[..., list[Video]]) -> None:
    with threaded(tiny_folder("wan"), strategy="dualparal", num_workers=2, **CUT) as (engine, _):
        pieces = list(engine.stream(request_of("wan")))
    assert len(pieces) == 3  # one a block
    assert near([np.concatenate(pieces)], alone("wan")[:1])


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_cancelled_video_leaves_nothing_and_the_next_is_right(
    after: int, tiny_folder: Folder, alone: Callable[..., list[Video]]
) -> None:
    with threaded(tiny_folder("wan"), strategy="dualparal", num_workers=2, **CUT) as (engine, executor):
        (request,) = engine.prepare([request_of("wan", num_frames=401)])
        request_id = engine.submit(request)
        seen, last = 0, None
        for last in engine.updates():
            seen += isinstance(last, Progress) and last.stage == "denoise"
            if seen >= after:
                engine.cancel(request_id)
        assert isinstance(last, Cancelled)
        assert near(make(engine, request_of("wan")), alone("wan")[:1])
        assert nothing_is_left(executor)


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stage_that_fails_fails_the_video_and_the_next_is_right(
    rank: int, tiny_folder: Folder, alone: Callable[..., list[Video]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with threaded(tiny_folder("wan"), strategy="dualparal", num_workers=2, **CUT) as (engine, executor):
        stage = executor.workers[rank]._stages.block
        with monkeypatch.context() as patch:
            calls = itertools.count()
            run = stage.run

            def failing(*args: Any) -> Any:
                if next(calls) == 5:
                    raise BrokenError("in mid video")
                return run(*args)

            patch.setattr(stage, "run", failing)
            (request,) = engine.prepare([request_of("wan", num_frames=61)])
            engine.submit(request)
            last = list(engine.updates())[-1]
        assert isinstance(last, Failed)
        assert isinstance(last.error, WorkerError)
        assert "in mid video" in str(last.error)
        assert near(make(engine, request_of("wan")), alone("wan")[:1])
        assert nothing_is_left(executor)


# -- prompts for stretches of time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_prompts_change_with_time_on_any_number_of_stages(
    kind: str, tiny_folder: Folder, alone: Callable[..., list[Video]]
) -> None:
    """In blocks of two latent frames, frames 0-4, 5-12 and 13-20: the second block is a joint."""
    changing = request_of(kind, prompts_at='9:"snow on a hill"')
    with Engine(tiny_folder(kind), device="cpu", strategy="dualparal", **CUT) as engine:
        (expected,) = make(engine, changing)
        (same,) = make(engine, request_of(kind, prompts_at='9:"a red ball"'))
    with threaded(tiny_folder(kind), strategy="dualparal", **WAYS["2+1"], **CUT) as (engine, _):
        assert near(make(engine, changing), [expected])
    assert near([same], alone(kind)[:1])
    assert not near([expected[13:]], [alone(kind)[0][13:]]), "the second prompt changed nothing"


def test_prompts_that_change_need_dualparal(tiny_folder: Folder) -> None:
    with Engine(tiny_folder("wan"), device="cpu", num_workers=1) as engine:
        with pytest.raises(InvalidRequestError, match="prompts_at needs strategy dualparal"):
            engine.prepare([request_of("wan", num_frames=9, prompts_at='5:"another"')])
        with pytest.raises(InvalidRequestError, match="cannot be read from"):
            engine.prepare([request_of("wan", num_frames=9, prompts_at="5s another")])


# -- lengths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 5, 9, 17])
@pytest.mark.parametrize("cut", [{"block_size": 3, "context": 3}, {"block_size": 1, "context": 0}, {"block_size": 8}])
def test_every_length_comes_out_whole(num_frames: int, cut: dict[str, Any], tiny_folder: Folder) -> None:
    with Engine(tiny_folder("wan"), device="cpu", strategy="dualparal", **cut) as engine:
        (video,) = engine.generate(request_of("wan", num_frames=num_frames))
    assert video.frames.shape == (num_frames, 32, 48, 3)
    assert video.metadata.extra["dualparal"]["block_latents"] == cut["block_size"]


def test_wrong_settings_are_refused_all_at_once(tiny_folder: Folder) -> None:
    with pytest.raises(InvalidRequestError) as error:
        Engine(
            tiny_folder("wan"), device="cpu", strategy="dualparal", num_workers=2, block_size=0, context=-1,
            prefix="both", context_storage="tape", offload=True, ulysses_degree=2,
        )  # fmt: skip
    text = str(error.value)
    for word in ("block_size=0", "context=-1", "prefix='both'", "context_storage='tape'", "offload", "ulysses_degree"):
        assert word in text
    with pytest.raises(InvalidRequestError, match="4 stages cannot share 3 layers"):
        Engine(tiny_folder("wan"), device="cpu", strategy="dualparal", num_workers=4)


def test_three_processes_make_the_videos_of_one(tiny_folder: Folder, alone: Callable[..., list[Video]]) -> None:
    with Engine(tiny_folder("wan"), device="cpu", strategy="dualparal", **WAYS["2+1"], **CUT) as engine:
        assert near(make(engine, request_of("wan"), other_of("wan")), alone("wan"))
        assert {span.rank for span in engine.timeline().spans if span.what == "step"} == {0, 1}
