"""What a request costs, in operations and bytes, computed from a model's config alone.

Adapters fill these in by formula; tests hold the formulas against the real modules on the meta device. The planner
turns operations into time with a device profile; `plan.memory` turns bytes into yes or no.
"""

import dataclasses
import functools


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operations:
    """Floating point operations (a multiply and an add are two), split by what runs them."""

    linear: int = 0  # matrix products with weights, patch embedding included
    attention: int = 0  # the two products inside attention
    convolution: int = 0

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(
            linear=self.linear + other.linear,
            attention=self.attention + other.attention,
            convolution=self.convolution + other.convolution,
        )

    def times(self, count: int) -> "Operations":
        return Operations(
            linear=self.linear * count, attention=self.attention * count, convolution=self.convolution * count
        )

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.convolution


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerCost:
    """One forward pass of the denoiser: before the layers, each layer, after them. Batch 1."""

    front: Operations
    layers: tuple[Operations, ...]
    back: Operations

    @functools.cached_property
    def total(self) -> Operations:
        return sum(self.layers, self.front + self.back)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedAttention:
    """The self-attentions of one forward pass (batch 1), which ranks can share by heads.

    `operations`: all `sites` together; whatever else attends (to text) goes by tokens. `projections`: operations that
    make q, k and v of the latents. `joint_text`: the text's tokens are in the same attention. `is_masked`: its kernel
    adds a mask, which is slower. `element`: bytes of a value that is exchanged.
    """

    sites: int
    heads: int
    head_dim: int
    operations: int
    projections: int
    element: int
    joint_text: bool = False
    is_masked: bool = False

    @property
    def row_bytes(self) -> int:
        """Of q, k or v of one token, all heads, at one site."""
        return self.heads * self.head_dim * self.element


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartBytes:
    """Bytes of one part of the model while it is resident, in the precision it is loaded in.

    `working`: the largest extra memory while it computes, for the request at hand; `attending`: that while it is in a
    self-attention, which more keys and values may come to. `layers`: of `weights`, those of each layer, where the part
    falls apart into layers that a rank can hold alone.
    """

    weights: int
    working: int
    attending: int = 0
    layers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestCost:
    """Everything a planner needs to know about one request on one model."""

    num_steps: int
    num_chunks: int
    forwards_per_step: int  # 2 with classifier-free guidance, else 1
    latent_tokens: int
    text_tokens: int
    latent_bytes: int
    encode: Operations  # the whole prompt, negative prompt included
    forward: TransformerCost
    decode_first_chunk: Operations
    decode_chunk: Operations  # each further chunk
    decode_last_chunk: Operations | None = None  # where the last of several chunks is smaller
    parts: dict[str, PartBytes]  # "text_encoder", "transformer", ..., "vae"
    attention: SharedAttention | None = None  # None: unknown, so nothing can be predicted for several ranks
    forwards_per_call: int = 1  # 2 where both forwards of a step run as one batch
    decodes_in_rounds: bool = False  # several decoders take a chunk each; else they share every chunk

    @property
    def denoise(self) -> Operations:
        return self.forward.total.times(self.num_steps * self.forwards_per_step)

    @property
    def decode(self) -> Operations:
        if self.num_chunks == 1:
            return self.decode_first_chunk
        last = self.decode_last_chunk or self.decode_chunk
        return self.decode_first_chunk + self.decode_chunk.times(self.num_chunks - 2) + last

    @property
    def weight_bytes(self) -> int:
        return sum(part.weights for part in self.parts.values())
