"""What a stage of a layer pipeline needs, against the real modules on the meta device."""

import functools
from typing import Any

import pytest
import torch

from pipedit.core.blocks import BlockPlan, Prefix, Storage
from pipedit.core.rotation import TemporalRotation
from pipedit.models.adapter import ModelAdapter, Precision
from pipedit.models.hunyuan_video import sequence as hunyuan_sequence
from pipedit.models.registry import open_published
from pipedit.models.sequence import attach
from pipedit.models.sequence_bindings import binding_of
from pipedit.parallel.context_attention import ContextAttention, Keep, Take
from pipedit.parallel.rotation import turn
from pipedit.parallel.runtime import ParallelRuntime
from pipedit.plan.block_memory import layer_ranges, stage_bytes, stage_cost, window_latents
from pipedit.plan.costs import RequestCost
from tests.models.peak_memory import peak_bytes
from tests.models.test_costs import cast, make_request, make_transformer, transformer_inputs

NAMES = ("wan2.1-t2v-14b", "wan2.1-t2v-1.3b", "hunyuanvideo")
BLOCK = 8


def precision_of(dtype: str) -> Precision:
    return Precision(text_encoder=dtype, transformer=dtype, vae=dtype)


def plan_of(context: int, **changes: Any) -> BlockPlan:
    return BlockPlan(**{"latents": 80, "block_latents": BLOCK, "context_latents": context, "num_steps": 50, **changes})


@functools.cache
def cost_of(name: str, latents: int, dtype: str = "bfloat16") -> RequestCost:
    adapter = open_published(name)
    request = make_request(adapter, name, num_frames=4 * (latents - 1) + 1, height=480, width=832)
    return adapter.cost(request, precision_of(dtype))


def attending_stage(adapter: ModelAdapter, dtype: str, context: ContextAttention) -> Any:
    """The first layers of the model, on the meta device, with keys and values of neighbours."""
    config = adapter.checkpoint.config("transformer")
    shallow = {key: 2 for key in ("num_layers", "num_single_layers") if key in config}
    transformer = cast(make_transformer(adapter, **shallow), getattr(torch, dtype))
    alone = ParallelRuntime(ranks=(0,), rank=0, device="meta", open_channel=lambda *_: None)  # type: ignore[arg-type]
    alone.take_keys_from(context)
    attach(transformer, binding_of(transformer), alone)
    return transformer


def rotation_of(adapter: Any) -> TemporalRotation:
    rotation: TemporalRotation = adapter.layout.temporal_rotation
    return rotation


@pytest.mark.parametrize("storage", [Storage.DEVICE, Storage.INT8])
@pytest.mark.parametrize("context", [4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_memory_of_a_pass_with_neighbours_is_close(
    name: str, dtype: str, context: int, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass: what it needs while it computes, and what it leaves. What it reads was there before."""
    monkeypatch.setattr(hunyuan_sequence, "_needed_text", lambda mask: (mask.shape[1], None))  # meta has no values
    adapter = open_published(name)
    window = cost_of(name, BLOCK, dtype)
    kernel = ContextAttention(functools.partial(turn, rotation=rotation_of(adapter)), storage)
    transformer = attending_stage(adapter, dtype, kernel)
    request = make_request(adapter, name, num_frames=4 * (BLOCK - 1) + 1, height=480, width=832)
    inputs = transformer_inputs(adapter, request, getattr(torch, dtype))
    tokens = window.latent_tokens // BLOCK
    keeps = tuple(
        Keep(entry=end, first=first * tokens, stop=(first + context) * tokens)
        for end, first in (("head", 0), ("tail", BLOCK - context))
    )

    def run(takes: tuple[Take, ...]) -> None:
        kernel.begin(takes, keeps)
        transformer(**inputs)
        kernel.finish()

    with torch.no_grad():
        run(())
    left = kernel.nbytes
    takes = (Take(entry="head", turned=BLOCK), Take(entry="tail", turned=-BLOCK))
    peak = peak_bytes(lambda: run(takes))

    held = stage_bytes(window, plan_of(context), stages=1, stage=0, storage=storage)
    layers, waiting = 4 if name == "hunyuanvideo" else 2, 9 * window.forwards_per_step + 2
    assert left * len(window.forward.layers) * waiting == 2 * held.entries * layers, "9 pairs of neighbours, and a pass"
    assert peak <= (held.working + left) * 1.005
    assert held.working + left <= peak * 1.2


def test_a_stage_without_neighbours_needs_what_the_model_does() -> None:
    window = cost_of(NAMES[0], BLOCK)
    held = stage_bytes(window, plan_of(0), stages=8, stage=3)
    assert (held.working, held.entries, held.host_entries) == (window.parts["transformer"].working, 0, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stages", [1, 3, 8])
def test_weights_of_the_stages(name: str, stages: int) -> None:
    """Every stage has its layers and all that is no layer; together they have every layer once."""
    window, split = cost_of(name, BLOCK), open_published(name).layer_split()
    part = window.parts["transformer"]
    assert layer_ranges(window, stages) == split.ranges(stages)
    weights = [stage_bytes(window, plan_of(4), stages=stages, stage=stage).weights for stage in range(stages)]
    beside = part.weights - sum(part.layers)
    assert sum(weights) == part.weights + (stages - 1) * beside
    assert beside < part.weights / 30
    largest = stage_cost(window, window, plan_of(4), stages=stages).parts["transformer"].weights
    assert largest == max(weights)


def test_double_stream_layers_make_the_first_stages_heavy() -> None:
    """The control for counting layers alone."""
    window = cost_of("hunyuanvideo", BLOCK)
    first, last = (stage_bytes(window, plan_of(4), stages=4, stage=stage).weights for stage in (0, 3))
    assert first > 1.9 * last


def test_both_experts_are_held() -> None:
    one, two = (cost_of(name, BLOCK) for name in ("wan2.1-t2v-14b", "wan2.2-t2v-a14b"))
    held = [stage_bytes(window, plan_of(4), stages=8, stage=2) for window in (one, two)]
    assert held[1].weights == 2 * held[0].weights
    assert held[1].entries == held[0].entries
    parts = stage_cost(two, two, plan_of(4), stages=8).parts
    assert parts["transformer"].weights + parts["transformer_2"].weights == held[1].weights


# -- what waits -------------------------------------------------------------------------------------------------------


def test_entries_of_pairs_and_of_the_pass_under_way() -> None:
    """The notes' figure (dualparal.md, section 11): 14B at 480p, nc = 8, 5 layers: 512 MB a layer for both passes."""
    window = cost_of("wan2.1-t2v-14b", BLOCK)
    held = stage_bytes(window, plan_of(8, latents=None), stages=8, stage=0)
    a_pass = 8 * 1560 * 5120 * 2 * 2
    assert 2 * a_pass == pytest.approx(512e6, rel=0.01)
    assert held.entries == 5 * a_pass * (2 * 51 + 2), "50 blocks in flight, the next one has begun, and one follows it"
    short = stage_bytes(window, plan_of(8), stages=8, stage=0)
    assert short.entries == 5 * a_pass * (2 * 9 + 2)


def test_a_prefix_that_runs_again_leaves_almost_nothing() -> None:
    """The published order uses the successor's entry right after it was made."""
    plan = plan_of(8, latents=None, prefix=Prefix.RERUN)
    window = cost_of("wan2.1-t2v-14b", window_latents(plan))
    held = stage_bytes(window, plan, stages=8, stage=0)
    assert held.entries == 5 * 8 * 1560 * 5120 * 2 * 2 * (2 * 1 + 1)


def test_where_entries_wait() -> None:
    window, plan = cost_of("wan2.1-t2v-14b", BLOCK), plan_of(4)
    device, host, int8 = (stage_bytes(window, plan, stages=4, stage=1, storage=storage) for storage in Storage)
    assert (host.entries, host.host_entries, device.host_entries) == (0, device.entries, 0)
    assert int8.entries / device.entries == pytest.approx((128 + 4) / 256)
    assert device.working <= host.working == int8.working


def test_memory_is_flat_in_the_length_of_the_video() -> None:
    window = cost_of("wan2.1-t2v-1.3b", BLOCK)
    held = [stage_bytes(window, plan_of(4, latents=latents), stages=8, stage=0) for latents in (800, 8000, None)]
    assert held[0] == held[1] == held[2]


def test_the_rank_that_decodes_keeps_entries_meanwhile() -> None:
    window, whole = cost_of("wan2.1-t2v-14b", BLOCK), cost_of("wan2.1-t2v-14b", 40)
    plan = plan_of(4, latents=40)
    waiting = stage_bytes(window, plan, stages=2, stage=1).waiting
    assert waiting > 0
    apart, beside = (stage_cost(whole, window, plan, stages=2, stage=1, decodes=decodes) for decodes in (False, True))
    assert beside.parts["vae"].working == apart.parts["vae"].working + waiting
    assert apart.parts["vae"] == whole.parts["vae"]


def test_messages_and_latents() -> None:
    window = cost_of("wan2.1-t2v-14b", BLOCK)
    first, middle, last = (stage_bytes(window, plan_of(4), stages=3, stage=stage) for stage in range(3))
    hidden = 8 * 1560 * 5120 * 2
    assert (first.messages, middle.messages, last.messages) == (2 * hidden, 4 * hidden, 2 * hidden)
    assert first.latents == (10 + 1) * 4 * 16 * 8 * 60 * 104 * 4, "float32, with the noise scheduler's history"
    assert middle.latents == last.latents == 0
    assert stage_bytes(window, plan_of(4), stages=1, stage=0).messages == 0
