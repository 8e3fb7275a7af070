"""Cost formulas against the real modules on the meta device: parameters and operations exactly, memory closely."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from pipedit.core.errors import CheckpointError, InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.models.adapter import ModelAdapter, Precision
from pipedit.models.hunyuan_video import HunyuanVideoAdapter
from pipedit.models.hunyuan_video.decode import HunyuanVideoDecodeStage
from pipedit.models.hunyuan_video.prompt import CLIP_TOKENS, PROMPT_FRAME, SKIPPED_LAYERS
from pipedit.models.published_configs import PUBLISHED
from pipedit.models.registry import KNOWN_MODELS, open_model, open_published
from pipedit.models.tiles import Tiling, tile_sizes
from pipedit.models.wan import WanAdapter
from pipedit.models.wan import vae_costs as wan_vae_costs
from pipedit.models.wan.decode import WanDecodeStage
from pipedit.plan.costs import Operations, RequestCost
from pipedit.plan.memory import Need, Room, SizeLadder, memory_problem
from tests.models.peak_memory import AbsentGroup, peak_bytes
from tests.tiny_pipelines import KINDS, QUICK_SETTINGS

FLOAT32 = Precision(text_encoder="float32", transformer="float32", vae="float32")
BILLIONS = {  # transformer parameters, as published or counted elsewhere
    "wan2.1-t2v-1.3b": 1.419,
    "wan2.1-t2v-14b": 14.288,
    "wan2.2-t2v-a14b": 14.288,
    "wan2.2-ti2v-5b": 5.000,
    "hunyuanvideo": 12.821,
}
MODELS = (*PUBLISHED, *KINDS)
Open = Callable[[str], ModelAdapter]


@pytest.fixture(scope="module")
def open_any(tiny_folder: Callable[[str], Path]) -> Open:
    """The adapter of a published model (by its configs) or of a tiny one (by its folder)."""

    @functools.cache
    def opened(name: str) -> ModelAdapter:
        return open_published(name) if name in PUBLISHED else open_model(str(tiny_folder(name)))

    return opened


def make_request(adapter: ModelAdapter, name: str, **settings: Any) -> VideoRequest:
    chosen = {**QUICK_SETTINGS.get(name, {}), "negative_prompt": "blue", **settings}
    return adapter.complete(VideoRequest(prompt="a red ball", **chosen))


# -- real modules on the meta device ------------------------------------------------------------------------------


def make_transformer(adapter: ModelAdapter, **changes: Any) -> Any:
    name = adapter.checkpoint.component_class("transformer")
    assert name is not None
    with torch.device("meta"):
        return getattr(diffusers, name).from_config({**adapter.checkpoint.config("transformer"), **changes})


def make_text_encoders(adapter: ModelAdapter) -> dict[str, Any]:
    """As far as they are loaded."""
    config = adapter.checkpoint.config
    with torch.device("meta"):
        if isinstance(adapter, WanAdapter):
            return {"text_encoder": transformers.UMT5EncoderModel(transformers.UMT5Config(**config("text_encoder")))}
        llama_config = dict(config("text_encoder"))
        llama_config["num_hidden_layers"] -= SKIPPED_LAYERS
        llama = transformers.LlamaModel(transformers.LlamaConfig(**llama_config))
        llama.norm = torch.nn.Identity()
        clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config("text_encoder_2")))
        return {"text_encoder": llama, "text_encoder_2": clip}


def make_vae(adapter: ModelAdapter) -> Any:
    config = adapter.checkpoint.config("vae")
    with torch.device("meta"):
        if isinstance(adapter, HunyuanVideoAdapter):
            return diffusers.AutoencoderKLHunyuanVideo.from_config(config)
        statistics = {"latents_mean": [0.0] * config["z_dim"], "latents_std": [1.0] * config["z_dim"]}
        return diffusers.AutoencoderKLWan.from_config({**config, **statistics})


def make_decode_stage(vae: Any, *, tiling: bool) -> Any:
    stage = HunyuanVideoDecodeStage if isinstance(vae, diffusers.AutoencoderKLHunyuanVideo) else WanDecodeStage
    return stage(vae, "meta", tiling=tiling)


def cast(module: Any, dtype: torch.dtype) -> Any:
    """The module in `dtype`, with the parameters that diffusers keeps in float32 left as they are."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, parameter in module.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return module


def transformer_inputs(adapter: ModelAdapter, request: VideoRequest, dtype: torch.dtype) -> dict[str, Any]:
    layout, config = adapter.token_layout(request), adapter.checkpoint.config("transformer")
    assert isinstance(adapter, (WanAdapter, HunyuanVideoAdapter))
    make = functools.partial(torch.empty, device="meta")
    latents = make(adapter.latent_shape(request), dtype=dtype)
    if isinstance(adapter, WanAdapter):
        return {
            "hidden_states": latents,
            "timestep": make((1, layout.latent_tokens) if adapter.layout.expands_timesteps else (1,)),
            "encoder_hidden_states": make(1, layout.text_tokens, config["text_dim"], dtype=dtype),
        }
    return {
        "hidden_states": latents,
        "timestep": make(1),
        "encoder_hidden_states": make(1, layout.text_tokens, config["text_embed_dim"], dtype=dtype),
        "encoder_attention_mask": make(1, layout.text_tokens, dtype=dtype),
        "pooled_projections": make(1, config["pooled_projection_dim"], dtype=dtype),
        "guidance": make(1, dtype=dtype),
    }


def decode_on_meta(
    stage: Any, adapter: Any, request: VideoRequest, dtype: torch.dtype, count: int, group: AbsentGroup | None = None
) -> None:
    """Runs the first `count` chunks, or all where there are fewer."""
    state = stage.begin(request, torch.empty(adapter.latent_shape(request), device="meta", dtype=dtype), group)
    for index in range(min(count, adapter.num_decode_chunks(request, 1 if group is None else group.size))):
        stage.chunk(state, index)


def count_chunks(adapter: Any, request: VideoRequest, *, tiling: bool = False) -> list[Operations]:
    """Operations of every chunk; what is done for all of them at the start is shared out."""
    stage = make_decode_stage(make_vae(adapter), tiling=tiling)
    latents, states = torch.empty(adapter.latent_shape(request), device="meta"), []
    start = count_operations(lambda: states.append(stage.begin(request, latents)))["Global"]
    chunks = []
    for index in range(adapter.num_decode_chunks(request)):
        counted = count_operations(lambda index=index: stage.chunk(states[0], index))["Global"]  # type: ignore[misc]
        share = start.convolution // latents.shape[2]
        chunks.append(counted + Operations(convolution=share))
    return chunks


# -- counting -----------------------------------------------------------------------------------------------------

_LINEAR, _ATTENTION, _CONVOLUTION = {"addmm", "mm"}, {"bmm"}, {"convolution"}


def count_operations(run: Callable[[], Any]) -> dict[str, Operations]:
    """Operations of each module by its path ("Global": all), as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    result = {}
    for path, counts in counter.get_flop_counts().items():
        named = {packet.__name__: count for packet, count in counts.items()}
        assert set(named) <= _LINEAR | _ATTENTION | _CONVOLUTION, named
        linear, attention, convolution = (
            sum(named.get(name, 0) for name in names) for names in (_LINEAR, _ATTENTION, _CONVOLUTION)
        )
        result[path] = Operations(linear=linear, attention=attention, convolution=convolution)
    result.setdefault("Global", Operations())
    return result


def patches_are_linear(operations: Operations) -> Operations:
    """The patch embedding is a convolution by name and a matrix product by nature."""
    return Operations(linear=operations.linear + operations.convolution, attention=operations.attention)


def products_are_one(operations: Operations) -> Operations:
    """torch runs some linear layers of the mid block's attention as batched products, which count as attention here."""
    return Operations(linear=operations.linear + operations.attention, convolution=operations.convolution)


def count_parameters(module: Any, *prefixes: str) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if not prefixes or name.startswith(prefixes))


# -- parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_exact(name: str, open_any: Open) -> None:
    adapter = open_any(name)
    parts = adapter.cost(make_request(adapter, name), FLOAT32).parts
    assert tuple(parts) == tuple(adapter.weighted_components())
    expected = {component: count_parameters(module) for component, module in make_text_encoders(adapter).items()}
    expected["vae"] = count_parameters(make_vae(adapter), "decoder.", "post_quant_conv.")
    expected |= {key: count_parameters(make_transformer(adapter)) for key in parts if key.startswith("transformer")}
    assert {component: part.weights / 4 for component, part in parts.items()} == expected
    transformer, layers = make_transformer(adapter), adapter.layer_split().layers
    assert parts["transformer"].layers == tuple(4 * count_parameters(transformer, f"{layer}.") for layer in layers)
    if name in BILLIONS:
        assert round(expected["transformer"] / 1e9, 3) == BILLIONS[name]


def test_every_known_model_is_published() -> None:
    assert set(PUBLISHED) == {model.alias for model in KNOWN_MODELS if model.hub_id} == set(BILLIONS)
    for model in KNOWN_MODELS:
        if model.hub_id:
            adapter = open_published(model.hub_id)
            assert (adapter.family, adapter.checkpoint.name) == (model.family, model.alias)


def test_published_model_has_no_files() -> None:
    with pytest.raises(InvalidRequestError, match="did you mean hunyuanvideo"):
        open_published("hunyuanvide")
    adapter = open_published("HunyuanVideo")
    for component in adapter.weighted_components():
        with pytest.raises(CheckpointError, match="for planning"):
            adapter.checkpoint.weights(component)
        with pytest.raises(CheckpointError, match="for planning"):
            adapter.checkpoint.path(component)


# -- operations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_forward_operations_are_exact(name: str, open_any: Open) -> None:
    adapter = open_any(name)
    request = make_request(adapter, name)
    transformer, inputs = make_transformer(adapter), transformer_inputs(adapter, request, torch.float32)
    counted = count_operations(lambda: transformer(**inputs))
    root, split = type(transformer).__name__, adapter.layer_split()

    def at(*paths: str) -> Operations:
        found = [counted.get(f"{root}.{path}", Operations()) for path in paths]
        return patches_are_linear(sum(found, Operations()))

    forward = adapter.cost(request, FLOAT32).forward
    assert forward.front == at(*split.front, *split.everywhere)
    assert forward.layers == tuple(at(layer) for layer in split.layers)
    assert forward.back == at(*split.back)
    assert forward.total == patches_are_linear(counted["Global"])


@pytest.mark.parametrize("name", MODELS)
def test_encode_operations_are_exact(name: str, open_any: Open) -> None:
    adapter = open_any(name)
    request = make_request(adapter, name, true_cfg_scale=2.0)
    make = functools.partial(torch.ones, device="meta", dtype=torch.long)
    text = adapter.token_layout(request).text_tokens
    if isinstance(adapter, WanAdapter):
        lengths = {"text_encoder": text}
    else:
        lengths = {"text_encoder": PROMPT_FRAME.cropped_tokens + text, "text_encoder_2": CLIP_TOKENS}
    expected = Operations()
    for component, encoder in make_text_encoders(adapter).items():
        length = lengths[component]
        masks = {}
        if isinstance(encoder, transformers.LlamaModel):  # without one it looks at values, which meta tensors lack
            masks = {"attention_mask": torch.zeros(1, 1, length, length, device="meta"), "use_cache": False}
        counted = count_operations(lambda run=encoder, n=length, m=masks: run(make(1, n), **m))  # type: ignore[misc]
        rotation = counted.get("LlamaModel.rotary_emb", Operations())  # angles, as a product of one column and one row
        whole = counted["Global"]
        expected += Operations(linear=whole.linear, attention=whole.attention - rotation.attention)
    assert adapter.cost(request, FLOAT32).encode == expected.times(2)  # with the negative prompt


@pytest.mark.parametrize("tiling", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.2-ti2v-5b", "hunyuanvideo", *KINDS])
def test_decode_operations_are_exact(name: str, tiling: bool, open_any: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_tensors(monkeypatch)
    adapter = open_any(name)
    # Three chunks each; where it is tiled, tiles of several sizes.
    frames = 29 if isinstance(adapter, HunyuanVideoAdapter) else 9
    request = make_request(adapter, name, num_frames=frames, height=288, width=480)
    counted = count_chunks(adapter, request, tiling=tiling)
    cost = adapter.cost(request, FLOAT32, tiling=tiling)
    predicted = [cost.decode_first_chunk, cost.decode_chunk, cost.decode_last_chunk or cost.decode_chunk]
    assert [products_are_one(chunk) for chunk in predicted] == [products_are_one(chunk) for chunk in counted]
    assert products_are_one(cost.decode) == products_are_one(sum(counted, Operations()))
    if tiling:
        assert cost.decode != adapter.cost(request, FLOAT32).decode


@pytest.mark.parametrize("num_frames", [1, 13, 17])
def test_short_videos_are_counted_whole(num_frames: int, open_any: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_tensors(monkeypatch)
    adapter = open_any("hunyuan")
    request = make_request(adapter, "hunyuan", num_frames=num_frames)
    counted = sum(count_chunks(adapter, request), Operations())
    assert products_are_one(adapter.cost(request, FLOAT32).decode) == products_are_one(counted)


def keep_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors cannot become pictures and hold no values to check."""
    for family in ("wan", "hunyuan_video"):
        monkeypatch.setattr(f"pipedit.models.{family}.decode.require_finite", lambda _latents: None)
        monkeypatch.setattr(f"pipedit.models.{family}.decode.to_frames", lambda video: video)
        monkeypatch.setattr(f"pipedit.models.{family}.decode.to_host", lambda levels: levels)


def test_guidance_doubles_the_forwards(open_any: Open) -> None:
    def forwards(name: str, **settings: Any) -> int:
        adapter = open_any(name)
        cost: RequestCost = adapter.cost(make_request(adapter, name, **settings), FLOAT32)
        return cost.forwards_per_step

    assert (forwards("wan", guidance_scale=5.0), forwards("wan", guidance_scale=1.0)) == (2, 1)
    assert (forwards("hunyuan", true_cfg_scale=4.0), forwards("hunyuan")) == (2, 1)


# -- memory -------------------------------------------------------------------------------------------------------


def assert_covers(estimate: int, measured: int) -> None:
    """An estimate may be a little too large, never too small."""
    assert measured <= estimate * 1.005
    assert estimate <= measured * 1.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_transformer_memory_is_close(name: str, dtype: str, open_any: Open) -> None:
    adapter = open_any(name)
    request = make_request(adapter, name)
    shallow = {key: 2 for key in ("num_layers", "num_single_layers") if key in adapter.checkpoint.config("transformer")}
    transformer = cast(make_transformer(adapter, **shallow), getattr(torch, dtype))
    inputs = transformer_inputs(adapter, request, getattr(torch, dtype))
    precision = Precision(text_encoder=dtype, transformer=dtype, vae=dtype)
    estimate = adapter.cost(request, precision).parts["transformer"].working
    assert_covers(estimate, peak_bytes(lambda: transformer(**inputs)))


@pytest.mark.parametrize(("dtype", "tiling"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.2-ti2v-5b", "hunyuanvideo"])
def test_decode_memory_is_close(
    name: str, dtype: str, tiling: bool, open_any: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_tensors(monkeypatch)
    adapter = open_any(name)
    request = make_request(adapter, name, height=480, width=832)
    stage = make_decode_stage(cast(make_vae(adapter), getattr(torch, dtype)), tiling=tiling)
    measured = peak_bytes(lambda: decode_on_meta(stage, adapter, request, getattr(torch, dtype), 3))
    precision = Precision(text_encoder=dtype, transformer=dtype, vae=dtype)
    cost = adapter.cost(request, precision, tiling=tiling)
    assert_covers(cost.parts["vae"].working, measured)


@pytest.mark.parametrize(("dtype", "tiling"), [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize("decoders", [2, 8])
@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.2-ti2v-5b", "hunyuanvideo"])
def test_decode_memory_of_several_ranks_is_close(
    name: str, decoders: int, dtype: str, tiling: bool, open_any: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_tensors(monkeypatch)
    adapter = open_any(name)
    request = make_request(adapter, name, height=480, width=832)
    stage = make_decode_stage(cast(make_vae(adapter), getattr(torch, dtype)), tiling=tiling)
    measured = []
    for index in range(2):  # one has two neighbours, the other gets the frames
        run = functools.partial(decode_on_meta, group=AbsentGroup(decoders, index))
        measured.append(peak_bytes(lambda run=run: run(stage, adapter, request, getattr(torch, dtype), 3)))  # type: ignore[misc]
    precision = Precision(text_encoder=dtype, transformer=dtype, vae=dtype)
    alone, shared = (adapter.cost(request, precision, tiling=tiling, decoders=n).parts["vae"] for n in (1, decoders))
    assert_covers(shared.working, max(measured))
    assert alone.weights == shared.weights


def test_mask_of_a_large_picture_decides(open_any: Open) -> None:
    """The mid block's mask grows with the square of the picture, everything else with the picture."""
    adapter = open_any("hunyuanvideo")
    small, large = (
        adapter.cost(make_request(adapter, "hunyuanvideo", height=size, width=size), FLOAT32).parts["vae"].working
        for size in (1024, 4096)
    )
    assert large > 100 * small


def test_tracker_sees_a_peak() -> None:
    ones = torch.empty(10, device="meta")
    assert peak_bytes(lambda: (ones + 1) * 2 + 3) == 2 * 40
    assert peak_bytes(lambda: [ones.new_empty(100) for _ in range(3)]) == 3 * 400


# -- tiles --------------------------------------------------------------------------------------------------------


def test_wan_tile_sizes_are_those_of_diffusers(open_any: Open) -> None:
    vae = make_vae(open_any("wan"))
    for side in ("height", "width"):
        assert getattr(vae, f"tile_sample_min_{side}") == wan_vae_costs.PICTURE.length
        assert getattr(vae, f"tile_sample_stride_{side}") == wan_vae_costs.PICTURE.stride


def test_tiles_of_a_picture() -> None:
    tiling = Tiling(length=4, stride=3)
    assert tile_sizes(4, 8, tiling) == {(4, 4): 2, (4, 2): 1, (1, 4): 2, (1, 2): 1}
    assert tile_sizes(4, 4, tiling) == tile_sizes(4, 4, None) == {(4, 4): 1}
    for size in range(5, 40):
        starts = range(0, size, tiling.stride)
        assert list(tiling.lengths(size).elements()) == [min(tiling.length, size - start) for start in starts]


@pytest.mark.parametrize("tiling", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "hunyuanvideo"])
def test_costs_of_absurd_sizes_are_quick(name: str, tiling: bool, open_any: Open) -> None:
    """Tiles are counted, not made: one by one, these would not fit into memory."""
    adapter = open_any(name)
    request = make_request(adapter, name, num_frames=4 * 10**9 + 1, height=16 * 10**9, width=16 * 10**9)
    cost = adapter.cost(request, FLOAT32, tiling=tiling)
    assert cost.num_chunks == adapter.num_decode_chunks(request) > 10**8
    room = Room(available_bytes=80 * 2**30, is_loaded=True)
    ladder = SizeLadder(frame_step=4, size_multiple=16)
    problem = memory_problem(request, lambda r: Need.of(adapter.cost(r, FLOAT32, tiling=tiling)), room, ladder, {})
    assert problem is not None
