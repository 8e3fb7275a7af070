"""What DualParal computes (arXiv 2505.21070): the blocks of a long video, and what each of their steps needs from
others, as data.

A block is a run of latent frames; an op is one step of one block. What an op needs is a rule of the plan alone, so the
video depends neither on the order in which ops run, as long as it is legal, nor on the number of stages they run on.
Knows no order (plan.block_orders), no clock and no tensors.
"""

import dataclasses
import enum
import functools
from typing import Any, NamedTuple


class Prefix(enum.StrEnum):
    """How a block sees the end of its predecessor.

    CACHE: by keys and values that the predecessor's step at the same noise level left behind, on the same stage.
    RERUN: by its latents after that step, which run through all layers once more, before the block's own (published).
    """

    CACHE = "cache"
    RERUN = "rerun"


class Source(enum.StrEnum):
    OWN = "own"
    PREDECESSOR = "predecessor"
    SUCCESSOR = "successor"


class Kind(enum.StrEnum):
    """RESULT: latents after the step, which exist on the first stage once the last one has made its prediction.
    FEATURES: keys and values of every layer, each on the stage that holds the layer, as soon as the op has left it."""

    RESULT = "result"
    FEATURES = "features"


class Op(NamedTuple):
    """Step `step` (0: pure noise) of block `block` (0: the beginning of the video)."""

    block: int
    step: int

    def __str__(self) -> str:
        return f"b{self.block} s{self.step}"


class Dependency(NamedTuple):
    """`user` needs something that `maker` makes. `latents`: how many latent frames of it are handed over, at least 1:
    all of a block's own, the last ones of the predecessor, the first ones of the successor."""

    user: Op
    maker: Op
    source: Source
    kind: Kind
    latents: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """A video in blocks. Counts are latent frames; `latents` None: endless, until somebody stops it.

    Blocks have `block_latents`, the last one what is left. Of each neighbour a block sees `context_latents`, or all of
    a shorter one. `compat`: as the released code of DualParal has it, where block 0 has `context_latents` more and the
    last block is whole, so that the video is longer than asked for (paper notes: output K * nb + nc).
    Only a plan without `problems` may be used.
    """

    latents: int | None
    block_latents: int
    context_latents: int
    num_steps: int
    prefix: Prefix = Prefix.CACHE
    compat: bool = False

    def problems(self) -> list[str]:
        """Why this cannot be, a sentence each; by the names under which users know the settings."""
        counts = [("block_size", self.block_latents, 1), ("context", self.context_latents, 0)]
        counts.append(("num_inference_steps", self.num_steps, 1))
        if self.latents is not None:
            counts.append(("num_latent_frames", self.latents, 1))
        found = [problem for count in counts if (problem := _count_problem(*count))]
        if not found and self.context_latents > self.block_latents:
            most = self.block_latents
            found.append(
                f"context={self.context_latents} is more than block_size={most}: a block sees only its neighbours; "
                f"use 0 to {most}"
            )
        if self.prefix not in list(Prefix):
            found.append(f"prefix={str(self.prefix)!r} is unknown; use {' or '.join(repr(str(p)) for p in Prefix)}")
        elif self.compat and self.prefix != Prefix.RERUN:
            found.append(f"dualparal_compat needs prefix={str(Prefix.RERUN)!r}: the released code has no prefix cache")
        return found

    # -- sizes ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def num_blocks(self) -> int | None:
        """None: endless."""
        return None if self.latents is None else -(-self.latents // self.block_latents)

    @property
    def num_operations(self) -> int | None:
        """Steps of all blocks together; None: endless."""
        return None if self.num_blocks is None else self.num_blocks * self.num_steps

    @property
    def output_latents(self) -> int | None:
        """Latent frames of all blocks together."""
        if self.num_blocks is None or not self.compat:
            return self.latents
        return self.num_blocks * self.block_latents + self.context_latents

    def has_block(self, block: int) -> bool:
        return block >= 0 and (self.num_blocks is None or block < self.num_blocks)

    def has(self, op: Op) -> bool:
        return self.has_block(op.block) and 0 <= op.step < self.num_steps

    def latents_of(self, block: int) -> int:
        """Latent frames that block `block` makes."""
        assert self.has_block(block), (block, self)
        if self.compat:
            return self.block_latents + (self.context_latents if block == 0 else 0)
        left = self.block_latents if self.latents is None else self.latents - block * self.block_latents
        return min(self.block_latents, left)

    def first_latent(self, block: int) -> int:
        """Where block `block` begins in the video."""
        assert self.has_block(block), (block, self)
        return block * self.block_latents + (self.context_latents if self.compat and block > 0 else 0)

    def prefix_latents(self, block: int) -> int:
        """Latent frames of the predecessor that block `block` sees."""
        return min(self.context_latents, self.latents_of(block - 1)) if block > 0 else 0

    def suffix_latents(self, block: int) -> int:
        """Latent frames of the successor that block `block` sees, from step 1 on."""
        return min(self.context_latents, self.latents_of(block + 1)) if self.has_block(block + 1) else 0

    def window_latents(self, block: int) -> int:
        """Latent frames that run through the layers in each op of block `block`."""
        return self.latents_of(block) + (self.prefix_latents(block) if self.prefix == Prefix.RERUN else 0)

    # -- what an op needs -------------------------------------------------------------------------------------------

    def dependencies(self, op: Op) -> tuple[Dependency, ...]:
        """What `op` receives. The predecessor's part comes from the same noise level, the successor's from one step
        earlier. At step 0 there is nothing of the successor yet; without context there are no neighbours at all."""
        block, step = op
        found = []
        if step > 0:
            found.append(Dependency(op, Op(block, step - 1), Source.OWN, Kind.RESULT, self.latents_of(block)))
        if latents := self.prefix_latents(block):
            kind = Kind.RESULT if self.prefix == Prefix.RERUN else Kind.FEATURES
            found.append(Dependency(op, Op(block - 1, step), Source.PREDECESSOR, kind, latents))
        if step > 0 and (latents := self.suffix_latents(block)):
            found.append(Dependency(op, Op(block + 1, step - 1), Source.SUCCESSOR, Kind.FEATURES, latents))
        return tuple(found)

    def hand_overs(self, op: Op) -> tuple[Dependency, ...]:
        """What `op` makes for others and for its own next step: dependencies whose maker it is."""
        block, step = op
        users = (Op(block - 1, step + 1), Op(block, step + 1), Op(block + 1, step))
        return tuple(d for user in users if self.has(user) for d in self.dependencies(user) if d.maker == op)


def _count_problem(name: str, value: Any, least: int) -> str | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return f"{name}={value!r} should be a whole number"
    return None if value >= least else f"{name}={value} must be at least {least}"


class Storage(enum.StrEnum):
    """Where keys and values of neighbours wait: on the device; in host memory; on the device in 8 bits (lossy: one
    scale for each token and head)."""

    DEVICE = "device"
    HOST = "host"
    INT8 = "int8"
