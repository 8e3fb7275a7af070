"""What a stage of a layer pipeline holds for a video that is made block by block: arithmetic over cost profiles."""

import dataclasses

from pipedit.core.blocks import BlockPlan, Storage
from pipedit.plan.costs import PartBytes, RequestCost

_EMBEDDERS_PERCENT = 5  # of the transformer, beside its layers: on every stage, cautiously
# Keys and values of an entry: what waits on the device, of what the model makes, in percent.
_STORED_PERCENT = {Storage.DEVICE: 100, Storage.HOST: 0, Storage.INT8: 60}


def stage_cost(
    window: RequestCost, plan: BlockPlan, *, stages: int, num_layers: int, storage: Storage = Storage.DEVICE
) -> RequestCost:
    """`window`: the model's cost of a video that is as long as the largest window. Returns that of the largest stage:
    its layers' weights, the window's activations, and the keys and values that wait for neighbours."""
    layers = -(-num_layers // stages)
    waiting = context_bytes(window, plan, layers=layers) * _STORED_PERCENT[storage] // 100
    parts = {
        name: _stage_part(part, layers, num_layers, waiting) if name.startswith("transformer") else part
        for name, part in window.parts.items()
    }
    return dataclasses.replace(window, parts=parts)


def context_bytes(window: RequestCost, plan: BlockPlan, *, layers: int) -> int:
    """Bytes of all entries that wait at a time on a stage of so many layers: one between any two neighbours in flight,
    for each forward pass of a step. Both experts of a model with two make the same entries."""
    attention = window.attention
    assert attention is not None, "the model declares no attention"
    frames = window_latents(plan)
    tokens = window.latent_tokens // frames * plan.context_latents
    return (blocks_in_flight(plan) - 1) * 2 * attention.row_bytes * tokens * layers * window.forwards_per_step


def blocks_in_flight(plan: BlockPlan) -> int:
    """At most; a few more where there are more stages than blocks need."""
    return plan.num_steps if plan.num_blocks is None else min(plan.num_steps, plan.num_blocks)


def window_latents(plan: BlockPlan) -> int:
    """Of the largest window."""
    blocks = range(2 if plan.num_blocks is None else min(plan.num_blocks, 2))
    return max(plan.window_latents(block) for block in blocks)


def _stage_part(part: PartBytes, layers: int, num_layers: int, waiting: int) -> PartBytes:
    weights = part.weights * layers // num_layers + part.weights * _EMBEDDERS_PERCENT // 100
    return PartBytes(weights=min(weights, part.weights), working=part.working + waiting)
