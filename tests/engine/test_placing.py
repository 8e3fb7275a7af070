"""Who does what: what settings mean and which contradict themselves, what is chosen where they leave it open and how it
is told, and whether it fits into memory by role. Configs only: nothing is loaded."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipedit import Engine, InsufficientMemoryError, InvalidRequestError, VideoRequest
from pipedit.core.placement import Placement, Role
from pipedit.core.units import GIB
from pipedit.engine.fitting import check_memory
from pipedit.engine.intake import check_input
from pipedit.engine.placing import describe, placement_of, policy_of, settle
from pipedit.engine.settings import EngineSettings, setting_problems, strategy_problems
from pipedit.engine.sharing import help_notes
from pipedit.executor.simulated import SimulatedExecutor
from pipedit.models.adapter import ModelAdapter
from pipedit.models.registry import open_model, open_published
from pipedit.plan.aco_gate import AcoMode

Folder = Callable[[str], Path]
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SMALL: dict[str, Any] = {"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 3}


# -- what settings mean ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ({"denoise_workers": 2, "decode_workers": 1}, (3, 2, 1)),
        ({"num_workers": 4, "denoise_workers": 3}, (4, 3, 1)),
        ({"num_workers": 4, "decode_workers": 3}, (4, 1, 3)),
        ({"num_workers": 4, "aco": "on"}, (4, None, None)),
        ({"num_workers": 4, "encode_on": "decode", "strategy": "auto"}, (4, None, None)),
    ],
)
def test_the_third_count_and_the_strategy_follow_from_what_is_given(
    given: dict[str, Any], counts: tuple[int | None, ...]
) -> None:
    settings = EngineSettings.of(**given)
    assert (settings.num_workers, settings.denoise_workers, settings.decode_workers) == counts
    assert settings.strategy == "disaggregated"
    assert strategy_problems(settings) == []


@pytest.mark.parametrize(
    "given", [{}, {"num_workers": 2}, {"num_workers": 2, "aco": "off"}, {"num_workers": 2, "denoise_workers": None}]
)
def test_otherwise_who_does_what_is_open(given: dict[str, Any]) -> None:
    settings = EngineSettings.of(**given)
    assert settings.strategy == "auto"
    assert not settings.is_placed
    assert settings.num_denoisers == settings.num_workers


def test_a_launcher_says_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    settings = EngineSettings.of(decode_workers=1)
    assert (settings.num_workers, settings.denoise_workers) == (4, 3)
    (problem,) = strategy_problems(EngineSettings.of(denoise_workers=2, decode_workers=1))
    assert problem == "denoise_workers=2 and decode_workers=1 make 3, not 4 workers"


def test_degrees_are_those_of_the_denoisers() -> None:
    assert EngineSettings.of(denoise_workers=4, decode_workers=2).num_denoisers == 4
    open_split = EngineSettings.of(num_workers=8, strategy="disaggregated", ulysses_degree=3, cfg_degree=2)
    assert open_split.num_denoisers == 6
    assert open_split.degree_problems(heads=24) == []
    too_many = dataclasses.replace(open_split, ring_degree=2)
    (problem,) = too_many.degree_problems(heads=24)
    assert "cannot run on 7 denoise workers: together they make 12" in problem


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"denoise_workers": 2, "decode_workers": 0}, "decode_workers=0 must be a whole number of at least 1"),
        ({"num_workers": 3, "denoise_workers": "2"}, "denoise_workers='2' must be a whole number"),
        ({"num_workers": 3, "denoise_workers": True}, "denoise_workers=True must be a whole number"),
        ({"num_workers": 4, "denoise_workers": 2, "decode_workers": 1}, "make 3, not 4 workers"),
        ({"num_workers": 2, "denoise_workers": 2}, "denoise_workers=2 leaves none of 2 workers to decode"),
        ({"num_workers": 2, "decode_workers": 3}, "decode_workers=3 leaves none of 2 workers to denoise"),
        ({"num_workers": 1, "strategy": "disaggregated"}, "needs at least 2 workers"),
        ({"num_workers": 1, "aco": "on"}, "needs at least 2 workers"),
        ({"denoise_workers": 1, "decode_workers": 10**9}, "is too many; use at most 1024"),
        ({"num_workers": 2.0, "strategy": "disaggregated"}, "num_workers=2.0 should be a whole number"),
        ({"num_workers": 2, "strategy": "colocated", "decode_workers": 1}, "decode_workers needs strategy disagg"),
        ({"num_workers": 2, "strategy": "colocated", "encode_on": "decode"}, "encode_on needs strategy disagg"),
        ({"num_workers": 2, "strategy": "colocated", "aco": "on"}, "aco='on' needs strategy disagg"),
        ({"num_workers": 2, "aco": "on", "offload": True}, "offload needs strategy colocated"),
        ({"num_workers": 2, "encode_on": "decode", "decode": "serial"}, "decode='serial' needs strategy colocated"),
        ({"num_workers": 3, "aco": "on", "ring_degree": 2}, "aco='on' needs ring_degree=1, not 2"),
        ({"strategy": "both"}, "strategy='both' is unknown; use auto, colocated, disaggregated"),
        ({"aco": "sometimes"}, "aco='sometimes' is unknown; use auto, on, off"),
        ({"decode": "all"}, "decode='all' is unknown; use spread, serial"),
        ({"encode_on": "cpu"}, "encode_on='cpu' is unknown; use denoise, decode"),
    ],
)
def test_what_contradicts_itself_is_refused_in_one_sentence(given: dict[str, Any], said: str) -> None:
    problems = setting_problems(EngineSettings.of(**{"device": "cpu", **given}))
    assert len(problems) == 1
    assert said in problems[0]


def test_everything_unknown_is_told_at_once() -> None:
    settings = EngineSettings.of(strategy="both", aco="sometimes", decode="all", encode_on="cpu", hardware="h10")
    problems = setting_problems(settings)
    assert [problem.split("=")[0] for problem in problems[:4]] == ["strategy", "aco", "decode", "encode_on"]
    assert "did you mean h100?" in problems[4]


def test_hardware_that_is_not_there_is_refused_before_anything_runs(tiny_folder: Folder) -> None:
    for settings in ({}, {"num_workers": 2}, {"num_workers": 2, "strategy": "colocated"}):
        with pytest.raises(InvalidRequestError, match=r"nowhere\.json is not a device file: No such file"):
            Engine(tiny_folder("wan"), device="cpu", hardware="nowhere.json", **settings)


def test_more_denoisers_than_the_request_has_tokens_are_refused_by_their_name(tiny_folder: Folder) -> None:
    settings = EngineSettings.of(model=str(tiny_folder("wan")), device="cpu", denoise_workers=40, decode_workers=1)
    (problem,) = check_input(settings, [VideoRequest(prompt="x", **SMALL)]).problems
    assert problem.startswith("denoise_workers=40 is too many: the request has 18 tokens")


# -- what is chosen -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan(tiny_folder: Folder) -> ModelAdapter:
    return open_model(str(tiny_folder("wan")))


@pytest.fixture(scope="module")
def hunyuan() -> ModelAdapter:
    """The published one: 26 GB of transformer, 15 GB of text encoder."""
    return open_published("hunyuanvideo")


def settled(
    settings: EngineSettings, adapter: ModelAdapter, *, prompts: int = 4, gib: int = 1000, **request: Any
) -> tuple[EngineSettings, str]:
    requests = [adapter.complete(VideoRequest(prompt=str(number), **request)) for number in range(prompts)]
    return settle(settings, adapter, requests, adapter.default_precision("cuda"), available_bytes=gib * GIB)


def test_settings_that_leave_nothing_open_stay_as_they_are(wan: ModelAdapter) -> None:
    for given in (
        {"num_workers": 2, "strategy": "colocated", "decode": "serial", "offload": True},
        {"denoise_workers": 2, "decode_workers": 1, "encode_on": "decode", "aco": "on"},
    ):
        settings = EngineSettings.of(**given)
        assert settled(settings, wan) == (settings, "")


def test_one_worker_does_everything_without_a_word(wan: ModelAdapter) -> None:
    settings, reason = settled(EngineSettings(num_workers=1), wan)
    assert (settings.strategy, reason) == ("colocated", "")
    assert placement_of(settings) == Placement.colocated(1)


def test_without_known_hardware_workers_stay_together(wan: ModelAdapter) -> None:
    settings, reason = settled(EngineSettings(num_workers=3), wan)
    assert placement_of(settings) == Placement.colocated(3)
    assert reason.startswith("3 workers do everything: nothing is known of this hardware")
    _, reason = settled(EngineSettings(num_workers=3, hardware="a6000"), wan, prompts=1)
    assert "one video has no other" in reason
    settings, _ = settle(EngineSettings(num_workers=3), wan, [], wan.default_precision("cpu"), available_bytes=GIB)
    assert settings.is_placed, "loading may come before the first request"


def test_what_is_asked_for_of_colocated_workers_is_kept(wan: ModelAdapter) -> None:
    settings, reason = settled(EngineSettings(num_workers=2, decode="serial"), wan)
    assert placement_of(settings) == Placement.serial_decode(2)
    assert reason == "2 workers do everything, one decodes"
    settings, reason = settled(EngineSettings(num_workers=2, offload=True), wan)
    assert (settings.offload, settings.decode) == (True, "spread")
    assert reason == "2 workers do everything, weights wait in host memory"


def test_what_two_groups_leave_open_is_chosen(wan: ModelAdapter) -> None:
    settings, reason = settled(EngineSettings.of(num_workers=4, strategy="disaggregated"), wan)
    placement = placement_of(settings)
    assert placement.is_disaggregated
    assert placement.world == (0, 1, 2, 3)
    assert reason == describe(settings)
    settings, _ = settled(EngineSettings.of(denoise_workers=1, decode_workers=3), wan)
    assert (settings.denoise_workers, settings.decode_workers) == (1, 3)
    assert settings.encode_on in ("denoise", "decode")
    settings, _ = settled(EngineSettings.of(num_workers=5, strategy="disaggregated", ulysses_degree=3), wan)
    assert settings.denoise_workers == 3
    settings, _ = settled(EngineSettings.of(num_workers=3, encode_on="denoise"), wan)
    assert placement_of(settings).encodes_locally


def test_help_that_was_asked_for_stays_asked_for(wan: ModelAdapter) -> None:
    settings, _ = settled(EngineSettings.of(num_workers=3, aco="on"), wan)
    assert policy_of(settings).aco is AcoMode.ON
    settings, _ = settled(EngineSettings.of(denoise_workers=5, decode_workers=1, aco="on"), wan)  # it has four heads
    assert policy_of(settings).aco is AcoMode.ON
    settings, _ = settled(EngineSettings.of(num_workers=3, strategy="disaggregated", aco="off"), wan)
    assert policy_of(settings).aco is AcoMode.OFF


@pytest.mark.parametrize(
    ("given", "guidance", "why"),
    [
        ({"denoise_workers": 2, "decode_workers": 1}, 5.0, "both guidance groups need a decode worker"),
        ({"denoise_workers": 2, "decode_workers": 1}, 1.0, ""),
        ({"denoise_workers": 2, "decode_workers": 2}, 5.0, ""),
        ({"denoise_workers": 3, "decode_workers": 1}, 1.0, "nobody can help a ring; ring_degree=1"),
        ({"denoise_workers": 4, "decode_workers": 1}, 1.0, "4 heads cannot go round 4 workers and 1 more"),
    ],
)
def test_why_nobody_can_help_is_told(given: dict[str, Any], guidance: float, why: str, wan: ModelAdapter) -> None:
    request = wan.complete(VideoRequest(prompt="x", guidance_scale=guidance, **SMALL))
    settings = EngineSettings.of(**given, aco="on", encode_on="decode")
    notes = list(help_notes([request, request], wan, settings))
    assert len(notes) == bool(why)
    assert all(note.startswith("aco=on changes nothing with cfg") and why in note for note in notes)
    assert list(help_notes([request], wan, dataclasses.replace(settings, aco="auto"))) == []


def test_too_little_memory_for_everything_makes_two_groups(hunyuan: ModelAdapter) -> None:
    size = {"num_frames": 33, "width": 512, "height": 320}
    settings, reason = settled(EngineSettings(num_workers=4), hunyuan, gib=36, **size)
    placement = placement_of(settings)
    assert placement.is_disaggregated
    assert settings.encode_on == "decode", "the text encoder has no room beside the transformer"
    assert "encode and decode" in reason or "encodes and decodes" in reason
    assert ": with everything on every worker, 33 frames of 512x320 need about" in reason
    roomy, _ = settled(EngineSettings(num_workers=4), hunyuan, gib=80, **size)
    assert placement_of(roomy) == Placement.colocated(4)


def test_with_known_hardware_what_is_predicted_to_be_soonest_is_taken(hunyuan: ModelAdapter) -> None:
    size = {"num_frames": 33, "width": 512, "height": 320}
    settings, reason = settled(EngineSettings(num_workers=4, hardware="a6000"), hunyuan, prompts=10, gib=44, **size)
    assert settings.is_placed
    assert ": predicted " in reason
    assert " for 10 videos" in reason
    assert reason.startswith(describe(settings))


def test_weights_are_not_offloaded_from_the_processor(wan: ModelAdapter) -> None:
    for device in ("cpu", "auto"):  # there is no GPU here, or tests do not see it
        settings = EngineSettings(num_workers=2, hardware="cpu", device=device)
        if device == "cpu" or not _has_cuda():
            _, reason = settled(settings, wan)
            assert "offloaded" not in reason


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def test_the_engine_tells_who_does_what(tiny_folder: Folder) -> None:
    executor = SimulatedExecutor()
    settings: dict[str, Any] = {"denoise_workers": 2, "decode_workers": 1, "encode_on": "decode", "aco": "on"}
    engine = Engine(tiny_folder("wan"), device="cpu", executor=executor, **settings)
    (request,) = engine.prepare([VideoRequest(prompt="x", **SMALL)])
    assert engine.division == "2 denoise, 1 encodes and decodes"
    assert [engine.roles(rank) for rank in range(3)] == [(Role.DENOISER,)] * 2 + [(Role.ENCODER, Role.DECODER)]
    assert any("aco=on changes nothing" in note for note in engine.notes([request]))


# -- memory by role -------------------------------------------------------------------------------------------------


def fits(adapter: ModelAdapter, placement: Placement, gib: Sequence[int], *, offload: bool = False) -> bool:
    devices = tuple(f"cuda:{rank}" for rank in placement.world)
    request = adapter.complete(VideoRequest(prompt="", num_frames=33, width=512, height=320))
    try:
        check_memory(
            [request],
            adapter,
            devices,
            adapter.default_precision("cuda"),
            placement=placement,
            free_bytes={device: size * GIB for device, size in zip(devices, gib, strict=True)},
            offload=offload,
        )
    except InsufficientMemoryError:
        return False
    return True


def test_each_worker_needs_memory_for_its_roles_only(hunyuan: ModelAdapter) -> None:
    with_text = Placement.disaggregated(denoise=1, decode=1, encoder=Role.DECODER)
    without = Placement.disaggregated(denoise=1, decode=1, encoder=Role.DENOISER)
    assert not fits(hunyuan, Placement.colocated(2), (36, 36))
    assert fits(hunyuan, with_text, (36, 36))
    assert not fits(hunyuan, without, (36, 36)), "transformer and text encoder together"
    assert fits(hunyuan, without, (60, 12))
    assert not fits(hunyuan, with_text, (36, 12)), "text encoder and VAE"
    assert not fits(hunyuan, with_text, (12, 36)), "transformer"


def test_offloaded_weights_need_room_for_one_part_at_a_time(hunyuan: ModelAdapter) -> None:
    assert fits(hunyuan, Placement.colocated(2), (36, 36), offload=True)
    assert not fits(hunyuan, Placement.colocated(2), (20, 36), offload=True)


def test_what_a_worker_lacks_is_told_with_what_would_fit(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipedit.engine.fitting.available_bytes", lambda _device: GIB)
    engine = Engine(tiny_folder("wan"), device="cpu", executor=SimulatedExecutor(), denoise_workers=1, decode_workers=1)
    with pytest.raises(InsufficientMemoryError, match=r"on 2 workers need about 1\.0 GiB .* would fit: 1 worker inst"):
        engine.prepare([VideoRequest(prompt="x", **SMALL)])
