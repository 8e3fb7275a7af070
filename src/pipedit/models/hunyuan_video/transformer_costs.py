"""Operations, parameters and memory of HunyuanVideo's transformer, from config values alone."""

import dataclasses
from typing import Any

from pipedit.plan.costs import Operations, TransformerCost

_TIME_CHANNELS = 256  # of the sinusoidal embedding, fixed in the module
_REFINER_RATIO = 4  # feed-forward width of the text refiner, fixed in the module


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """The numbers of `HunyuanVideoTransformer3DModel`'s config that costs depend on."""

    hidden: int
    head_dim: int
    ffn: int
    double_layers: int
    single_layers: int
    refiner_layers: int
    text_dim: int
    pooled_dim: int
    guidance_embeds: bool
    in_channels: int
    out_channels: int
    patch: int  # latent positions in a patch

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TransformerShape":
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        return cls(
            hidden=hidden,
            head_dim=config["attention_head_dim"],
            ffn=int(hidden * config.get("mlp_ratio", 4.0)),
            double_layers=config["num_layers"],
            single_layers=config["num_single_layers"],
            refiner_layers=config["num_refiner_layers"],
            text_dim=config["text_embed_dim"],
            pooled_dim=config["pooled_projection_dim"],
            guidance_embeds=config.get("guidance_embeds", True),
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels") or config["in_channels"],
            patch=config.get("patch_size_t", 1) * config.get("patch_size", 2) ** 2,
        )


def _linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return inputs * outputs + outputs


def _two_layer(inputs: int, hidden: int) -> int:
    """Parameters of an embedding network: inputs -> hidden -> hidden."""
    return _linear(inputs, hidden) + _linear(hidden, hidden)


def layer_parameters(shape: TransformerShape) -> tuple[int, ...]:
    """Of each layer: double-stream ones, then single-stream ones."""
    d, ffn = shape.hidden, shape.ffn
    feed_forward = _linear(d, ffn) + _linear(ffn, d)
    double = 2 * (_linear(d, 6 * d) + 4 * _linear(d, d) + 2 * shape.head_dim + feed_forward)
    single = _linear(d, 3 * d) + 3 * _linear(d, d) + 2 * shape.head_dim + _linear(d, ffn) + _linear(d + ffn, d)
    return (double,) * shape.double_layers + (single,) * shape.single_layers


def transformer_parameters(shape: TransformerShape) -> int:
    d = shape.hidden
    refiner_ffn = _REFINER_RATIO * d
    refiner = 4 * _linear(d, d) + _linear(d, refiner_ffn) + _linear(refiner_ffn, d) + 4 * d + _linear(d, 2 * d)
    text = _two_layer(_TIME_CHANNELS, d) + _two_layer(shape.text_dim, d) + _linear(shape.text_dim, d)
    time = (1 + shape.guidance_embeds) * _two_layer(_TIME_CHANNELS, d) + _two_layer(shape.pooled_dim, d)
    return (
        _linear(shape.in_channels * shape.patch, d)
        + text
        + shape.refiner_layers * refiner
        + time
        + sum(layer_parameters(shape))
        + _linear(d, 2 * d)
        + _linear(d, shape.out_channels * shape.patch)
    )


def transformer_cost(shape: TransformerShape, *, tokens: int, text_tokens: int) -> TransformerCost:
    """One forward pass at batch 1. The modulation of every layer is computed once, not for each token."""
    d, ffn, s, t = shape.hidden, shape.ffn, tokens, text_tokens
    attention = 4 * (s + t) ** 2 * d
    double = Operations(
        linear=2 * 2 * 6 * d * d + 2 * (s + t) * (4 * d * d + 2 * d * ffn),
        attention=attention,
    )
    single = Operations(
        linear=2 * 3 * d * d + 2 * (s + t) * (3 * d * d + d * ffn + (d + ffn) * d),
        attention=attention,
    )
    return TransformerCost(
        front=_front(shape, tokens=s, text_tokens=t),
        layers=(double,) * shape.double_layers + (single,) * shape.single_layers,
        back=Operations(linear=2 * 2 * d * d + 2 * s * d * shape.out_channels * shape.patch),
    )


def _front(shape: TransformerShape, *, tokens: int, text_tokens: int) -> Operations:
    """Patch embedding, time and guidance, and the text refiner (which runs in every forward)."""
    d, t = shape.hidden, text_tokens
    patches = 2 * tokens * shape.in_channels * shape.patch * d
    sinusoid = 2 * (_TIME_CHANNELS * d + d * d)
    time = (1 + shape.guidance_embeds) * sinusoid + 2 * (shape.pooled_dim * d + d * d)
    text = sinusoid + 2 * (shape.text_dim * d + d * d) + 2 * t * shape.text_dim * d
    refiner = Operations(
        linear=2 * t * (4 * d * d + 2 * d * _REFINER_RATIO * d) + 2 * d * 2 * d,
        attention=4 * t * t * d,
    )
    return Operations(linear=patches + time + text) + refiner.times(shape.refiner_layers)


def transformer_working_bytes(shape: TransformerShape, *, tokens: int, text_tokens: int, element: int) -> int:
    """Peak of one single-stream layer: either while q or k is rotated in float32 beside the feed-forward half, or at
    its output, when that half has been joined with the attention."""
    row = (tokens + text_tokens) * shape.hidden
    feed_forward = (tokens + text_tokens) * shape.ffn
    rotating = (8 * row + feed_forward) * element + 3 * row * 4
    leaving = (8 * row + 2 * feed_forward) * element
    angles = 2 * tokens * shape.head_dim * 4
    return max(rotating, leaving) + angles


def transformer_attending_bytes(shape: TransformerShape, *, tokens: int, text_tokens: int, element: int) -> int:
    """In the self-attention of a single-stream layer: the two streams joined and apart, their norm, q, k, v and the
    result, and the feed-forward half, which comes first."""
    rows = tokens + text_tokens
    return rows * (7 * shape.hidden + shape.ffn) * element + 2 * tokens * shape.head_dim * 4
