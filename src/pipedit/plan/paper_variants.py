"""PipeDiT's published systems on a predictor: the same machines, but its way of doing things, not ours.

Pure functions from a request's cost to the seconds that a number of prompts take, back to back. What differs from ours
is written down as data: `PublishedSystem`. The constants are fitted in `benchmarks/paper_fit`.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable

from pipedit.core.errors import InvalidRequestError
from pipedit.core.messages import Aco
from pipedit.core.parallel import ParallelConfig
from pipedit.core.shares import split_evenly
from pipedit.plan.costs import RequestCost
from pipedit.plan.hardware import Cluster
from pipedit.plan.predict import Implementation, Overlap, Predictor

BASELINE, DEDIVAE, PIPESP, ACO = "baseline", "dedivae", "dedivae+pipesp", "dedivae+pipesp+aco"
PIPEDIT, OURS = "pipedit", "ours"
VARIANTS = (BASELINE, DEDIVAE, PIPESP, ACO, PIPEDIT, OURS)
DECODERS = 1  # of the paper's groups: 7 + 1

OursPrediction = Callable[[RequestCost, Cluster, int, int], float]
"""Cost, cluster, steps, prompts -> seconds with the planner's choice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedSystem:
    """How the paper runs one model. `ring_on_denoisers`: without Aco the denoise group is a ring, else Ulysses with
    padded heads. `encodes_on_decoders`: the text encoder lives with the VAE. `aco_waits_for_decode`: with Aco the
    denoise group does not go on while the decoder decodes, as the fixed costs read off figure 5 say."""

    implementation: Implementation
    ring_on_denoisers: bool
    encodes_on_decoders: bool
    aco_waits_for_decode: bool


_IMPLEMENTATION = Implementation(
    overlap=Overlap.OUTPUTS,
    passes=122,
    request_s=0.906,
    hidden_cost=0.046,
    chunk_s=0.00033,
    helper_s=0.00427,
    ring_loss=0.1055,
    pads_heads=True,
)
SYSTEMS = {
    "OpenSoraPlan": PublishedSystem(
        implementation=dataclasses.replace(_IMPLEMENTATION, overlap=Overlap.OUTPUTS_AND_PROJECTIONS),
        ring_on_denoisers=False,
        encodes_on_decoders=False,
        aco_waits_for_decode=True,
    ),
    "HunyuanVideo": PublishedSystem(
        implementation=_IMPLEMENTATION,
        ring_on_denoisers=True,
        encodes_on_decoders=True,
        aco_waits_for_decode=False,
    ),
}


def predicted_s(
    system: PublishedSystem,
    cost: RequestCost,
    cluster: Cluster,
    variant: str,
    *,
    steps: int,
    prompts: int,
    ours: OursPrediction | None = None,
) -> float:
    """Seconds that `prompts` equal prompts of `steps` steps take in all. `ours` answers for the variant of that name.
    Raises InvalidRequestError for a variant that is none."""
    if variant == OURS:
        if ours is None:
            raise InvalidRequestError([f"variant {OURS!r} needs the planner, which is not there"])
        return ours(cost, cluster, steps, prompts)
    if variant not in VARIANTS:
        nearest = difflib.get_close_matches(variant, VARIANTS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise InvalidRequestError([f"variant {variant!r} is not known; known are {', '.join(VARIANTS)}{hint}"])
    predictor = Predictor(cluster, system.implementation)
    if variant == BASELINE:
        return _baseline_s(predictor, cost, steps, prompts)
    if variant == PIPEDIT:
        return min(_pipeline_s(system, predictor, cost, each, steps, prompts) for each in (PIPESP, ACO))
    return _pipeline_s(system, predictor, cost, variant, steps, prompts)


def step_s(system: PublishedSystem, cost: RequestCost, cluster: Cluster, variant: str) -> float:
    """One step of a variant that has one kind of them; of Aco, a step that is helped."""
    predictor = Predictor(cluster, system.implementation)
    if variant == BASELINE:
        return _colocated_step_s(predictor, cost)
    return _step_s(system, predictor, cost, pipesp=variant != DEDIVAE, helped=variant == ACO)


# -- the parts ----------------------------------------------------------------------------------------------------


def _baseline_s(predictor: Predictor, cost: RequestCost, steps: int, prompts: int) -> float:
    """Everything on all ranks, one after the other; each model comes in from host memory for each prompt."""
    offload_s = predictor.offload_s(cost.weight_bytes, predictor.cluster.num_devices)
    denoise_s = steps * _colocated_step_s(predictor, cost)
    return prompts * (_encode_s(predictor, cost) + offload_s + denoise_s + predictor.decode_s(cost))


def _encode_s(predictor: Predictor, cost: RequestCost) -> float:
    return predictor.implementation.request_s + predictor.encode_s(cost)


def _colocated_step_s(predictor: Predictor, cost: RequestCost) -> float:
    everybody = ParallelConfig(ulysses_degree=predictor.cluster.num_devices, pipesp_chunks=1)
    return predictor.step(cost, everybody).total_s


def _step_s(system: PublishedSystem, predictor: Predictor, cost: RequestCost, *, pipesp: bool, helped: bool) -> float:
    assert cost.attention is not None
    denoisers, heads = predictor.cluster.num_devices - DECODERS, cost.attention.heads
    chunks = heads if pipesp else 1  # the paper's chunk is one head
    if not helped and system.ring_on_denoisers:
        return predictor.step(cost, ParallelConfig(ring_degree=denoisers, pipesp_chunks=1)).total_s
    ulysses = ParallelConfig(ulysses_degree=denoisers, pipesp_chunks=chunks)
    if not helped:
        return predictor.step(cost, ulysses).total_s
    ranks = predictor.cluster.num_devices
    aco = Aco(
        helpers=(tuple(range(denoisers, ranks)),),
        heads=split_evenly(heads, ranks),
        text_tokens=(cost.text_tokens if cost.attention.joint_text else 0,),
    )
    return predictor.step(cost, ulysses, aco).total_s


def _pipeline_s(
    system: PublishedSystem, predictor: Predictor, cost: RequestCost, variant: str, steps: int, prompts: int
) -> float:
    """Denoise and decode group as a pipeline that fills and drains. Each step decides whether the decoder helps."""
    alone_s = _step_s(system, predictor, cost, pipesp=variant != DEDIVAE, helped=False)
    helped_s = _step_s(system, predictor, cost, pipesp=True, helped=True) if variant == ACO else alone_s
    encode_s, decode_s = _encode_s(predictor, cost), predictor.decode_s(cost)
    waits = variant == ACO and system.aco_waits_for_decode
    denoisers_free = decoder_free = encode_s if system.encodes_on_decoders else 0.0
    for _ in range(prompts):
        start = denoisers_free + (0.0 if system.encodes_on_decoders else encode_s)
        if waits:
            start = max(start, decoder_free)
        alone = 0 if waits else min(steps, max(0, math.ceil((decoder_free - start) / alone_s)))
        denoisers_free = start + alone * alone_s + (steps - alone) * helped_s
        next_encode_s = encode_s if system.encodes_on_decoders else 0.0
        decoder_free = max(denoisers_free, decoder_free) + decode_s + next_encode_s
    return decoder_free
