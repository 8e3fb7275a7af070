"""The fixtures themselves: random everywhere, reproducible, and sensitive to all that a parity test must notice."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from safetensors.torch import load_file

from tests import tiny_pipelines
from tests.tiny_pipelines import KINDS, QUICK_SETTINGS, Frames

PROMPT = "a red ball moves right"
WAN_KINDS = tuple(kind for kind in KINDS if kind != "hunyuan")
Run = Callable[..., tuple[torch.Tensor, Frames]]


@pytest.fixture(scope="module")
def loaded(tiny_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """`loaded(kind)` is the diffusers pipeline, loaded once for this file."""
    return functools.cache(lambda kind: tiny_pipelines.load_diffusers(tiny_folder(kind)))


@pytest.fixture(scope="module")
def run(loaded: Callable[[str], Any]) -> Run:
    """`run(kind, **changes)` runs with the quick settings and these changes."""

    def run_kind(kind: str, **changes: Any) -> tuple[torch.Tensor, Frames]:
        settings: dict[str, Any] = {"prompt": PROMPT, "seed": 0, **QUICK_SETTINGS[kind], **changes}
        return tiny_pipelines.run_pipeline(loaded(kind), **settings)

    return run_kind


def assert_differs(one: tuple[torch.Tensor, Frames], other: tuple[torch.Tensor, Frames]) -> None:
    assert (one[0] - other[0]).abs().mean() > 1e-2
    assert np.abs(one[1].astype(int) - other[1].astype(int)).mean() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_random(kind: str, tiny_folder: Callable[[str], Path]) -> None:
    constant = [
        name
        for path in tiny_folder(kind).rglob("*.safetensors")
        for name, tensor in load_file(path).items()
        if tensor.numel() > 1 and tensor.std() < 1e-2
    ]
    assert not constant


@pytest.mark.parametrize("kind", KINDS)
def test_build_writes_the_same_bytes_again(kind: str, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    first = tiny_folder(kind)
    tiny_pipelines.build(kind, tmp_path)
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_run_repeats_and_returns_what_it_says(kind: str, run: Run, loaded: Callable[[str], Any]) -> None:
    latents, frames = run(kind)
    settings = QUICK_SETTINGS[kind]
    assert frames.shape == (9, settings["height"], settings["width"], 3)
    assert frames.dtype == np.uint8
    assert latents.dtype == torch.float32
    run(kind, flow_shift=11.0)  # must leave nothing behind
    again = run(kind)
    assert torch.equal(latents, again[0])
    assert np.array_equal(frames, again[1])
    generator = torch.Generator("cpu").manual_seed(0)
    plain = loaded(kind)(prompt=PROMPT, generator=generator, output_type="latent", **settings).frames
    assert torch.equal(latents, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_spread_over_the_range(kind: str, run: Run) -> None:
    """Pixels stuck at 0 or 255, or all alike, would hide errors."""
    _, frames = run(kind)
    assert np.isin(frames, (0, 255)).mean() < 0.05
    assert frames.std(axis=(0, 1, 2)).min() > 25  # each colour
    assert frames.std(axis=(1, 2)).mean() > 25  # within a frame
    assert frames.std(axis=0).mean() > 8  # over time


CHANGES: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "a blue square stands still"},
    "last word": {"prompt": "a red ball moves left"},
    "empty prompt": {"prompt": ""},
    "seed": {"seed": 1},
    "guidance": {"guidance_scale": 2.0},
    "flow shift": {"flow_shift": 11.0},
    "steps": {"num_inference_steps": 4},
}
WAN_CHANGES: dict[str, dict[str, Any]] = {
    "negative prompt": {"negative_prompt": "blue"},
    "text length": {"max_sequence_length": 64},  # padding zeros are keys
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_change_shows(kind: str, change: str, run: Run) -> None:
    assert_differs(run(kind), run(kind, **CHANGES[change]))


@pytest.mark.parametrize("kind", WAN_KINDS)
@pytest.mark.parametrize("change", WAN_CHANGES)
def test_wan_change_shows(kind: str, change: str, run: Run) -> None:
    assert_differs(run(kind), run(kind, **WAN_CHANGES[change]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [0, 1])
def test_zeroed_text_shows(
    kind: str, position: int, run: Run, loaded: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wan: prompt and negative prompt. HunyuanVideo: Llama's and CLIP's embedding."""
    expected = run(kind)
    encode = loaded(kind).encode_prompt

    def encode_zero(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        result = list(encode(*args, **kwargs))
        result[position] = torch.zeros_like(result[position])
        return tuple(result)

    monkeypatch.setattr(loaded(kind), "encode_prompt", encode_zero)
    assert_differs(expected, run(kind))


def test_both_experts_are_used(run: Run, loaded: Callable[[str], Any]) -> None:
    pipe, calls = loaded("wan22"), {"transformer": 0, "transformer_2": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    hooks = [getattr(pipe, name).register_forward_hook(count(name)) for name in calls]
    run("wan22")
    for hook in hooks:
        hook.remove()
    assert calls == {"transformer": 4, "transformer_2": 8}  # 2 and 4 steps, with and without the prompt
    assert_differs(run("wan22"), run("wan22", guidance_scale_2=9.0))


def test_hunyuan_prompt_survives_the_crop(loaded: Callable[[str], Any]) -> None:
    tokenizer, template = loaded("hunyuan").tokenizer, DEFAULT_PROMPT_TEMPLATE
    assert len(tokenizer(template["template"].split("{}")[0]).input_ids) == template["crop_start"] == 95
    ids = tokenizer(template["template"].format("Zebra: a red ball, 1234 x")).input_ids
    assert tokenizer.decode(ids[95:]) == "Zebra: a red ball, 1234 x<|eot_id|>"


def test_hunyuan_tokenizer_class_is_a_trap(tiny_folder: Callable[[str], Path], loaded: Callable[[str], Any]) -> None:
    """As in published checkpoints, the class named in model_index.json gives other ids without a word."""
    named = transformers.LlamaTokenizerFast.from_pretrained(tiny_folder("hunyuan"), subfolder="tokenizer")
    assert named(PROMPT).input_ids != loaded("hunyuan").tokenizer(PROMPT).input_ids


def test_hunyuan_padding_is_masked_but_the_negative_prompt_shows(run: Run) -> None:
    expected = run("hunyuan")
    assert torch.allclose(expected[0], run("hunyuan", max_sequence_length=64)[0], atol=1e-5)
    assert_differs(expected, run("hunyuan", true_cfg_scale=3.0, negative_prompt="blue"))


def test_hunyuan_mask_shows(run: Run, loaded: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run("hunyuan")
    encode = loaded("hunyuan").encode_prompt

    def encode_unmasked(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        embeddings, pooled, mask = encode(*args, **kwargs)
        return embeddings, pooled, torch.ones_like(mask)

    monkeypatch.setattr(loaded("hunyuan"), "encode_prompt", encode_unmasked)
    assert_differs(expected, run("hunyuan"))


def test_hunyuan_temporal_tiling_shows(run: Run, loaded: Callable[[str], Any]) -> None:
    """The default decode of more than 4 latent frames is tiled in time; one pass gives another video."""
    tiled = run("hunyuan", num_frames=25)
    loaded("hunyuan").vae.use_framewise_decoding = False
    whole = run("hunyuan", num_frames=25)
    loaded("hunyuan").vae.use_framewise_decoding = True
    assert torch.equal(tiled[0], whole[0])
    assert np.abs(tiled[1].astype(int) - whole[1].astype(int)).max() > 8


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_shards_hold_the_same_model(kind: str, run: Run, tmp_path: Path) -> None:
    tiny_pipelines.build(kind, tmp_path, max_shard_size="100KB")
    shards = list((tmp_path / "transformer").glob("*.safetensors"))
    assert len(shards) > 3
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    latents, _ = tiny_pipelines.run_diffusers(tmp_path, prompt=PROMPT, seed=0, **QUICK_SETTINGS[kind])
    assert torch.allclose(latents, run(kind)[0], atol=1e-5)
