"""Transformers with a strategy attached against the same transformers as diffusers made them, all in one process."""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from pipedit.core.errors import InvalidRequestError
from pipedit.models.adapter import ModelAdapter
from pipedit.models.registry import open_model
from pipedit.models.sequence import AttentionCall, attach
from pipedit.models.sequence_bindings import binding_of
from tests.models.in_process_ranks import Alone, Doubling, Run, ThreadRank, run_threads
from tests.models.parity import make_request
from tests.tiny_pipelines import KINDS, SIZES, HunyuanSizes, randomise
from tests.untouched import state_of

Inputs = dict[str, Any]


@functools.cache
def _made(kind: str) -> nn.Module:
    sizes = SIZES[kind]
    make = (
        diffusers.HunyuanVideoTransformer3DModel if isinstance(sizes, HunyuanSizes) else diffusers.WanTransformer3DModel
    )
    model: nn.Module = make(**sizes.transformer)
    randomise(model, torch.Generator().manual_seed(1))
    return model.eval()


def make_transformer(kind: str) -> Any:
    return copy.deepcopy(_made(kind))


def make_inputs(kind: str, lengths: tuple[int, ...] = (5,)) -> Inputs:
    """For a batch of as many rows as there are text lengths; 18 latent tokens, 7 text tokens."""
    generator = torch.Generator().manual_seed(2)
    draw = functools.partial(torch.randn, generator=generator)
    batch, sizes = len(lengths), SIZES[kind]
    inputs: Inputs = {
        "hidden_states": draw(batch, sizes.transformer["in_channels"], 3, 4, 6),
        "timestep": torch.linspace(400, 900, batch),
        "encoder_hidden_states": draw(batch, 7, 32),
        "return_dict": False,
    }
    if kind == "wan_ti2v":
        inputs["timestep"] = torch.rand(batch, 18, generator=generator) * 1000
    if kind == "hunyuan":
        inputs["encoder_attention_mask"] = (torch.arange(7) < torch.tensor(lengths)[:, None]).float()
        inputs["pooled_projections"] = draw(batch, 16)
        inputs["guidance"] = torch.linspace(3000, 6000, batch)
    return inputs


@torch.no_grad()
def predict(transformer: Any, inputs: Inputs) -> torch.Tensor:
    output: torch.Tensor = transformer(**inputs)[0]
    return output


def attached(transformer: Any, parallel: Any) -> Callable[[], None]:
    return attach(transformer, binding_of(transformer), parallel)


def is_near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Within 1e-5 (measured: 2e-6); predictions are of the order of 1."""
    return bool((ours - theirs).abs().max() <= 1e-5)


@pytest.mark.parametrize("chunks", [1, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_attached_equals_unattached_and_detached_is_untouched(kind: str, chunks: int) -> None:
    transformer, inputs = make_transformer(kind), make_inputs(kind)
    theirs, before = predict(transformer, inputs), state_of(transformer)
    detach = attached(transformer, Alone(chunks))
    assert is_near(predict(transformer, inputs), theirs)
    assert state_of(transformer) != before
    detach()
    assert state_of(transformer) == before
    assert torch.equal(predict(transformer, inputs), theirs)


@pytest.mark.parametrize(("size", "chunks"), [(2, 1), (4, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_share_the_tokens(kind: str, size: int, chunks: int) -> None:
    transformer, inputs = make_transformer(kind), make_inputs(kind, (5, 3))
    theirs = predict(transformer, inputs)

    def run(board: Any, rank: int) -> torch.Tensor:
        own = copy.deepcopy(transformer)
        attached(own, ThreadRank(board, rank, chunks))
        return predict(own, inputs)

    for ours in run_threads(size, run):
        assert is_near(ours, theirs)


def test_positional_inputs_are_understood() -> None:
    transformer, inputs = make_transformer("wan_ti2v"), make_inputs("wan_ti2v")
    theirs = predict(transformer, inputs)
    attached(transformer, Alone())
    first = [inputs.pop(name) for name in ("hidden_states", "timestep", "encoder_hidden_states")]
    with torch.no_grad():
        assert is_near(transformer(*first, **inputs)[0], theirs)


# -- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "kept", "is_masked"),
    [((4,), 4, False), ((4, 4), 4, False), ((3, 6), 6, True), ((7, 2), 7, True), ((7,), 7, False)],
)
def test_text_is_trimmed_to_what_is_needed(lengths: tuple[int, ...], kept: int, is_masked: bool) -> None:
    transformer, inputs, parallel = make_transformer("hunyuan"), make_inputs("hunyuan", lengths), Alone(2)
    theirs = predict(transformer, inputs)
    attached(transformer, parallel)
    assert is_near(predict(transformer, inputs), theirs)
    assert {call.text_tokens for call in parallel.calls} == {kept}
    assert {call.text_mask is not None for call in parallel.calls} == {is_masked}


@pytest.mark.parametrize("mask", [[[0, 0, 1, 1, 1, 1, 1]], [[1, 0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]]])
def test_text_that_does_not_start_first_is_left_as_it_is(mask: list[list[int]]) -> None:
    transformer, inputs = make_transformer("hunyuan"), make_inputs("hunyuan", (7,) * len(mask))
    inputs["encoder_attention_mask"] = torch.tensor(mask)
    theirs = predict(transformer, inputs)
    attached(transformer, Alone())
    assert is_near(predict(transformer, inputs), theirs)


# -- negative controls: the comparison above must notice these ------------------------------------------------------


class Unmasked(Alone):
    def mask(self, call: AttentionCall, latents: int) -> None:
        return None


class Mislabelled(Alone):
    """Gives out the right heads in the wrong places."""

    def attend(self, call: AttentionCall) -> Iterator[Run]:
        *_, last = ranges_of(call, 2)
        for heads in ranges_of(call, 2):
            wrong = last if heads.start == 0 else slice(0, last.start)
            run = self.compute(call, heads)
            yield Run(heads=wrong, latents=run.latents, text=run.text)


def ranges_of(call: AttentionCall, chunks: int) -> list[slice]:
    size = call.heads // chunks
    return [slice(start, start + size) for start in range(0, call.heads, size)]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_heads_are_noticed(kind: str) -> None:
    transformer, inputs = make_transformer(kind), make_inputs(kind)
    theirs = predict(transformer, inputs)
    attached(transformer, Mislabelled())
    assert not is_near(predict(transformer, inputs), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_positions_are_noticed(kind: str) -> None:
    transformer, inputs = make_transformer(kind), make_inputs(kind)
    theirs = predict(transformer, inputs)
    attached(transformer, Alone())
    tokens = 0 if kind == "hunyuan" else 1
    transformer.rope.register_forward_hook(lambda *call: tuple(x.roll(1, tokens) for x in call[-1]))
    assert not is_near(predict(transformer, inputs), theirs)


def test_missing_text_mask_is_noticed() -> None:
    transformer, inputs = make_transformer("hunyuan"), make_inputs("hunyuan", (3, 6))
    theirs = predict(transformer, inputs)
    attached(transformer, Unmasked())
    assert not is_near(predict(transformer, inputs), theirs)


# -- layers that are more than a weight ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 3])
def test_wan_with_fused_projections(chunks: int) -> None:
    transformer, inputs = make_transformer("wan"), make_inputs("wan")
    transformer.fuse_qkv_projections()
    with torch.no_grad():
        for block in transformer.blocks:
            block.attn1.to_qkv.weight.mul_(1.1)  # so that the separate ones, which are still there, would be noticed
    theirs = predict(transformer, inputs)
    attached(transformer, Alone(chunks))
    assert is_near(predict(transformer, inputs), theirs)


def spoil(attention: Any, name: str, index: int | None = None) -> None:
    """Puts a `Doubling` in the place of a linear layer."""
    old = getattr(attention, name) if index is None else getattr(attention, name)[index]
    new = Doubling(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    if index is None:
        setattr(attention, name, new)
    else:
        getattr(attention, name)[index] = new


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_changed_layers_are_called_as_they_are(kind: str) -> None:
    transformer, inputs = make_transformer(kind), make_inputs(kind)
    plain = predict(transformer, inputs)
    blocks = transformer.blocks if kind == "wan" else transformer.transformer_blocks
    for block in blocks:
        attention = block.attn1 if kind == "wan" else block.attn
        spoil(attention, "to_v")
        spoil(attention, "to_out", 0)
        attention.to_q.register_forward_hook(lambda *call: call[-1] * 1.5)
        if kind == "hunyuan":
            spoil(attention, "to_add_out")
            spoil(attention, "add_k_proj")
    theirs = predict(transformer, inputs)
    assert not is_near(theirs, plain)
    attached(transformer, Alone(3))
    assert is_near(predict(transformer, inputs), theirs)


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_layers_compile_around_the_exchange(kind: str) -> None:
    transformer, inputs = make_transformer(kind), make_inputs(kind)
    theirs = predict(transformer, inputs)
    attached(transformer, Alone(2))
    transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        predict(transformer, inputs)
    torch._dynamo.reset()
    transformer.compile_repeated_blocks(fullgraph=False, backend="eager")
    assert is_near(predict(transformer, inputs), theirs)
    torch._dynamo.reset()


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("wan", {"image_dim": 8, "added_kv_proj_dim": 48}, "Wan with an image"),
        ("hunyuan", {"image_condition_type": "token_replace"}, r"token_replace\) is not supported yet"),
        ("hunyuan", {"image_condition_type": "latent_concat"}, r"latent_concat\) is not supported yet"),
    ],
)
def test_image_conditioning_is_refused(kind: str, changes: Inputs, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        binding_of(type(_made(kind))(**{**SIZES[kind].transformer, **changes}))


def test_unknown_and_cached_and_compiled_models_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="Linear cannot be spread over ranks yet; supported are WanTransf"):
        binding_of(nn.Linear(1, 1))
    transformer = make_transformer("wan")
    transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(InvalidRequestError, match=r"call transformer\.disable_cache"):
        binding_of(transformer)
    transformer = make_transformer("wan")
    transformer.compile(backend="eager")
    with pytest.raises(InvalidRequestError, match="compile_repeated_blocks"):
        binding_of(transformer)


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_other_processors_and_backends_are_refused_and_left_alone(kind: str) -> None:
    transformer = make_transformer(kind)
    last = transformer.blocks[-1].attn1 if kind == "wan" else transformer.single_transformer_blocks[-1].attn
    last.processor._attention_backend = AttentionBackendName.FLASH
    before = state_of(transformer)
    with pytest.raises(InvalidRequestError, match="'flash' cannot be spread over ranks; unset DIFFUSERS_ATTN_BACK"):
        attached(transformer, Alone())
    last.processor._attention_backend = None
    with attention_backend(AttentionBackendName._NATIVE_MATH):
        with pytest.raises(InvalidRequestError, match="'_native_math' cannot be spread over ranks"):
            attached(transformer, Alone())
        transformer.set_attention_backend("native")
        attached(transformer, Alone())()
    transformer.reset_attention_backend()
    last.processor._attention_backend = AttentionBackendName.NATIVE
    attached(transformer, Alone())()
    assert state_of(transformer) == before
    last.set_processor(AttnProcessor2_0())
    with pytest.raises(InvalidRequestError, match="AttnProcessor2_0 cannot be spread over ranks"):
        attached(transformer, Alone())


# -- the stages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("wan22", {}), ("wan", {"guidance_scale": 1.0}), ("hunyuan", {"true_cfg_scale": 2.0, "negative_prompt": "green"})],
)
def test_stages_attach(kind: str, settings: Inputs, tiny_folder: Callable[[str], Path]) -> None:
    adapter = open_model(str(tiny_folder(kind)))
    guided, steps = settings.get("guidance_scale") != 1.0, make_request(adapter, kind).num_inference_steps
    parallel = Counting(2)
    ours = run_stage(adapter, make_request(adapter, kind, **settings), parallel)
    assert is_near(ours, run_stage(adapter, make_request(adapter, kind, **settings), None))
    assert parallel.asked == [2 if guided else 1] * (steps or 0)


class Counting(Alone):
    """Writes down how many predictions each step asks for."""

    def __init__(self, chunks: int) -> None:
        super().__init__(chunks)
        self.asked: list[int] = []

    def branches(self, predictions: Any) -> list[torch.Tensor]:
        self.asked.append(len(predictions))
        return super().branches(predictions)


def run_stage(adapter: ModelAdapter, request: Any, parallel: Counting | None) -> torch.Tensor:
    precision = adapter.default_precision("cpu")
    conditioning = adapter.load_text_stage("cpu", precision).encode(request)
    stage = adapter.load_denoise_stage("cpu", precision)
    if parallel is not None:
        stage.attach(parallel)
    state = stage.begin(request, conditioning)
    for step in range(request.num_inference_steps):
        stage.step(state, step)
    return stage.latents(state)
