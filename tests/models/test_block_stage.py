"""Some layers of a transformer as a stage of a pipeline: chains of stages against the denoise stage, bit by bit."""

import dataclasses
import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipedit.core.errors import CheckpointError, InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.models.adapter import BlockStage, DenoiseStage, ModelAdapter, Precision
from pipedit.models.noise_schedulers import keeps_latents_dtype, make_noise_scheduler
from pipedit.models.registry import open_model
from pipedit.parallel.runtime import ParallelRuntime
from tests import tiny_pipelines
from tests.models.in_process_ranks import ThreadRank, run_threads
from tests.models.parity import make_request
from tests.tiny_pipelines import KINDS

Cut = tuple[range, ...]  # layers of each stage
Chain = Sequence[BlockStage]

GUIDED: dict[str, Any] = {"hunyuan": {"true_cfg_scale": 3.0, "negative_prompt": "green"}}
FLOAT32 = Precision(text_encoder="float32", transformer="float32", vae="float32")
BFLOAT16 = dataclasses.replace(FLOAT32, transformer="bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """One tiny pipeline, its stages loaded once each."""

    kind: str
    adapter: ModelAdapter
    precision: Precision = FLOAT32
    stages: dict[range, BlockStage] = dataclasses.field(default_factory=dict)

    def request(self, **settings: Any) -> VideoRequest:
        return make_request(self.adapter, self.kind, **GUIDED.get(self.kind, {}), **settings)

    def denoise_stage(self) -> DenoiseStage:
        return self.adapter.load_denoise_stage("cpu", self.precision)

    def load(self, layers: range) -> BlockStage:
        return self.adapter.load_block_stage("cpu", self.precision, layers)

    def chain(self, cut: Cut) -> Chain:
        for layers in cut:
            if layers not in self.stages:
                self.stages[layers] = self.load(layers)
        return [self.stages[layers] for layers in cut]

    @property
    def num_layers(self) -> int:
        return len(self.adapter.layer_split().layers)

    def cuts(self) -> list[Cut]:
        """Every way to cut the layers into runs."""
        inner = range(1, self.num_layers)
        return [
            tuple(range(a, b) for a, b in itertools.pairwise((0, *joints, self.num_layers)))
            for count in range(self.num_layers)
            for joints in itertools.combinations(inner, count)
        ]

    def conditioning(self) -> dict[str, torch.Tensor]:
        """Of two branches, with texts of different lengths."""
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(5))
        if self.kind == "hunyuan":
            texts = {"prompt": draw(1, 5, 32), "negative": draw(1, 3, 32)}
            return {**texts, "pooled": draw(1, 16), "negative_pooled": draw(1, 16)}
        return {"prompt": draw(1, 7, 32), "negative": draw(1, 6, 32)}


OpenTiny = Callable[..., Model]


@pytest.fixture(scope="module")
def open_tiny(tiny_folder: Callable[[str], Path]) -> OpenTiny:
    @functools.cache
    def opened(kind: str, precision: Precision = FLOAT32) -> Model:
        return Model(kind=kind, adapter=open_model(str(tiny_folder(kind))), precision=precision)

    return opened


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """One step of the denoise stage: latents before and after, and the prediction of each branch between them."""

    before: torch.Tensor
    predictions: list[torch.Tensor]
    after: torch.Tensor


def reference(model: Model, request: VideoRequest) -> list[Seen]:
    stage, outputs = model.denoise_stage(), []
    for module in stage.modules:
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0].clone()))
    state = stage.begin(request, model.conditioning())
    seen = []
    for step in range(request.num_inference_steps or 0):
        before = stage.latents(state).clone()
        stage.step(state, step)
        seen.append(Seen(before=before, predictions=list(outputs), after=stage.latents(state).clone()))
        outputs.clear()
    return seen


def begin(chain: Chain, model: Model, request: VideoRequest) -> list[Any]:
    """A state for each stage. Nobody reads how long the whole video is."""
    request = dataclasses.replace(request, num_frames=0, seed=None)
    return [stage.begin(request, model.conditioning()) for stage in chain]


def predict(chain: Chain, states: Sequence[Any], step: int, branch: int, latents: torch.Tensor) -> torch.Tensor:
    """From stage to stage, each time as a copy that has just arrived."""
    frames = latents.shape[2]
    travelling: tuple[torch.Tensor, ...] = (latents,)
    for number, (stage, state) in enumerate(zip(chain, states, strict=True)):
        if number:
            assert tuple(tuple(x.shape) for x in travelling) == stage.hidden_shapes(state, branch, frames)
            assert {x.dtype for x in travelling} == {stage.hidden_dtype}
            travelling = tuple(x.clone(memory_format=torch.contiguous_format) for x in travelling)
        travelling = stage.run(state, step, branch, frames, travelling)
    (prediction,) = travelling
    return prediction


# -- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_predicts_what_the_whole_predicts(kind: str, num_frames: int, open_tiny: OpenTiny) -> None:
    model = open_tiny(kind)
    request = model.request(num_frames=num_frames)
    steps = reference(model, request)
    for cut in model.cuts():
        chain = model.chain(cut)
        states = begin(chain, model, request)
        assert chain[0].num_branches(states[0]) == 2
        for step, seen in enumerate(steps):
            ours = [predict(chain, states, step, branch, seen.before) for branch in range(2)]
            assert all(map(torch.equal, ours, seen.predictions)), (cut, step)
            assert {prediction.dtype for prediction in ours} == {torch.float32}
    experts = {states[0].expert(step) for step in range(len(steps))}
    assert experts == ({0, 1} if kind == "wan22" else {0})


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_is_the_whole_video_goes_the_same_way(
    kind: str, precision: Precision, open_tiny: OpenTiny
) -> None:
    """Two blocks in turns, the second one a step behind: their noise schedulers do not disturb each other."""
    model = open_tiny(kind, precision)
    request = model.request()
    steps = reference(model, request)
    for parts in (1, 3):
        chain = model.chain(model.adapter.layer_split().ranges(parts))
        states = begin(chain, model, request)
        first, last = chain[0], chain[-1]
        blocks = [first.begin_block(states[0], steps[0].before) for _ in range(2)]
        for step, block in in_turns(len(steps), blocks):
            latents = first.latents(block)
            assert latents.dtype == torch.float32
            assert torch.equal(latents, steps[step].before), (parts, step)
            predictions = [predict(chain, states, step, branch, latents) for branch in range(2)]
            guided = last.guide(states[-1], step, predictions)
            first.advance(states[0], block, step, guided.clone())
            assert torch.equal(first.latents(block), steps[step].after), (parts, step)


def in_turns(steps: int, blocks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    for iteration in range(steps + len(blocks) - 1):
        for number, block in enumerate(blocks):
            if 0 <= iteration - number < steps:
                yield iteration - number, block


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_doubled_layers_are_noticed(kind: str, open_tiny: OpenTiny) -> None:
    model = open_tiny(kind)
    request = model.request()
    step, end = reference(model, request)[0], model.num_layers
    for cut in (
        (range(1), range(2, end)),
        (range(2), range(1, end)),
        (range(1), range(1, 2), range(1, 2), range(2, end)),
    ):
        chain = model.chain(cut)
        ours = predict(chain, begin(chain, model, request), 0, 0, step.before)
        assert not torch.allclose(ours, step.predictions[0], atol=1e-3), cut


@pytest.mark.parametrize("kind", KINDS)
def test_other_steps_branches_and_texts_are_noticed(kind: str, open_tiny: OpenTiny) -> None:
    """So that the comparisons above say something of each."""
    model = open_tiny(kind)
    request = model.request()
    seen = reference(model, request)[0]
    chain = model.chain(model.adapter.layer_split().ranges(2))
    states = begin(chain, model, request)
    for step, branch in ((1, 0), (0, 1)):
        assert not torch.equal(predict(chain, states, step, branch, seen.before), seen.predictions[0])
    late = [states[0], *begin(chain[1:], model, dataclasses.replace(request, flow_shift=1.0))]
    assert not torch.equal(predict(chain, late, 1, 0, seen.before), predict(chain, states, 1, 0, seen.before))


def test_without_guidance_there_is_one_branch(open_tiny: OpenTiny) -> None:
    model = open_tiny("wan")
    (stage,) = model.chain(model.adapter.layer_split().ranges(1))
    state = stage.begin(model.request(guidance_scale=1.0), {"prompt": model.conditioning()["prompt"]})
    assert (stage.first, stage.last, stage.num_branches(state)) == (True, True, 1)
    prediction = torch.randn(1, 2)
    assert stage.guide(state, 0, [prediction]) is prediction


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_of_the_step_and_of_each_frame_alone(kind: str, open_tiny: OpenTiny) -> None:
    model = open_tiny(kind)
    (stage,) = model.chain(model.adapter.layer_split().ranges(1))
    state = stage.begin(model.request(), model.conditioning())
    predictions = [torch.randn(model.adapter.latent_shape(model.request())) for _ in range(2)]
    scales = {"wan": 5.0, "wan_ti2v": 5.0, "hunyuan": 3.0, "wan22": 4.0}
    for step, scale in ((0, scales[kind]), (2 if kind != "wan22" else 5, 3.0 if kind == "wan22" else scales[kind])):
        whole = stage.guide(state, step, predictions)
        assert torch.equal(whole, predictions[1] + scale * (predictions[0] - predictions[1]))
        assert torch.equal(stage.guide(state, step, [x[:, :, 1:] for x in predictions]), whole[:, :, 1:])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {}),
    ],
)
def test_what_type_noise_schedulers_return_is_known(name: str, config: dict[str, Any]) -> None:
    noise_scheduler = make_noise_scheduler(name, config, None)
    noise_scheduler.set_timesteps(3)
    prediction = torch.zeros(1, 1, 1, 2, 2, dtype=torch.bfloat16)
    latents = noise_scheduler.step(prediction, noise_scheduler.timesteps[0], prediction.float(), return_dict=False)[0]
    assert latents.dtype == (torch.float32 if keeps_latents_dtype(noise_scheduler) else torch.bfloat16)


# -- what a stage holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_holds_its_layers_and_no_others(kind: str, open_tiny: OpenTiny) -> None:
    model = open_tiny(kind)
    split, whole = model.adapter.layer_split(), dict(model.denoise_stage().modules[-1].named_parameters())
    for cut in model.cuts():
        for layers, stage in zip(cut, model.chain(cut), strict=True):
            wanted = {
                name: p for name, p in whole.items() if name.startswith(tuple(f"{x}." for x in split.wanted(layers)))
            }
            if layers.stop == model.num_layers and "scale_shift_table" in split.back:
                wanted["scale_shift_table"] = whole["scale_shift_table"]
            held = dict(stage.modules[-1].named_parameters())
            assert not any(p.is_meta for p in held.values())
            assert sum(p.nbytes for p in held.values()) == sum(p.nbytes for p in wanted.values())
            assert sorted(map(checksum, held.values())) == sorted(map(checksum, wanted.values()))
            assert (stage.first, stage.last) == (layers.start == 0, layers.stop == model.num_layers)
            assert len(stage.modules) == (2 if kind == "wan22" else 1)


def checksum(parameter: torch.Tensor) -> float:
    return float(parameter.double().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_time_and_cross_attended_text_are_everywhere(kind: str, open_tiny: OpenTiny) -> None:
    split = open_tiny(kind).adapter.layer_split()
    (everywhere,) = split.everywhere
    assert everywhere == ("time_text_embed" if kind == "hunyuan" else "condition_embedder")
    assert split.wanted(range(1, 2)) == (everywhere, split.layers[1])
    assert split.wanted(None) == split.wanted(range(len(split.layers)))
    assert sorted(split.wanted(None)) == sorted((*split.front, everywhere, *split.layers, *split.back))


@pytest.mark.parametrize("kind", ["wan22", "hunyuan"])
def test_a_stage_opens_only_its_shards(kind: str, tmp_path: Path) -> None:
    tiny_pipelines.build(kind, tmp_path, max_shard_size="60KB")
    adapter = open_model(str(tmp_path))
    wanted = tuple(f"{prefix}." for prefix in adapter.layer_split().wanted(range(1, 2)))
    for component in ("transformer", "transformer_2") if kind == "wan22" else ("transformer",):
        weights = adapter.checkpoint.weights(component)
        needed = set(weights.by_file({name for name in weights.tensors if name.startswith(wanted)}))
        assert needed < set(weights.files)
        for file in set(weights.files) - needed:
            file.write_bytes(b"not a safetensors file")  # opening it would fail
    adapter.load_block_stage("cpu", FLOAT32, range(1, 2))
    with pytest.raises(CheckpointError, match="cannot be read"):
        adapter.load_block_stage("cpu", FLOAT32, range(2))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_dealt_out(kind: str, open_tiny: OpenTiny) -> None:
    split = open_tiny(kind).adapter.layer_split()
    count = len(split.layers)
    assert split.ranges(2) == (range(2), range(2, count))
    assert split.ranges(count) == tuple(range(layer, layer + 1) for layer in range(count))
    with pytest.raises(
        InvalidRequestError, match=f"^{count + 1} stages cannot share {count} layers; take {count} stages"
    ):
        split.ranges(count + 1)


def test_tokens_of_several_latent_frames_are_refused(open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_tiny("wan")
    monkeypatch.setattr(type(model.adapter.layout), "patch", (2, 2, 2))  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequestError, match="one token of 2 latent frames"):
        model.load(range(1))


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_what_a_forward_made_is_gone_when_it_was_left(kind: str, open_tiny: OpenTiny) -> None:
    """Not only when Python next looks for cycles: on a GPU that is memory."""
    model = open_tiny(kind)
    chain, made = [model.load(range(1)), model.load(range(1, 2))], []
    for stage in chain:
        rope: Any = stage.modules[0].get_submodule("rope")
        rope.register_forward_hook(lambda _module, _inputs, output: made.append(weakref.ref(output[0])))
    states = begin(chain, model, model.request())
    latents = torch.randn(model.adapter.latent_shape(model.request()))
    gc.disable()
    try:
        hidden = chain[0].run(states[0], 0, 0, latents.shape[2], (latents,))
        out = chain[1].run(states[1], 0, 0, latents.shape[2], hidden)
        received = [weakref.ref(tensor) for tensor in (*hidden, *out)]
        del hidden, out
        assert len(made) == 2
        assert {ref() for ref in (*made, *received)} == {None}
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_a_failed_forward_leaves_the_stage_usable(kind: str, open_tiny: OpenTiny) -> None:
    model = open_tiny(kind)
    request = model.request()
    seen = reference(model, request)[0]
    chain = [model.load(range(2)), model.load(range(2, model.num_layers))]
    states = begin(chain, model, request)

    def fail(_module: nn.Module, _inputs: Any) -> None:
        raise RuntimeError("no memory")

    handle = chain[1].modules[0].get_submodule("rope").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        predict(chain, states, 0, 0, seen.before)
    handle.remove()
    assert torch.equal(predict(chain, states, 0, 0, seen.before), seen.predictions[0])


# -- ranks that share the tokens, compiled layers ---------------------------------------------------------------------


def alone() -> ParallelRuntime:
    def open_nothing(*_: Any) -> Any:
        raise AssertionError("a rank alone talks to nobody")

    return ParallelRuntime(ranks=(0,), rank=0, device="cpu", open_channel=open_nothing)


@pytest.mark.parametrize("kind", KINDS)
def test_partial_stages_attach(kind: str, open_tiny: OpenTiny) -> None:
    """Attached or not is another order of additions; cut or not is none. Measured: 2e-6 at most."""
    model = open_tiny(kind)
    request = model.request()
    steps = reference(model, request)
    chains = [[model.load(layers) for layers in model.adapter.layer_split().ranges(parts)] for parts in (1, 2, 3)]
    runtime = alone()
    for stage in itertools.chain(*chains):
        stage.attach(runtime)
    begun = [begin(chain, model, request) for chain in chains]
    for step in (0, len(steps) - 1):
        for branch, theirs in enumerate(steps[step].predictions):
            whole, *others = (
                predict(chain, states, step, branch, steps[step].before)
                for chain, states in zip(chains, begun, strict=True)
            )
            assert (whole - theirs).abs().max() <= 1e-5
            assert all(torch.equal(ours, whole) for ours in others)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_of_a_stage_pass_their_own_rows_on(kind: str, size: int, open_tiny: OpenTiny) -> None:
    model = open_tiny(kind)
    request = model.request()
    seen = reference(model, request)[0]
    cut = model.adapter.layer_split().ranges(3)
    chains = [[model.load(layers) for layers in cut] for _ in range(size)]

    def run(board: Any, rank: int) -> torch.Tensor:
        chain, parallel = chains[rank], ThreadRank(board, rank)
        for stage in chain:
            stage.attach(parallel)
        states = begin(chain, model, request)
        ((_, rows, _), *_) = chain[1].hidden_shapes(states[1], 0, seen.before.shape[2])
        tokens = chain[1].tokens_per_frame(states[1]) * seen.before.shape[2]
        assert tokens // size <= rows <= -(-tokens // size)
        return predict(chain, states, 0, 1, seen.before)

    for ours in run_threads(size, run):
        assert (ours - seen.predictions[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_layers_in_the_middle_compile(kind: str, open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_tiny(kind)
    request = model.request()
    seen = reference(model, request)[0]
    chain = [model.load(range(1)), model.load(range(1, 2)), model.load(range(2, model.num_layers))]
    for stage in chain:
        transformer: Any = stage.modules[0]
        compile_repeated = transformer.compile_repeated_blocks
        # The eager backend traces as the default one does, without the wait for a C++ compiler.
        monkeypatch.setattr(
            transformer, "compile_repeated_blocks", functools.partial(compile_repeated, backend="eager")
        )
        stage.compile_layers()
    ours = predict(chain, begin(chain, model, request), 0, 0, seen.before)
    torch._dynamo.reset()
    assert (ours - seen.predictions[0]).abs().max() <= 1e-5
