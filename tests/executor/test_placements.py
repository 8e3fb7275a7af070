"""Every placement makes the videos of one process: on real workers, driven by the engine, with streams that are mixed.

Most run as threads (see thread_workers.py), because starting processes takes seconds; some as processes, and one under
torchrun by the command line.
"""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipedit import Engine, VideoRequest
from pipedit.core.placement import Placement
from pipedit.core.spans import Span
from pipedit.core.units import MIB
from pipedit.engine.updates import Cancelled, Failed, Finished, Frames, Progress
from pipedit.executor.local_processes import LocalProcessExecutor
from pipedit.parallel.runtime import ParallelRuntime
from pipedit.plan.trace_file import read_trace
from pipedit.worker.shelf import LATENTS, Shelf
from tests import tiny_pipelines
from tests.executor.thread_workers import (
    Leftovers,
    ThreadExecutor,
    held_roles,
    keep_latents,
    parameter_bytes,
    threaded,
)

ROOT = Path(__file__).parents[2]
Folder = Callable[[str], Path]
Video = np.ndarray[Any, np.dtype[np.uint8]]
Settings = Mapping[str, Any]


def disaggregated(denoise: int, decode: int, encoder: str, aco: str, **degrees: int) -> Settings:
    return {"denoise_workers": denoise, "decode_workers": decode, "encode_on": encoder, "aco": aco, **degrees}


def colocated(workers: int, **settings: Any) -> Settings:
    return {"num_workers": workers, "strategy": "colocated", **settings}


ONE_CHUNK = {"pipesp_chunks": 1}  # other numbers round otherwise, and the number is chosen by what is faster
COLOCATED: dict[str, Settings] = {
    "spread": colocated(2),
    "serial": colocated(2, decode="serial", **ONE_CHUNK),
    "offloaded": colocated(2, offload=True, **ONE_CHUNK),
    "offloaded serial": colocated(2, decode="serial", offload=True, **ONE_CHUNK),
    "3 spread": colocated(3, **ONE_CHUNK),
}
DISAGGREGATED: dict[str, Settings] = {
    "1+1 off": disaggregated(1, 1, "decode", "off"),
    "1+1 on": disaggregated(1, 1, "denoise", "on"),
    "1+1 auto": disaggregated(1, 1, "decode", "auto"),
    "2+1 off": disaggregated(2, 1, "denoise", "off", **ONE_CHUNK),
    "2+1 on": disaggregated(2, 1, "decode", "on"),
    "1+2 off": disaggregated(1, 2, "denoise", "off"),
    "1+2 on": disaggregated(1, 2, "decode", "on"),
    "2+2 on": disaggregated(2, 2, "decode", "on"),
    "2+2 auto": disaggregated(2, 2, "denoise", "auto", cfg_degree=1),
    "3+1 off": disaggregated(3, 1, "decode", "off", **ONE_CHUNK),
    "3+1 on": disaggregated(3, 1, "denoise", "on", ulysses_degree=3),
}
CASES = COLOCATED | DISAGGREGATED
SOME = ("spread", "offloaded serial", "1+1 off", "1+1 on", "2+2 on")
# Wan 2.1 and HunyuanVideo differ in everything; the other two in the denoiser's experts and in the VAE.
RUNS = [
    *itertools.product(("wan", "hunyuan"), CASES),
    *itertools.product(("wan22", "wan_ti2v"), SOME),
]


def stream_of(kind: str) -> list[VideoRequest]:
    """Requests that differ in all that may differ in one stream. The first can be helped however few help."""
    base = tiny_pipelines.QUICK_SETTINGS[kind]
    side = 64 if kind == "wan_ti2v" else 32
    first = {"prompt": "a red ball", "seed": 1}
    other = {"prompt": "a blue square stands still in the middle", "seed": 2}
    small = {"prompt": "two green triangles", "seed": 3, "height": side, "width": side, "num_frames": 5}
    again = {"prompt": "a yellow circle grows slowly while the camera turns left", "seed": 1, "num_inference_steps": 2}
    if kind == "hunyuan":
        guided = {"true_cfg_scale": 3.0, "negative_prompt": "blue"}
        tiles = {"height": 16, "width": 16, "num_frames": 33}  # decoded in two temporal tiles
        changes = [first, other | guided, small, again | tiles]
    else:
        plain = {"guidance_scale": 1.0} | ({"guidance_scale_2": 1.0} if kind == "wan22" else {})
        changes = [first | plain, other | {"negative_prompt": "a red ball"}, small | plain, again]
    return [VideoRequest(**{**base, **change}) for change in changes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """By prompt: frames, and clean latents as each of its decoders got them."""

    frames: dict[str, Video]
    latents: dict[str, list[torch.Tensor]]
    spans: tuple[Span, ...] = ()
    roles: tuple[set[str], ...] = ()
    leftovers: Leftovers | None = None

    def works(self, what: str) -> set[int]:
        """The ranks that did it."""
        return {span.rank for span in self.spans if span.what == what}


def all_near(videos: Mapping[str, Video], expected: Mapping[str, Video]) -> bool:
    """Pixels within one grey level."""
    return all(
        video.shape == expected[prompt].shape and int(np.abs(video.astype(int) - expected[prompt]).max()) <= 1
        for prompt, video in videos.items()
    )


def near(one: Outcome, other: Outcome) -> bool:
    """Latents within 1e-5, pixels within one grey level."""
    assert one.frames.keys() == other.frames.keys()
    assert one.latents.keys() == other.latents.keys()
    return all_near(one.frames, other.frames) and all(
        float((mine - other.latents[name][0]).abs().max()) <= 1e-5 for name in one.latents for mine in one.latents[name]
    )


def equal(one: Outcome, other: Outcome) -> bool:
    """Latents, bit by bit."""
    return all(
        torch.equal(mine, theirs)
        for name in one.latents
        for mine, theirs in itertools.product(one.latents[name], other.latents[name])
    )


def by_prompt(latents: Mapping[tuple[str, int], torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}
    for (prompt, _), tensor in sorted(latents.items(), key=lambda item: item[0]):
        found.setdefault(prompt, []).append(tensor)
    return found


def frames_of(engine: Engine, requests: Sequence[VideoRequest]) -> dict[str, Video]:
    return {video.request.prompt: video.frames for video in engine.generate(requests)}


@pytest.fixture(scope="module")
def alone(tiny_folder: Folder) -> Callable[[str], Outcome]:
    """What one worker in this process makes of the stream."""

    @functools.cache
    def run(kind: str) -> Outcome:
        latents: dict[tuple[str, int], torch.Tensor] = {}
        with Engine(tiny_folder(kind), device="cpu", num_workers=1) as engine:
            engine.start()
            keep_latents(engine._executor._worker, latents)  # type: ignore[union-attr]
            frames = frames_of(engine, stream_of(kind))
        return Outcome(frames=frames, latents=by_prompt(latents))

    return run


@pytest.fixture(scope="module")
def placed(tiny_folder: Folder) -> Callable[[str, str], Outcome]:
    """What the workers of a case make of the stream."""

    @functools.cache
    def run(kind: str, case: str) -> Outcome:
        with threaded(tiny_folder(kind), **CASES[case]) as (engine, executor):
            frames = frames_of(engine, stream_of(kind))
            return outcome_of(engine, executor, frames)

    return run


def outcome_of(engine: Engine, executor: ThreadExecutor, frames: dict[str, Video]) -> Outcome:
    return Outcome(
        frames=frames,
        latents=by_prompt(executor.latents),
        spans=engine.timeline().spans,
        roles=tuple(held_roles(executor.workers[rank]) for rank in sorted(executor.workers)),
        leftovers=Leftovers.of(executor),
    )


# -- every placement ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "case"), RUNS)
def test_every_placement_makes_the_videos_of_one_process(
    kind: str, case: str, alone: Callable[[str], Outcome], placed: Callable[[str, str], Outcome]
) -> None:
    outcome, settings = placed(kind, case), CASES[case]
    assert near(outcome, alone(kind))
    assert outcome.leftovers == Leftovers(held=0, shelved_bytes=0)
    helps = outcome.works("help")
    if settings.get("aco") == "on":
        assert helps, "nobody has helped, so nothing was shown"
    if settings.get("aco", "off") == "off":
        assert not helps


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
@pytest.mark.parametrize(
    ("case", "like"),
    [
        ("2+1 off", "serial"),
        ("offloaded serial", "offloaded"),
        ("3+1 off", "3 spread"),
        ("1+2 off", "1+1 off"),
    ],
)
def test_where_only_the_placement_changes_latents_are_equal_bit_by_bit(
    kind: str, case: str, like: str, placed: Callable[[str, str], Outcome]
) -> None:
    assert equal(placed(kind, case), placed(kind, like))


def test_where_one_denoises_one_decodes_and_nobody_helps_videos_are_exactly_those_of_one_process(
    alone: Callable[[str], Outcome], placed: Callable[[str, str], Outcome]
) -> None:
    """Of Wan. HunyuanVideo's single-stream layers project text and latents apart where ranks may share the work, and
    several threads round a matrix of fewer rows otherwise: near, see above."""
    expected, outcome = alone("wan"), placed("wan", "1+1 off")
    assert equal(outcome, expected)
    assert all(np.array_equal(outcome.frames[name], expected.frames[name]) for name in expected.frames)


def test_workers_hold_and_do_only_what_their_roles_ask_for(placed: Callable[[str, str], Outcome]) -> None:
    for case, settings in DISAGGREGATED.items():
        outcome = placed("wan", case)
        denoisers = set(range(settings["denoise_workers"]))
        decoders = set(range(len(denoisers), len(denoisers) + settings["decode_workers"]))
        encoders = denoisers if settings["encode_on"] == "denoise" else decoders
        roles = {"encoder": encoders, "denoiser": denoisers, "decoder": decoders}
        assert [{role for role in roles if rank in roles[role]} for rank in sorted(denoisers | decoders)] == list(
            outcome.roles
        )
        assert outcome.works("step") == denoisers
        assert outcome.works("decode") <= decoders
        assert outcome.works("encode") <= encoders
        assert outcome.works("help") <= decoders
        loads = {(span.rank, span.role) for span in outcome.spans if span.what == "load"}
        assert loads == {(rank, role) for role, ranks in roles.items() for rank in ranks}
    assert placed("wan", "serial").works("decode") == {0}
    assert placed("wan", "offloaded").works("onload") == {0, 1}


def test_parameters_are_divided_among_the_roles(tiny_folder: Folder) -> None:
    with threaded(tiny_folder("hunyuan"), **colocated(2)) as (_, executor):
        everything = [parameter_bytes(executor.workers[rank]) for rank in range(2)]
    with threaded(tiny_folder("hunyuan"), **disaggregated(1, 1, "decode", "off")) as (_, executor):
        parts = [parameter_bytes(executor.workers[rank]) for rank in range(2)]
    assert everything[0] == everything[1] == sum(parts)
    assert min(parts) > 0


# -- what could go unnoticed ----------------------------------------------------------------------------------------


def test_other_requests_would_be_noticed(alone: Callable[[str], Outcome]) -> None:
    known = alone("wan")
    first, second = (stream_of("wan")[index].prompt for index in (0, 3))
    swapped = {first: known.latents[second], second: known.latents[first]}
    assert known.latents[first][0].shape == known.latents[second][0].shape
    assert not near(dataclasses.replace(known, latents=known.latents | swapped), known)
    swapped_frames = {first: known.frames[second], second: known.frames[first]}
    assert not near(dataclasses.replace(known, frames=known.frames | swapped_frames), known)


def test_a_wrong_hand_over_would_be_noticed(
    tiny_folder: Folder, alone: Callable[[str], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Shelf.put

    def wrong(shelf: Shelf, request_id: str, kind: str, tensors: dict[str, torch.Tensor]) -> None:
        put(shelf, request_id, kind, {n: t + 1e-4 for n, t in tensors.items()} if kind == LATENTS else tensors)

    monkeypatch.setattr(Shelf, "put", wrong)
    assert not near(run_now(tiny_folder("wan"), "1+1 off"), alone("wan"))


def test_wrong_help_would_be_noticed(
    tiny_folder: Folder, alone: Callable[[str], Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_of = ParallelRuntime._kernel

    def wrong(runtime: ParallelRuntime, mesh: Any, text_tokens: int) -> Any:
        kernel = kernel_of(runtime, mesh, text_tokens)
        return kernel if mesh.place is not None else lambda *parts: kernel(*parts) * 1.01

    monkeypatch.setattr(ParallelRuntime, "_kernel", wrong)
    assert not near(run_now(tiny_folder("wan"), "1+1 on"), alone("wan"))


def run_now(folder: Path, case: str) -> Outcome:
    with threaded(folder, **CASES[case]) as (engine, executor):
        return outcome_of(engine, executor, frames_of(engine, stream_of("wan")))


# -- requests that come and go --------------------------------------------------------------------------------------

# So many steps that they are several commands, however quick they are.
LONG = dict(tiny_pipelines.QUICK_SETTINGS["wan"]) | {"num_inference_steps": 30, "guidance_scale": 1.0, "seed": 5}
SHORT = LONG | {"num_inference_steps": 2, "num_frames": 5, "seed": 6}


@pytest.fixture(scope="module")
def expected(tiny_folder: Folder) -> dict[str, Video]:
    """What one process makes of the requests below."""
    with Engine(tiny_folder("wan"), device="cpu", num_workers=1) as engine:
        return frames_of(engine, [VideoRequest(prompt="long", **LONG), VideoRequest(prompt="short", **SHORT)])


@pytest.fixture(scope="module")
def pair(tiny_folder: Folder) -> Iterator[Engine]:
    with threaded(tiny_folder("wan"), **disaggregated(1, 1, "decode", "on")) as (engine, _):
        yield engine


def steps_of(engine: Engine, request_id: str, what: str) -> set[int]:
    return {
        span.index
        for span in engine.timeline().spans
        if span.request_id == request_id and span.what == what and span.index is not None
    }


def collect(
    engine: Engine, prompts: Mapping[str, str], react: Callable[[Progress], None] = lambda _: None
) -> tuple[dict[str, Video], dict[str, type]]:
    """The frames of all requests until every one is over, and how each has ended. `prompts`: by their ids; may grow."""
    parts: dict[str, list[Video]] = {}
    ends: dict[str, type] = {}
    for update in engine.updates():
        prompt = prompts[update.request_id]
        match update:
            case Frames():
                parts.setdefault(prompt, []).append(update.frames)
            case Progress():
                react(update)
            case Finished() | Cancelled() | Failed():
                ends[prompt] = type(update)
    return {prompt: np.concatenate(pieces) for prompt, pieces in parts.items()}, ends


def test_help_comes_and_goes_within_a_request_because_another_is_decoded(
    pair: Engine, expected: dict[str, Video]
) -> None:
    prompts: dict[str, str] = {}
    for request in pair.prepare([VideoRequest(prompt="short", **SHORT), VideoRequest(prompt="long", **LONG)]):
        prompts[pair.submit(request)] = request.prompt
    videos, ends = collect(pair, prompts)
    assert all_near(videos, expected)
    assert set(ends.values()) == {Finished}
    (long,) = (request_id for request_id, prompt in prompts.items() if prompt == "long")
    helped = steps_of(pair, long, "help")
    assert steps_of(pair, long, "step") == set(range(30))
    assert helped, "nobody has helped once the short one was decoded"
    assert 0 not in helped, "the decoder had the short one to decode"


def test_a_higher_priority_goes_first_and_changes_no_video(pair: Engine, expected: dict[str, Video]) -> None:
    low, high = pair.prepare([VideoRequest(prompt="long", **LONG), VideoRequest(prompt="short", **SHORT)])
    prompts = {pair.submit(low): "long"}

    def react(update: Progress) -> None:
        if len(prompts) == 1 and update.stage == "denoise":
            prompts[pair.submit(high, priority=1)] = "short"

    videos, ends = collect(pair, prompts, react)
    assert all_near(videos, expected)
    assert list(ends) == ["short", "long"]


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_a_cancelled_request_leaves_the_others_as_they_are(
    stage: str, pair: Engine, expected: dict[str, Video]
) -> None:
    requests = [VideoRequest(prompt="cancelled", **LONG), VideoRequest(prompt="short", **SHORT)]
    first, second = pair.prepare(requests)
    prompts = {pair.submit(first): "cancelled", pair.submit(second): "short"}
    (victim,) = (request_id for request_id, prompt in prompts.items() if prompt == "cancelled")

    def react(update: Progress) -> None:
        if (update.request_id, update.stage) == (victim, stage):
            pair.cancel(victim)

    videos, ends = collect(pair, prompts, react)
    videos.pop("cancelled", None)
    assert all_near(videos, expected)
    assert ends == {"cancelled": Cancelled, "short": Finished}
    executor = pair._executor
    assert isinstance(executor, ThreadExecutor)
    assert Leftovers.of(executor) == Leftovers(held=0, shelved_bytes=0)


# -- in processes ---------------------------------------------------------------------------------------------------

FAT_ENCODER_BYTES = 96 * MIB


@pytest.fixture(scope="module")
def fat_encoder(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Wan with a text encoder that shows in a process's memory."""
    folder = tmp_path_factory.mktemp("fat") / "wan"
    shutil.copytree(tiny_folder("wan"), folder)
    config = transformers.UMT5Config.from_pretrained(folder / "text_encoder")
    config.d_ff = FAT_ENCODER_BYTES // (4 * 3 * config.d_model * config.num_layers)
    encoder = transformers.UMT5EncoderModel(config)
    tiny_pipelines.randomise(encoder, torch.Generator().manual_seed(0))
    encoder.save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def processes(fat_encoder: Path) -> Iterator[Engine]:
    with Engine(fat_encoder, device="cpu", **disaggregated(1, 2, "decode", "auto")) as engine:
        engine.start()
        yield engine


def test_three_processes_make_the_videos_of_one(processes: Engine, fat_encoder: Path) -> None:
    with Engine(fat_encoder, device="cpu", num_workers=1) as one:
        expected = frames_of(one, stream_of("wan"))
    videos = frames_of(processes, stream_of("wan"))
    assert videos.keys() == expected.keys()
    assert all_near(videos, expected)
    assert not all_near(dict(zip(videos, reversed(videos.values()), strict=True)), expected)


def test_decoders_work_on_different_videos_at_a_time_and_together_on_one_that_is_alone(processes: Engine) -> None:
    before = len(processes.timeline().spans)
    many = SHORT | {"num_inference_steps": 1, "num_frames": 25, "height": 64, "width": 64}  # most of it is decoding
    list(processes.generate(["one", "two", "three", "four", "five"], **many))
    spans = [span for span in processes.timeline().spans[before:] if span.what == "decode"]
    overlaps = [
        (one, other)
        for one, other in itertools.combinations(spans, 2)
        if one.start_s < other.end_s and other.start_s < one.end_s and one.rank != other.rank
    ]
    assert any(one.request_id != other.request_id for one, other in overlaps)
    assert all({span.rank for span in spans if span.request_id == name} != {1, 2} for name in requests_in(spans)[:-1])
    before = len(processes.timeline().spans)
    list(processes.generate("alone", **many))
    decoded = [span for span in processes.timeline().spans[before:] if span.what == "decode"]
    assert {span.rank for span in decoded} == {1, 2}


def requests_in(spans: Sequence[Span]) -> list[str]:
    return list(dict.fromkeys(span.request_id for span in spans))


def test_only_those_who_encode_have_the_memory_of_the_encoder(processes: Engine) -> None:
    list(processes.generate("a red ball", **SHORT))
    peaks = processes.peak_bytes
    assert set(peaks) == {0, 1, 2}
    assert isinstance(processes._executor, LocalProcessExecutor)
    assert min(peaks[1], peaks[2]) - peaks[0] > FAT_ENCODER_BYTES // 2
    assert [len(processes.roles(rank)) for rank in range(3)] == [1, 2, 2]


def test_the_command_line_under_torchrun_divides_the_ranks(
    tiny_folder: Folder, tmp_path: Path, alone: Callable[[str], Outcome]
) -> None:
    requests = [stream_of("wan")[index] for index in (0, 2)]
    lines = [{**dataclasses.asdict(request), "output": f"{n}.npy"} for n, request in enumerate(requests)]
    text = (json.dumps({k: v for k, v in line.items() if v is not None}) for line in lines)
    (tmp_path / "prompts.jsonl").write_text("\n".join(text))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    flags = ("--denoise-workers", "2", "--decode-workers", "1", "--aco", "on", "--trace", "trace.json")
    done = subprocess.run(
        [
            *launcher, "-m", "pipedit", "generate", "--prompt-file", "prompts.jsonl", "-m", str(tiny_folder("wan")),
            "--device", "cpu", *flags,
        ],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["0.npy", "1.npy"], "only rank 0 tells of files"
    known = alone("wan").frames
    videos = {request.prompt: np.load(tmp_path / f"{n}.npy") for n, request in enumerate(requests)}
    assert all_near(videos, known)
    spans = read_trace(tmp_path / "trace.json").spans
    ranks = {what: {span.rank for span in spans if span.what == what} for what in ("step", "decode", "help", "encode")}
    assert (ranks["step"], ranks["decode"]) == ({0, 1}, {2})
    assert ranks["help"] == {2}
    assert "3 workers: 2 denoise, 1" in done.stderr


def test_every_case_is_a_placement_of_its_own() -> None:
    """That the list above has what it claims to have."""
    seen = {(s["denoise_workers"], s["decode_workers"]) for s in DISAGGREGATED.values()}
    assert seen == {(1, 1), (2, 1), (1, 2), (2, 2), (3, 1)}
    assert {s["encode_on"] for s in DISAGGREGATED.values()} == {"denoise", "decode"}
    assert {s["aco"] for s in DISAGGREGATED.values()} == {"on", "off", "auto"}
    assert Placement.serial_decode(2) != Placement.colocated(2)
