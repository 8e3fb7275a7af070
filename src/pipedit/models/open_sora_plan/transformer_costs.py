"""Operations, parameters and memory of Open-Sora-Plan's transformer (v1.3), from config values alone.

Most layers attend sparsely (Skiparse): the sequence falls into `sparse_n` interleaved parts, each of which attends to
itself only.
"""

import dataclasses
from typing import Any

from pipedit.plan.costs import Operations, TransformerCost

_TIME_CHANNELS = 256  # of the sinusoidal embedding, fixed in the module
_FIRST_SPARSE, _FIRST_DENSE_AGAIN = 2, 30  # absolute layer numbers, fixed in the module


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """The numbers of `OpenSoraT2V_v1_3`'s config that costs depend on."""

    hidden: int
    heads: int
    layers: int
    text_dim: int
    cross_dim: int
    in_channels: int
    out_channels: int
    patch: int  # latent positions in a patch
    sparse_n: int  # 1: every layer attends to everything

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TransformerShape":
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        return cls(
            hidden=hidden,
            heads=config["num_attention_heads"],
            layers=config["num_layers"],
            text_dim=config["caption_channels"],
            cross_dim=config.get("cross_attention_dim") or hidden,
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels") or config["in_channels"],
            patch=config.get("patch_size_t", 1) * config.get("patch_size", 2) ** 2,
            sparse_n=config.get("sparse_n", 1) if config.get("sparse1d", False) else 1,
        )

    def is_sparse(self, layer: int) -> bool:
        return self.sparse_n > 1 and _FIRST_SPARSE <= layer < _FIRST_DENSE_AGAIN


def _linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return inputs * outputs + outputs


def transformer_parameters(shape: TransformerShape) -> int:
    d, channels = shape.hidden, shape.out_channels * shape.patch
    self_attention = 4 * _linear(d, d)
    cross_attention = 2 * _linear(d, d) + 2 * _linear(shape.cross_dim, d)
    feed_forward = _linear(d, 4 * d) + _linear(4 * d, d)
    layer = self_attention + cross_attention + feed_forward + 6 * d
    front = _linear(shape.in_channels * shape.patch, d) + _linear(shape.text_dim, d) + _linear(d, d)
    time = _linear(_TIME_CHANNELS, d) + _linear(d, d) + _linear(d, 6 * d)
    return front + time + shape.layers * layer + 2 * d + _linear(d, channels)


def self_attention_operations(shape: TransformerShape, *, tokens: int, layer: int) -> int:
    """Of one layer at batch 1. Sparse ones pad the sequence to whole groups of sparse_n x sparse_n."""
    if not shape.is_sparse(layer):
        return 4 * tokens**2 * shape.hidden
    group = shape.sparse_n**2
    part = -(-tokens // group) * group // shape.sparse_n
    return shape.sparse_n * 4 * part**2 * shape.hidden


def transformer_cost(shape: TransformerShape, *, tokens: int, text_tokens: int) -> TransformerCost:
    """One forward pass at batch 1. The modulation is computed once for all layers."""
    d, s, t = shape.hidden, tokens, text_tokens
    linear = 2 * s * (4 * d * d + 2 * d * d + 8 * d * d) + 2 * t * 2 * shape.cross_dim * d
    time = 2 * (_TIME_CHANNELS * d + d * d + d * 6 * d)
    text = 2 * t * (shape.text_dim * d + d * d)
    return TransformerCost(
        front=Operations(linear=2 * s * shape.in_channels * shape.patch * d + time + text),
        layers=tuple(
            Operations(
                linear=linear,
                attention=self_attention_operations(shape, tokens=s, layer=layer) + 4 * s * t * d,
            )
            for layer in range(shape.layers)
        ),
        back=Operations(linear=2 * s * d * shape.out_channels * shape.patch),
    )


def transformer_working_bytes(shape: TransformerShape, *, tokens: int, text_tokens: int, element: int) -> int:
    """Peak of one layer: in its feed-forward, or in its attention while q and k are rotated."""
    row = tokens * shape.hidden
    feeding = (3 * row + 2 * tokens * 4 * shape.hidden) * element
    rotating = 8 * row * element
    angles = 2 * tokens * (shape.hidden // shape.heads) * 4
    return max(feeding, rotating) + angles + 2 * text_tokens * shape.hidden * element
