"""HunyuanVideo against the plain diffusers pipeline, on a tiny pipeline with every parameter randomised."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from pipedit.core.errors import CheckpointError
from pipedit.models.hunyuan_video import HunyuanVideoAdapter, tiles
from pipedit.models.hunyuan_video.decode import HunyuanVideoDecodeStage
from pipedit.models.hunyuan_video.denoise import HunyuanVideoDenoiseStage
from pipedit.models.hunyuan_video.layout import HunyuanVideoLayout
from pipedit.models.hunyuan_video.prompt import PROMPT_FRAME
from pipedit.models.hunyuan_video.text import HunyuanVideoTextStage
from pipedit.models.pixels import to_frames
from pipedit.models.registry import open_model
from pipedit.models.validation import check_request
from tests import tiny_pipelines
from tests.models.parity import PROMPT, assert_close, denoise, joined, make_request, run_reference, run_stages


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("hunyuan")


@pytest.fixture(scope="module")
def adapter(folder: Path) -> HunyuanVideoAdapter:
    opened = open_model(str(folder))
    assert isinstance(opened, HunyuanVideoAdapter)
    return opened


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    """The diffusers pipeline. Read only."""
    return tiny_pipelines.load_diffusers(folder)


@pytest.fixture(scope="module")
def text_stage(adapter: HunyuanVideoAdapter) -> HunyuanVideoTextStage:
    stage = adapter.load_text_stage("cpu", adapter.default_precision("cpu"))
    assert isinstance(stage, HunyuanVideoTextStage)
    return stage


@pytest.fixture(scope="module")
def denoise_stage(adapter: HunyuanVideoAdapter) -> HunyuanVideoDenoiseStage:
    stage = adapter.load_denoise_stage("cpu", adapter.default_precision("cpu"))
    assert isinstance(stage, HunyuanVideoDenoiseStage)
    return stage


def load_decode_stage(adapter: HunyuanVideoAdapter, *, tiling: bool = False) -> HunyuanVideoDecodeStage:
    stage = adapter.load_decode_stage("cpu", adapter.default_precision("cpu"), tiling=tiling)
    assert isinstance(stage, HunyuanVideoDecodeStage)
    return stage


# -- parity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "other"),
    [
        ({}, {"seed": 4}),
        ({"guidance_scale": 2.0, "flow_shift": 3.0, "num_frames": 1}, {"guidance_scale": 6.0}),
        ({"num_frames": 29, "num_inference_steps": 2}, {"prompt": "a red ball moves left"}),
        (
            {"true_cfg_scale": 3.0, "negative_prompt": "two green triangles", "max_sequence_length": 4},
            {"negative_prompt": ""},
        ),
    ],
    ids=["plain", "shifted", "several tiles", "true guidance, cut prompt"],
)
def test_equals_diffusers(
    settings: dict[str, Any], other: dict[str, Any], adapter: HunyuanVideoAdapter, folder: Path
) -> None:
    request = make_request(adapter, "hunyuan", **settings)
    theirs = run_reference(folder, request)
    assert_close(run_stages(adapter, request), theirs)
    with pytest.raises(AssertionError):  # the same comparison must fail for another video
        assert_close(run_stages(adapter, dataclasses.replace(request, **other)), theirs)


def test_bfloat16_stays_near_diffusers(adapter: HunyuanVideoAdapter, folder: Path) -> None:
    request = make_request(adapter, "hunyuan")
    ours = denoise(adapter, request, text_encoder="bfloat16", transformer="bfloat16")
    assert ours.dtype == torch.float32
    asked = {"prompt": PROMPT, "seed": request.seed, **tiny_pipelines.QUICK_SETTINGS["hunyuan"]}
    theirs, _ = tiny_pipelines.run_diffusers(folder, dtype=torch.bfloat16, **asked)
    exact, _ = tiny_pipelines.run_diffusers(folder, **asked)
    assert (ours - theirs).abs().mean() < 2 * (theirs - exact).abs().mean()


def test_guidance_is_scaled_in_the_model_precision(adapter: HunyuanVideoAdapter) -> None:
    precision = dataclasses.replace(adapter.default_precision("cpu"), transformer="bfloat16")
    stage = adapter.load_denoise_stage("cpu", precision)
    state = stage.begin(make_request(adapter, "hunyuan", guidance_scale=6.0), {})
    assert state.course.guidance.item() == 6016


def test_timesteps_have_the_type_of_the_latents(adapter: HunyuanVideoAdapter) -> None:
    """As diffusers gives them: float32 for the noise, then as the noise scheduler returns latents."""
    stage = adapter.load_denoise_stage(
        "cpu", dataclasses.replace(adapter.default_precision("cpu"), transformer="bfloat16")
    )
    state = stage.begin(
        make_request(adapter, "hunyuan"), {"prompt": torch.zeros(1, 4, 32), "pooled": torch.zeros(1, 16)}
    )
    seen = []
    for step in range(3):
        timestep = state.course.inputs(step, 0, state.noisy.latents)["timestep"]
        seen.append(timestep.dtype)
        assert timestep.dtype == state.noisy.latents.dtype
        stage.step(state, step)
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]


# -- text ---------------------------------------------------------------------------------------------------------


def test_prompt_frame_is_the_published_one() -> None:
    template = PROMPT_FRAME.before + "{}" + PROMPT_FRAME.after
    assert {"template": template, "crop_start": PROMPT_FRAME.cropped_tokens} == DEFAULT_PROMPT_TEMPLATE


def test_text_is_the_valid_part_of_diffusers(
    adapter: HunyuanVideoAdapter, text_stage: HunyuanVideoTextStage, pipeline: Any
) -> None:
    ours = text_stage.encode(make_request(adapter, "hunyuan"))
    embeddings, pooled, mask = pipeline.encode_prompt(PROMPT, max_sequence_length=32)
    valid = int(mask.sum())
    assert ours["prompt"].shape[1] == valid < 32
    assert torch.allclose(ours["prompt"], embeddings[:, :valid], atol=1e-6)
    assert torch.allclose(ours["pooled"], pooled, atol=1e-6)


def test_last_layers_are_not_loaded(text_stage: HunyuanVideoTextStage, adapter: HunyuanVideoAdapter) -> None:
    assert len(text_stage.llama.layers) == adapter.checkpoint.config("text_encoder")["num_hidden_layers"] - 2


def test_tokenizer_is_not_the_class_that_the_checkpoint_names(
    text_stage: HunyuanVideoTextStage, adapter: HunyuanVideoAdapter, pipeline: Any
) -> None:
    named = getattr(transformers, adapter.checkpoint.component_class("tokenizer") or "")
    wrong = named.from_pretrained(adapter.checkpoint.path("tokenizer"))
    assert text_stage.tokenizer(PROMPT).input_ids == pipeline.tokenizer(PROMPT).input_ids
    assert text_stage.tokenizer(PROMPT).input_ids != wrong(PROMPT).input_ids


def test_long_prompt_is_cut_for_clip_alone(
    text_stage: HunyuanVideoTextStage, adapter: HunyuanVideoAdapter, pipeline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "a red ball moves right " * 6 + "and the last words"
    request = make_request(adapter, "hunyuan", prompt=prompt, max_sequence_length=256)
    assert check_request(request, adapter) == []
    with caplog.at_level(logging.WARNING, logger="pipedit"):
        pooled = text_stage.encode(request)["pooled"]
    assert torch.allclose(pooled, pipeline.encode_prompt(prompt)[1], atol=1e-6)
    (record,) = (record for record in caplog.records if record.name.startswith("pipedit"))
    assert "CLIP" in record.getMessage()
    assert "and the last words" in record.getMessage()
    caplog.clear()
    text_stage.encode(make_request(adapter, "hunyuan"))
    assert not caplog.records


def test_prompt_too_long_for_the_language_model_is_a_problem(
    text_stage: HunyuanVideoTextStage, adapter: HunyuanVideoAdapter
) -> None:
    words = ["red", "ball", "moves"] * 20
    prompt = " ".join(words)
    crop, after = PROMPT_FRAME.cropped_tokens, 1
    length = len(text_stage.tokenizer(PROMPT_FRAME.before + prompt + PROMPT_FRAME.after).input_ids) - crop - after

    def problems(limit: int) -> list[str]:
        return check_request(make_request(adapter, "hunyuan", prompt=prompt, max_sequence_length=limit), adapter)

    assert problems(length) == []  # only the frame's end is cut, none of the prompt
    (problem,) = problems(length - 1)
    assert f"longer than {length - 1} tokens" in problem
    assert problem.endswith('cut: "moves"')
    ids = text_stage.tokenizer(PROMPT_FRAME.before + prompt + PROMPT_FRAME.after).input_ids
    kept = text_stage.tokenizer.decode(ids[crop : crop + 5])
    assert prompt.startswith(kept)
    assert prompt.removeprefix(kept).strip()[:70] in problems(5)[0]


# -- trimming -----------------------------------------------------------------------------------------------------


def test_trimmed_text_gives_what_padded_and_masked_text_gives(
    adapter: HunyuanVideoAdapter,
    text_stage: HunyuanVideoTextStage,
    denoise_stage: HunyuanVideoDenoiseStage,
    pipeline: Any,
) -> None:
    request = make_request(adapter, "hunyuan")
    state = denoise_stage.begin(request, text_stage.encode(request))
    embeddings, pooled, mask = pipeline.encode_prompt(PROMPT, max_sequence_length=32)
    latents, timestep = state.noisy.latents, torch.tensor([700.0])

    def reference(keys: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = pipeline.transformer(
            latents, timestep, embeddings, keys, pooled, guidance=state.course.guidance, return_dict=False
        )[0]
        return output

    with torch.inference_mode():
        ours = denoise_stage.transformer(**{**state.course.inputs(0, 0, latents), "timestep": timestep})[0]
        padded, unmasked = reference(mask), reference(torch.ones_like(mask))
    assert (ours - padded).abs().max() < 1e-5 * padded.abs().max()
    assert (ours - unmasked).abs().max() > 1e-2 * padded.abs().max()


def test_layers_see_no_mask(
    adapter: HunyuanVideoAdapter, text_stage: HunyuanVideoTextStage, denoise_stage: HunyuanVideoDenoiseStage
) -> None:
    seen = []

    def note(_module: torch.nn.Module, _args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(named["attention_mask"])

    sites = adapter.attention_sites()
    assert [site.layer for site in sites] == [0, 1, 2, 3]
    modules = [denoise_stage.transformer.get_submodule(site.path) for site in sites]
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    request = make_request(adapter, "hunyuan")
    denoise_stage.step(denoise_stage.begin(request, text_stage.encode(request)), 0)
    for handle in handles:
        handle.remove()
    assert seen == [None] * 4


# -- decode -------------------------------------------------------------------------------------------------------


def random_latents(adapter: HunyuanVideoAdapter, **settings: Any) -> torch.Tensor:
    request = make_request(adapter, "hunyuan", **settings)
    return torch.randn(adapter.latent_shape(request), generator=torch.Generator().manual_seed(0))


def decode_whole(vae: AutoencoderKLHunyuanVideo, latents: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with torch.inference_mode():
        return to_frames(vae.decode(latents / vae.config.scaling_factor).sample)


@pytest.mark.parametrize("num_frames", [1, 5, 13, 17, 21, 25, 29, 33, 37, 49, 65])
def test_streamed_tiles_equal_the_whole_decode_bit_by_bit(
    num_frames: int, adapter: HunyuanVideoAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipedit.models.hunyuan_video.decode.to_frames", lambda video: video)
    request = make_request(adapter, "hunyuan", num_frames=num_frames)
    latents = random_latents(adapter, num_frames=num_frames)
    stage = load_decode_stage(adapter)
    state = stage.begin(request, latents)
    other = stage.begin(request, latents.flip(2))  # a second video in turns must not disturb the first
    scaled = state.latents.window(state.latents.held)
    chunks, held = [], []
    for index in range(adapter.num_decode_chunks(request)):
        chunks.append(cast("torch.Tensor", stage.chunk(state, index)))
        stage.chunk(other, index)
        held.append(0 if state.overlap is None else state.overlap.shape[2])
    assert max(held) <= 4
    assert all(chunk.shape[2] > 0 for chunk in chunks)
    stage.vae.use_framewise_decoding = True
    with torch.inference_mode():
        whole = stage.vae.decode(scaled).sample
    assert torch.equal(torch.cat(chunks, dim=2), whole)


def test_one_pass_decode_is_another_video(adapter: HunyuanVideoAdapter) -> None:
    latents = random_latents(adapter, num_frames=25)
    vae = load_decode_stage(adapter).vae
    vae.use_framewise_decoding = False
    one_pass = decode_whole(vae, latents)
    vae.use_framewise_decoding = True
    assert np.abs(one_pass.astype(int) - decode_whole(vae, latents)).max() > 8


def test_spatial_tiles_equal_diffusers_tiling(adapter: HunyuanVideoAdapter) -> None:
    settings = {"num_frames": 25, "height": 64, "width": 96}
    small = {
        f"tile_sample_{kind}_{side}": size
        for kind, size in (("min", 32), ("stride", 24))
        for side in ("height", "width")
    }
    request, latents = make_request(adapter, "hunyuan", **settings), random_latents(adapter, **settings)
    stage = load_decode_stage(adapter, tiling=True)
    stage.vae.enable_tiling(**small)
    state = stage.begin(request, latents)
    chunks = joined([stage.chunk(state, index) for index in range(2)])
    vae = load_decode_stage(adapter).vae
    vae.use_framewise_decoding = True
    untiled = decode_whole(vae, latents)
    vae.enable_tiling(**small)
    assert np.array_equal(chunks, decode_whole(vae, latents))
    assert not np.array_equal(chunks, untiled)


def test_tile_sizes_are_those_of_diffusers(adapter: HunyuanVideoAdapter) -> None:
    vae = AutoencoderKLHunyuanVideo.from_config(adapter.layout.vae_config)
    assert (vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames) == (16, 12)
    assert (tiles.FRAMES.length, tiles.FRAMES.stride) == (16, 12)
    for side in ("height", "width"):
        assert getattr(vae, f"tile_sample_min_{side}") == tiles.PICTURE.length
        assert getattr(vae, f"tile_sample_stride_{side}") == tiles.PICTURE.stride


def all_tiles(num_latent_frames: int) -> list[tiles.TemporalTile]:
    return [
        tiles.temporal_tile(num_latent_frames, 4, index)
        for index in range(tiles.num_temporal_tiles(num_latent_frames, 4))
    ]


@pytest.mark.parametrize("count", range(1, 30))
def test_there_are_three_kinds_of_tile(count: int) -> None:
    def size(tile: tiles.TemporalTile) -> tuple[int, int]:
        return len(tile.latents), tile.num_frames

    first, middle, last = tiles.kinds_of_tile(count, 4)
    found = all_tiles(count)
    assert (found[0], found[-1]) == (first, last)
    assert found[-1].latents.stop == count
    assert {size(tile) for tile in found[1:-1]} <= {size(middle)}


def test_published_length_falls_into_eleven_tiles() -> None:
    found = all_tiles(33)
    assert len(found) == 11
    assert [tile.num_frames for tile in found] == [13, *[12] * 9, 8]
    assert found[1].latents == range(3, 8)


@pytest.mark.parametrize("count", range(1, 60))
def test_tiles_give_every_frame_once(count: int) -> None:
    assert sum(tile.num_frames for tile in all_tiles(count)) == 4 * (count - 1) + 1


def test_memory_does_not_grow_with_the_video(adapter: HunyuanVideoAdapter) -> None:
    stage = load_decode_stage(adapter)
    kept = []
    for num_frames in (33, 129):
        state = stage.begin(make_request(adapter, "hunyuan"), random_latents(adapter, num_frames=num_frames))
        for index in range(2):
            stage.chunk(state, index)
        assert state.overlap is not None
        kept.append(state.overlap.untyped_storage().nbytes())
    assert kept[0] == kept[1] == 3 * 4 * 32 * 48 * 4  # colours, frames, height, width, bytes


def test_only_the_decoder_is_loaded(adapter: HunyuanVideoAdapter) -> None:
    real = {name.split(".")[0] for name, p in load_decode_stage(adapter).vae.named_parameters() if not p.is_meta}
    assert real == {"decoder", "post_quant_conv"}


# -- loading and problems -----------------------------------------------------------------------------------------


def test_layer_range_loads_only_its_layers(adapter: HunyuanVideoAdapter) -> None:
    precision = adapter.default_precision("cpu")
    stage = adapter.load_denoise_stage("cpu", precision, range(1, 3))
    assert isinstance(stage, HunyuanVideoDenoiseStage)
    real = {name for name, p in stage.transformer.named_parameters() if not p.is_meta}
    layers = {".".join(name.split(".")[:2]) for name in real if not name.startswith("time_text_embed.")}
    assert layers == {"transformer_blocks.1", "single_transformer_blocks.0"}
    assert "time_text_embed.guidance_embedder.linear_1.weight" in real, "every layer needs it"


def test_layer_split_covers_every_parameter_once(
    adapter: HunyuanVideoAdapter, denoise_stage: HunyuanVideoDenoiseStage
) -> None:
    prefixes = adapter.layer_split().wanted(None)
    for name, _ in denoise_stage.transformer.named_parameters():
        assert sum(name.startswith(prefix + ".") for prefix in prefixes) == 1, name


def test_shards_that_a_layer_range_does_not_need_are_not_read(tmp_path: Path) -> None:
    tiny_pipelines.build("hunyuan", tmp_path, max_shard_size="60KB")
    adapter = open_model(str(tmp_path))
    weights = adapter.checkpoint.weights("transformer")
    wanted = adapter.layer_split().wanted(range(1, 2))
    needed = set(weights.by_file({n for n in weights.tensors if n.startswith(tuple(p + "." for p in wanted))}))
    assert needed < set(weights.files)
    for file in set(weights.files) - needed:
        file.write_bytes(b"not a safetensors file")  # opening it would fail
    adapter.load_denoise_stage("cpu", adapter.default_precision("cpu"), range(1, 2))
    with pytest.raises(CheckpointError):
        adapter.load_denoise_stage("cpu", adapter.default_precision("cpu"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"guidance_scale_2": 3.0}, "guidance_scale_2"),
        ({"true_cfg_scale": 4.0}, "negative prompt"),
        ({"negative_prompt": "blurry"}, "has no effect"),
        ({"num_frames": 8}, "the nearest are 5 and 9"),
        ({"height": 40}, "height=40"),
    ],
)
def test_problem_is_said(settings: dict[str, Any], expected: str, adapter: HunyuanVideoAdapter) -> None:
    (problem,) = check_request(make_request(adapter, "hunyuan", **settings), adapter)
    assert expected in problem


def test_image_to_video_checkpoint_is_refused(adapter: HunyuanVideoAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_request(make_request(adapter, "hunyuan"), adapter) == []
    config = {**adapter.layout.transformer_config, "image_condition_type": "token_replace", "guidance_embeds": False}
    monkeypatch.setattr(HunyuanVideoLayout, "transformer_config", config)
    problems = check_request(make_request(adapter, "hunyuan", guidance_scale=3.0), adapter)
    assert "from an image (token_replace)" in problems[0]
    assert "no guidance embedding" in problems[1]


def test_compiled_layers_are_traced_whole(
    adapter: HunyuanVideoAdapter, text_stage: HunyuanVideoTextStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = adapter.load_denoise_stage("cpu", adapter.default_precision("cpu"))
    assert isinstance(stage, HunyuanVideoDenoiseStage)
    request = make_request(adapter, "hunyuan")
    conditioning = text_stage.encode(request)
    plain, compiled = (stage.begin(request, conditioning) for _ in range(2))
    stage.step(plain, 0)
    compile_repeated = stage.transformer.compile_repeated_blocks
    # The eager backend traces as the default one does, without the wait for a C++ compiler.
    monkeypatch.setattr(
        stage.transformer, "compile_repeated_blocks", lambda **options: compile_repeated(backend="eager", **options)
    )
    stage.compile_layers()
    stage.step(compiled, 0)
    assert torch.allclose(stage.latents(plain), stage.latents(compiled), atol=1e-6)
