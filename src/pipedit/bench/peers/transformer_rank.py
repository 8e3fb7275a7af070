"""A rank of the whole-transformer measurement: python transformer_rank.py OPTIONS, then JSON lines (see
bench.rank_program). Ours beside diffusers' own context parallel, on the same weights and the same group of ranks.

OPTIONS is a JSON object: place, model (a Wan of random_pipelines.SIZES), latent_frames, latent_height, latent_width,
text_tokens, num_layers (null: the model's).
"""

import functools
import json
import math
import statistics
import sys
import time
import warnings
from typing import Any

import diffusers
import torch

from pipedit.bench.rank_program import Place, Variant, join, serve
from pipedit.bench.strategies import TUNING_CALLS, SilentParallel, counting_runtime
from pipedit.core.parallel import AUTO, ParallelConfig
from pipedit.core.shares import split_evenly
from pipedit.models.random_pipelines import WanSizes, randomise, sizes_of
from pipedit.models.sequence import attach
from pipedit.models.sequence_bindings import binding_of
from pipedit.parallel.runtime import CHUNK_CHOICES

Inputs = dict[str, torch.Tensor]


def build(options: dict[str, Any]) -> Any:
    """A Wan transformer with random weights, the same on every rank."""
    sizes = sizes_of(options["model"])
    assert isinstance(sizes, WanSizes), options["model"]
    arguments = dict(sizes.transformer)
    if options["num_layers"] is not None:
        arguments["num_layers"] = options["num_layers"]
    transformer = diffusers.WanTransformer3DModel(**arguments).eval()
    randomise(transformer, torch.Generator().manual_seed(0))
    return transformer


def twin(transformer: Any) -> Any:
    """Another one with the same weights, in the same memory."""
    other = type(transformer).from_config(transformer.config).eval()
    other.load_state_dict(transformer.state_dict(), assign=True)
    return other


def make_inputs(config: Any, options: dict[str, Any]) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    size = (options["latent_frames"], options["latent_height"], options["latent_width"])
    return {
        "hidden_states": torch.randn(1, config.in_channels, *size, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, options["text_tokens"], config.text_dim, generator=generator),
    }


def forward(transformer: Any, inputs: Inputs) -> torch.Tensor:
    result: torch.Tensor = transformer(**inputs, return_dict=False)[0]
    return result


def enable_context_parallel(transformer: Any, world_size: int) -> None:
    """As its documentation shows; it divides by the number of accelerators, which is 0 on a CPU."""
    torch.accelerator.device_count = lambda: 1
    transformer.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=world_size))


def ours(transformer: Any, inputs: Inputs, place: Place) -> dict[str, Variant]:
    runtime = counting_runtime(place.rank, place.world_size)
    attach(transformer, binding_of(transformer), runtime)

    def run(config: ParallelConfig) -> torch.Tensor:
        runtime.use(config)
        return forward(transformer, inputs)

    def settle(config: ParallelConfig) -> None:
        for _ in range(-(-TUNING_CALLS // len(transformer.blocks))):
            run(config)
        chosen["chosen_chunks"] = runtime.last_chunks

    def config(chunks: int | str) -> ParallelConfig:
        return ParallelConfig(ulysses_degree=place.world_size, pipesp_chunks=chunks)

    chosen: dict[str, Any] = {}
    most = max(split_evenly(transformer.config.num_attention_heads, place.world_size))
    counts = sorted({min(count, most) for count in (*CHUNK_CHOICES, most)} - {1})
    named = {"plain Ulysses": Variant(run=functools.partial(run, config(1)))}
    for count in counts:
        named[f"PipeSP, {count} chunks"] = Variant(run=functools.partial(run, config(count)))
    named["PipeSP, auto"] = Variant(
        run=functools.partial(run, config(AUTO)),
        settle=functools.partial(settle, config(AUTO)),
        facts=lambda: chosen,
    )
    return named


def compute_only(transformer: Any, inputs: Inputs, place: Place) -> Variant:
    silent = SilentParallel(rank=place.rank, world_size=place.world_size, clock=time.monotonic)
    attach(transformer, binding_of(transformer), silent)
    return Variant(
        run=functools.partial(forward, transformer, inputs),
        has_result=False,
        facts=lambda: {"egress_bytes": silent.egress_bytes, "attention_s": statistics.median(silent.attention_s)},
    )


@torch.inference_mode()
def main(options: dict[str, Any]) -> None:
    diffusers.utils.logging.set_verbosity_error()  # it calls its own feature experimental at every start
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"diffusers\.")  # it calls a deprecated all_gather
    place = Place(**options["place"])
    join(place)
    plain = build(options)
    inputs = make_inputs(plain.config, options)
    reference = forward(plain, inputs)
    theirs = twin(plain)
    enable_context_parallel(theirs, place.world_size)
    variants = {
        "one process": Variant(run=functools.partial(forward, plain, inputs), is_alone=True),
        "compute only": compute_only(twin(plain), inputs, place),
        "diffusers context parallel": Variant(run=functools.partial(forward, theirs, inputs)),
        **ours(twin(plain), inputs, place),
    }
    sizes = zip(inputs["hidden_states"].shape[2:], plain.config.patch_size, strict=True)
    tokens = math.prod(size // step for size, step in sizes)
    serve(place, variants, reference, parameters=plain.num_parameters(), tokens=tokens)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
