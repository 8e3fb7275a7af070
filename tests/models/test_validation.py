"""Checks of requests against a model: all problems, in the user's words, and nothing that is fine."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipedit.core.request import VideoRequest
from pipedit.models.registry import open_model
from pipedit.models.validation import check_request


@pytest.fixture
def problems_of(tiny_folder: Callable[[str], Path]) -> Callable[..., list[str]]:
    def check(kind: str = "wan", **settings: Any) -> list[str]:
        adapter = open_model(str(tiny_folder(kind)))
        request = adapter.complete(VideoRequest(**{"prompt": "a red ball", **settings}))
        return check_request(request, adapter)

    return check


def test_a_good_request_has_no_problems(problems_of: Callable[..., list[str]]) -> None:
    for kind in ("wan", "wan22", "wan_ti2v", "hunyuan"):
        assert problems_of(kind) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_frames": 80}, "nearest are 77 and 81"),
        ({"num_frames": 2}, "nearest are 1 and 5"),
        ({"num_frames": 0}, "nearest are 1 and 5"),
        ({"num_frames": -7}, "nearest are 1 and 5"),
        ({"height": 500}, "nearest are 496 and 512"),
        ({"width": 8}, "nearest are 16 and 32"),
        ({"height": 0}, "nearest are 16 and 32"),
        ({"num_frames": 257}, "positions for: 253"),
        ({"width": 1040}, "positions for: 1024"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"guidance_scale": -1.0}, "at least 0"),
        ({"guidance_scale": float("inf")}, "at least 0"),
        ({"flow_shift": 0.0}, "above 0"),
        ({"fps": -1}, "between 0.01 and 1000"),
        ({"fps": 0.001}, "between 0.01 and 1000"),
        ({"fps": float("nan")}, "between 0.01 and 1000"),
        ({"fps": 1001}, "between 0.01 and 1000"),
        ({"guidance_scale": float("nan")}, "at least 0"),
        ({"guidance_scale": 10**400}, "too large"),
        ({"num_inference_steps": 10**5000}, "too large"),
        ({"num_inference_steps": 1001}, "noise levels: 1000"),
        ({"seed": 10**5000}, "between 0 and"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": "a \ud83d ball"}, "half a character"),
        ({"negative_prompt": "\udc80"}, "half a character"),
        ({"negative_prompt": "blue", "guidance_scale": 1.0}, "no effect"),
        ({"seed": -1}, "between 0 and"),
        ({"seed": 2**63}, "between 0 and"),
        ({"prompt": " \n"}, "empty"),
        ({"guidance_scale_2": 3.0}, "two experts"),
        ({"true_cfg_scale": 3.0}, "only for HunyuanVideo"),
        ({"num_frames": "81"}, "should be int"),
        ({"num_frames": 81.0}, "should be int"),
        ({"height": True}, "should be int"),
        ({"prompt": 5}, "should be str"),
    ],
)
def test_each_problem_is_said_once_and_in_words(
    settings: dict[str, Any], said: str, problems_of: Callable[..., list[str]]
) -> None:
    found = problems_of(**settings)
    assert len(found) == 1
    assert said in found[0]


def test_all_problems_come_together(problems_of: Callable[..., list[str]]) -> None:
    found = problems_of(prompt="", num_frames=80, height=500, width=1, num_inference_steps=-1, seed=-5)
    assert len(found) == 6


def test_an_overlong_prompt_says_what_would_be_cut(problems_of: Callable[..., list[str]]) -> None:
    words = " ".join(["ball"] * 40) + " tail end"
    (found,) = problems_of(prompt=words, max_sequence_length=32)
    assert "longer than 32 tokens" in found
    assert found.rstrip('"').endswith("tail end")
    assert problems_of(prompt=words, max_sequence_length=512) == []
    # Exactly at the limit nothing is cut: 31 words and the end token.
    assert problems_of(prompt=" ".join(["ball"] * 31), max_sequence_length=32) == []
    assert len(problems_of(prompt=" ".join(["ball"] * 32), max_sequence_length=32)) == 1


def test_true_cfg_needs_a_negative_prompt(problems_of: Callable[..., list[str]]) -> None:
    assert len(problems_of("hunyuan", true_cfg_scale=3.0)) == 1
    assert problems_of("hunyuan", true_cfg_scale=3.0, negative_prompt="blurry") == []


def test_every_field_of_the_request_is_checked_for_its_type() -> None:
    kinds = {field.name: str(field.type) for field in dataclasses.fields(VideoRequest)}
    assert all(any(kind in text for kind in ("int", "float", "str")) for text in kinds.values())


def test_numbers_of_other_libraries_are_numbers(tiny_folder: Callable[[str], Path]) -> None:
    adapter = open_model(str(tiny_folder("wan")))
    settings: dict[str, Any] = {"num_frames": np.int64(5), "fps": np.float32(8), "seed": np.uint32(3)}
    asked = VideoRequest(prompt="a red ball", guidance_scale=np.float64(2.5), **settings)
    assert check_request(asked, adapter) == []
    request = adapter.complete(asked)
    assert json.loads(json.dumps(request.settings()))["num_frames"] == 5
    assert {type(value) for value in request.settings().values()} <= {int, float, str}
    assert "num_frames=np.True_ should be int" in check_request(VideoRequest(prompt="x", num_frames=np.True_), adapter)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "has_effect"), [({}, True), ({"use_flow_sigmas": False}, False), ({"use_karras_sigmas": True}, False)]
)
def test_a_shift_that_the_noise_scheduler_ignores_is_a_problem(
    changes: dict[str, bool], has_effect: bool, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    for item in tiny_folder("wan").iterdir():
        (tmp_path / item.name).symlink_to(item)
    config = open_model(str(tmp_path)).checkpoint.config("scheduler")
    (tmp_path / "scheduler").unlink()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, **changes}))
    adapter = open_model(str(tmp_path))
    found = check_request(adapter.complete(VideoRequest(prompt="a red ball", flow_shift=7.0)), adapter)
    assert [("flow_shift=7.0 has no effect" in problem) for problem in found] == ([] if has_effect else [True])
    assert check_request(adapter.complete(VideoRequest(prompt="a red ball")), adapter) == []


def test_guidance_of_two_experts_follows_the_one_given(tiny_folder: Callable[[str], Path]) -> None:
    adapter = open_model(str(tiny_folder("wan22")))

    def scales(**settings: Any) -> tuple[float | None, float | None]:
        request = adapter.complete(VideoRequest(prompt="a red ball", **settings))
        return request.guidance_scale, request.guidance_scale_2

    assert scales() == (4.0, 3.0)
    assert scales(guidance_scale=6.0) == (6.0, 6.0)
    assert scales(guidance_scale_2=2.0) == (4.0, 2.0)
    assert scales(guidance_scale=6.0, guidance_scale_2=2.0) == (6.0, 2.0)
