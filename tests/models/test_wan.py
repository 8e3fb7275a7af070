"""The Wan family against the plain diffusers pipeline, on tiny pipelines with every parameter randomised."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipedit.core.errors import CheckpointError, NonFiniteError
from pipedit.core.request import VideoRequest
from pipedit.models.adapter import ModelAdapter
from pipedit.models.pixels import to_frames
from pipedit.models.registry import open_model
from pipedit.models.wan.decode import WanDecodeStage
from pipedit.models.wan.denoise import WanDenoiseStage
from tests import tiny_pipelines
from tests.models.parity import assert_close, joined, make_request, run_reference, run_stages

KINDS = ("wan", "wan22", "wan_ti2v")


def load_decode(adapter: ModelAdapter, *, tiling: bool = False) -> WanDecodeStage:
    stage = adapter.load_decode_stage("cpu", adapter.default_precision("cpu"), tiling=tiling)
    assert isinstance(stage, WanDecodeStage)
    return stage


def load_denoise(adapter: ModelAdapter, layers: range | None = None, **precision: str) -> WanDenoiseStage:
    chosen = dataclasses.replace(adapter.default_precision("cpu"), **precision)
    stage = adapter.load_denoise_stage("cpu", chosen, layers)
    assert isinstance(stage, WanDenoiseStage)
    return stage


def random_latents(adapter: ModelAdapter, request: VideoRequest) -> torch.Tensor:
    return torch.randn(adapter.latent_shape(request), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 1.0},
        {"negative_prompt": "blurry", "flow_shift": 7.0, "seed": 11, "num_frames": 1},
    ],
    ids=["guided", "unguided", "shifted"],
)
def test_equals_diffusers(kind: str, settings: dict[str, Any], tiny_folder: Callable[[str], Path]) -> None:
    adapter = open_model(str(tiny_folder(kind)))
    request = make_request(adapter, kind, **settings)
    theirs = run_reference(tiny_folder(kind), request)
    assert_close(run_stages(adapter, request), theirs)
    # The same comparison must fail for another video.
    other = run_stages(adapter, dataclasses.replace(request, seed=99))
    with pytest.raises(AssertionError):
        assert_close(other, theirs)


def test_second_guidance_scale_reaches_the_second_expert(tiny_folder: Callable[[str], Path]) -> None:
    adapter = open_model(str(tiny_folder("wan22")))
    request = make_request(adapter, "wan22", guidance_scale=4.0, guidance_scale_2=2.0)
    theirs = run_reference(tiny_folder("wan22"), request)
    assert_close(run_stages(adapter, request), theirs)
    with pytest.raises(AssertionError):
        assert_close(run_stages(adapter, dataclasses.replace(request, guidance_scale_2=4.0)), theirs)


def test_a_guidance_scale_alone_is_for_both_experts_as_in_diffusers(tiny_folder: Callable[[str], Path]) -> None:
    adapter = open_model(str(tiny_folder("wan22")))
    request = make_request(adapter, "wan22", guidance_scale=6.0, guidance_scale_2=None)
    theirs = run_reference(tiny_folder("wan22"), dataclasses.replace(request, guidance_scale_2=None))
    assert_close(run_stages(adapter, request), theirs)
    with pytest.raises(AssertionError):
        assert_close(run_stages(adapter, dataclasses.replace(request, guidance_scale_2=3.0)), theirs)


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_latents_that_are_no_numbers_are_an_error(kind: str, tiny_folder: Callable[[str], Path]) -> None:
    adapter = open_model(str(tiny_folder(kind)))
    request = make_request(adapter, kind, num_frames=1)
    stage = adapter.load_decode_stage("cpu", adapter.default_precision("cpu"))
    latents = random_latents(adapter, request)
    stage.begin(request, latents)
    for value in (float("nan"), float("inf")):
        latents[0, 0, 0, 0, 0] = value
        with pytest.raises(NonFiniteError, match="float32 or bfloat16"):
            stage.begin(request, latents)


@pytest.mark.parametrize("kind", ["wan", "wan_ti2v"])
def test_chunked_decode_is_bit_equal_to_the_whole(kind: str, tiny_folder: Callable[[str], Path]) -> None:
    adapter = open_model(str(tiny_folder(kind)))
    request = make_request(adapter, kind, num_frames=17)
    stage = load_decode(adapter)
    latents = random_latents(adapter, request)
    state = stage.begin(request, latents)
    other = stage.begin(request, latents.flip(2))  # a second video in turns must not disturb the first
    chunks = []
    for index in range(5):
        chunks.append(stage.chunk(state, index))
        stage.chunk(other, index)
    config = stage.vae.config
    per_channel = (1, config.z_dim, 1, 1, 1)
    mean, std = (torch.tensor(v).view(per_channel) for v in (config.latents_mean, config.latents_std))
    with torch.inference_mode():
        video = stage.vae.decode(latents / (1.0 / std) + mean).sample
    assert np.array_equal(joined(chunks), to_frames(video))


def test_tiled_decode_equals_diffusers_tiling(tiny_folder: Callable[[str], Path]) -> None:
    adapter = open_model(str(tiny_folder("wan")))
    request = make_request(adapter, "wan", num_frames=9, height=64, width=96)
    stage = load_decode(adapter, tiling=True)
    vae = stage.vae
    vae.tile_sample_min_height = vae.tile_sample_min_width = 32
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 24
    latents = random_latents(adapter, request)
    state = stage.begin(request, latents)
    whole = state.latents.window(range(3))
    chunks = joined([stage.chunk(state, index) for index in range(3)])
    vae.use_tiling = True
    with torch.inference_mode():
        video = vae.decode(whole).sample
        vae.use_tiling = False
        untiled = vae.decode(whole).sample
    assert np.array_equal(chunks, to_frames(video))
    assert not np.array_equal(chunks, to_frames(untiled))


def test_layer_range_reads_only_its_shards(tmp_path: Path) -> None:
    tiny_pipelines.build("wan", tmp_path, max_shard_size="100KB")
    adapter = open_model(str(tmp_path))
    weights = adapter.checkpoint.weights("transformer")
    wanted = adapter.layer_split().wanted(range(2, 3))
    names = {n for n in weights.tensors if any(n == p or n.startswith(p + ".") for p in wanted)}
    needed = set(weights.by_file(names))
    assert needed < set(weights.files)
    for file in set(weights.files) - needed:
        file.write_bytes(b"not a safetensors file")  # opening it would fail
    stage = load_denoise(adapter, range(2, 3))
    parameters = dict(stage.experts[0].named_parameters())
    assert not parameters["blocks.2.attn1.to_q.weight"].is_meta
    assert not parameters["proj_out.weight"].is_meta
    assert parameters["blocks.0.attn1.to_q.weight"].is_meta
    assert parameters["patch_embedding.weight"].is_meta
    with pytest.raises(CheckpointError):
        load_denoise(adapter, range(1))


def test_bfloat16_keeps_what_diffusers_keeps_in_float32(tiny_folder: Callable[[str], Path]) -> None:
    adapter = open_model(str(tiny_folder("wan")))
    (expert,) = load_denoise(adapter, transformer="bfloat16").experts
    theirs = tiny_pipelines.load_diffusers(tiny_folder("wan"), dtype=torch.bfloat16).transformer
    ours = {name: p.dtype for name, p in expert.named_parameters()}
    assert ours == {name: p.dtype for name, p in theirs.named_parameters()}
    assert set(ours.values()) == {torch.float32, torch.bfloat16}


def test_the_transformer_is_fed_in_the_precision_asked_for(tiny_folder: Callable[[str], Path]) -> None:
    """Whichever layers were loaded: the last ones hold more parameters that stay in float32."""
    adapter = open_model(str(tiny_folder("wan")))
    request = make_request(adapter, "wan")
    for layers in (None, range(2, 3)):
        stage = load_denoise(adapter, layers, transformer="bfloat16")
        state = stage.begin(request, {"prompt": torch.zeros(1, 4, 32)})
        dtypes = state.course.conditioning["prompt"].dtype, state.noisy.latents.dtype
        assert dtypes == (torch.bfloat16, torch.float32)


def test_refuses_pickled_and_mismatched_weights(tmp_path: Path) -> None:
    tiny_pipelines.build("wan", tmp_path)
    adapter = open_model(str(tmp_path))
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="pickled"):
        load_decode(adapter)
    transformer = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    transformer.write_bytes(transformer.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="download it again"):
        load_denoise(adapter)
