"""What a stage of a layer pipeline holds for a video that is made block by block: arithmetic over cost profiles."""

import dataclasses
import functools
import itertools

from pipedit.core.blocks import BlockPlan, Prefix, Storage
from pipedit.core.shares import ranges, split_evenly
from pipedit.plan.block_orders import order_of
from pipedit.plan.block_simulation import pending_entries
from pipedit.plan.costs import PartBytes, RequestCost, SharedAttention

_SCALE_BYTES = 4  # of each row and head, where keys and values wait in 8 bits
_MESSAGES = 2  # hidden states of a forward pass that wait to be taken, and as many that leave


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageBytes:
    """Of one stage. `weights`: of its layers and what every stage has; `working` while it computes. The rest waits from
    op to op: `entries` are keys and values that wait for neighbours (`host_entries`: those in host memory), `messages`
    hidden states on their way, `latents` those of the blocks in flight, on the first stage."""

    weights: int
    working: int
    entries: int
    host_entries: int
    messages: int
    latents: int

    @property
    def waiting(self) -> int:
        """On the device."""
        return self.entries + self.messages + self.latents

    @property
    def total(self) -> int:
        return self.weights + self.working + self.waiting


def stage_bytes(
    window: RequestCost, plan: BlockPlan, *, stages: int, stage: int, storage: Storage = Storage.DEVICE
) -> StageBytes:
    """`window`: the model's cost of a video that is as long as the largest window."""
    attention = _attention(window)
    layers = layer_ranges(window, stages)[stage]
    in_flight, pending = _most(plan, stages)
    entry = _context_tokens(window, plan) * 2 * len(layers)  # rows of keys and of values
    # Each forward pass leaves its own; while one runs, those that it reads are still there, and its own appear.
    entries = entry * (pending * window.forwards_per_step + _neighbours(plan))
    stored = entries * _stored_row_bytes(attention, storage)
    block = window.latent_bytes // window_latents(plan) * max(plan.latents_of(0), plan.block_latents)
    return StageBytes(
        weights=sum(_stage_weights(part, layers) for part in _transformers(window)),
        working=max(_working(part, window, plan, storage) for part in _transformers(window)),
        entries=0 if storage is Storage.HOST else stored,
        host_entries=stored if storage is Storage.HOST else 0,
        messages=_MESSAGES * ((stage > 0) + (stage + 1 < stages)) * message_bytes(window),
        latents=in_flight * block if stage == 0 else 0,
    )


def stage_cost(
    whole: RequestCost,
    window: RequestCost,
    plan: BlockPlan,
    *,
    stages: int,
    storage: Storage = Storage.DEVICE,
    stage: int | None = None,
    decodes: bool = False,
) -> RequestCost:
    """What a rank has to hold that is stage number `stage` (None: the one that holds most). `whole`: the cost of the
    whole video, of which text encoder and VAE are taken; `decodes`: this rank may decode while keys and values wait."""
    numbers = range(stages) if stage is None else (stage,)
    held = max(
        (stage_bytes(window, plan, stages=stages, stage=number, storage=storage) for number in numbers),
        key=lambda one: one.total,
    )
    names = [name for name in whole.parts if name.startswith("transformer")]
    weights = split_evenly(held.weights, len(names))
    parts = {
        **whole.parts,
        **{
            name: PartBytes(weights=share, working=held.working + held.waiting)
            for name, share in zip(names, weights, strict=True)
        },
    }
    if decodes:
        parts["vae"] = dataclasses.replace(whole.parts["vae"], working=whole.parts["vae"].working + held.waiting)
    block = window.latent_bytes // window_latents(plan) * plan.block_latents
    return dataclasses.replace(whole, parts=parts, latent_bytes=block)


def message_bytes(window: RequestCost) -> int:
    """Hidden states of one forward pass of the window."""
    attention = _attention(window)
    return (window.latent_tokens + _joint_text(window)) * attention.row_bytes


def layer_ranges(cost: RequestCost, stages: int) -> tuple[range, ...]:
    """Layers of each stage, dealt out as LayerSplit does it."""
    parts = ranges(split_evenly(len(cost.forward.layers), stages))
    return tuple(range(part.start, part.stop) for part in parts)


def blocks_in_flight(plan: BlockPlan) -> int:
    """At most; a few more where there are more stages than blocks need."""
    return plan.num_steps if plan.num_blocks is None else min(plan.num_steps, plan.num_blocks)


def window_latents(plan: BlockPlan) -> int:
    """Of the largest window."""
    blocks = range(2 if plan.num_blocks is None else min(plan.num_blocks, 2))
    return max(plan.window_latents(block) for block in blocks)


@functools.lru_cache(maxsize=256)
def _most(plan: BlockPlan, stages: int) -> tuple[int, int]:
    """Blocks that have begun and are not finished, and entries that wait after an op."""
    plan = _as_long_as_it_matters(plan, stages)
    ops = tuple(order_of(plan, stages))
    begun = itertools.accumulate((op.step == 0) - (op.step == plan.num_steps - 1) for op in ops)
    kept = 1 + (plan.prefix is Prefix.RERUN)  # the one that has just finished, and one whose end is still a prefix
    return max(begun) + kept, max(pending_entries(ops, plan))


def _as_long_as_it_matters(plan: BlockPlan, stages: int) -> BlockPlan:
    """What waits follows the number of steps and stages, not the length of the video."""
    enough = plan.num_steps + 3 * stages + 4
    if plan.num_blocks is not None and plan.num_blocks <= enough:
        return plan
    return dataclasses.replace(plan, latents=enough * plan.block_latents)


def _transformers(cost: RequestCost) -> list[PartBytes]:
    return [part for name, part in cost.parts.items() if name.startswith("transformer")]


def _attention(cost: RequestCost) -> SharedAttention:
    assert cost.attention is not None, "the model declares no attention"
    return cost.attention


def _joint_text(cost: RequestCost) -> int:
    return cost.text_tokens if _attention(cost).joint_text else 0


def _neighbours(plan: BlockPlan) -> int:
    """Of which a forward pass reads keys and values, and for which it leaves some."""
    return 2 if plan.prefix is Prefix.CACHE else 1


def _context_tokens(window: RequestCost, plan: BlockPlan) -> int:
    """Of one neighbour."""
    return window.latent_tokens // window_latents(plan) * plan.context_latents


def _stage_weights(part: PartBytes, layers: range) -> int:
    """Its layers, and all that is no layer: every stage has the embedders, and the rest is small."""
    assert part.layers, "the model does not declare what its layers weigh"
    return part.weights - sum(part.layers) + sum(part.layers[layer] for layer in layers)


def _stored_row_bytes(attention: SharedAttention, storage: Storage) -> int:
    """Of keys or values of one token."""
    if storage is not Storage.INT8:
        return attention.row_bytes
    return attention.heads * (attention.head_dim + _SCALE_BYTES)


def _working(part: PartBytes, window: RequestCost, plan: BlockPlan, storage: Storage) -> int:
    """At an attention, keys and values of the window are there once more, joined with those of the neighbours, and the
    neighbours' keys once more as they were turned; where they wait elsewhere, their values too."""
    if not plan.context_latents:
        return part.working
    given = _neighbours(plan) * _context_tokens(window, plan)
    joined = 2 * (window.latent_tokens + _joint_text(window) + given)
    fetched = given * (1 if storage is Storage.DEVICE else 2)
    return max(part.working, part.attending + (joined + fetched) * _attention(window).row_bytes)
