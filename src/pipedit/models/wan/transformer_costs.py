"""Operations, parameters and memory of Wan's transformer, from config values alone."""

import dataclasses
import math
from typing import Any

from pipedit.plan.costs import Operations, TransformerCost


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """The numbers of `WanTransformer3DModel`'s config that costs depend on."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    text_dim: int
    freq_dim: int
    in_channels: int
    out_channels: int
    patch: int  # latent positions in a patch
    cross_norm: bool

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TransformerShape":
        return cls(
            hidden=config["num_attention_heads"] * config["attention_head_dim"],
            ffn=config["ffn_dim"],
            layers=config["num_layers"],
            heads=config["num_attention_heads"],
            text_dim=config["text_dim"],
            freq_dim=config["freq_dim"],
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels") or config["in_channels"],
            patch=math.prod(config.get("patch_size", (1, 2, 2))),
            cross_norm=config.get("cross_attn_norm", True),
        )


def layer_parameters(shape: TransformerShape) -> tuple[int, ...]:
    """Of each layer."""
    d = shape.hidden
    attention = 4 * (d * d + d) + 2 * d
    layer = 2 * attention + (2 * d if shape.cross_norm else 0) + 2 * d * shape.ffn + shape.ffn + d + 6 * d
    return (layer,) * shape.layers


def transformer_parameters(shape: TransformerShape) -> int:
    d = shape.hidden
    front = shape.in_channels * shape.patch * d + d
    time = shape.freq_dim * d + d + d * d + d + d * 6 * d + 6 * d
    text = shape.text_dim * d + d + d * d + d
    back = d * shape.out_channels * shape.patch + shape.out_channels * shape.patch + 2 * d
    return front + time + text + sum(layer_parameters(shape)) + back


def transformer_cost(shape: TransformerShape, *, tokens: int, text_tokens: int, timesteps: int) -> TransformerCost:
    """One forward pass at batch 1; `timesteps` is 1, or the number of tokens where every token has its own (TI2V)."""
    d, s, t = shape.hidden, tokens, text_tokens
    embed = 2 * s * shape.in_channels * shape.patch * d
    time = 2 * timesteps * (shape.freq_dim * d + d * d + d * 6 * d)
    text = 2 * t * (shape.text_dim * d + d * d)
    layer = Operations(
        linear=2 * s * d * d * 6 + 2 * t * d * d * 2 + 2 * 2 * s * d * shape.ffn,
        attention=4 * s * s * d + 4 * s * t * d,
    )
    return TransformerCost(
        front=Operations(linear=embed + time + text),
        layers=(layer,) * shape.layers,
        back=Operations(linear=2 * s * d * shape.out_channels * shape.patch),
    )


def transformer_working_bytes(
    shape: TransformerShape, *, tokens: int, text_tokens: int, timesteps: int, element: int
) -> int:
    """Peak of one layer: either inside the feed-forward, or at its output, where the residual stream is added up in
    float32. Where every token has its own timestep, so has the modulation, which is then alive in both precisions."""
    row = tokens * shape.hidden
    feeding = (4 * row + 2 * tokens * shape.ffn) * element
    adding = 5 * row * element + 3 * row * 4
    beside = _beside(shape, tokens=tokens, text_tokens=text_tokens, timesteps=timesteps, element=element)
    return max(feeding, adding) + beside


def transformer_attending_bytes(
    shape: TransformerShape, *, tokens: int, text_tokens: int, timesteps: int, element: int
) -> int:
    """In a self-attention: the residual stream, its norm, q, k, v and the result."""
    beside = _beside(shape, tokens=tokens, text_tokens=text_tokens, timesteps=timesteps, element=element)
    return 6 * tokens * shape.hidden * element + beside


def _beside(shape: TransformerShape, *, tokens: int, text_tokens: int, timesteps: int, element: int) -> int:
    """What is there through all layers: modulation, angles of the positions, the text."""
    modulation = tokens * shape.hidden * (7 * element + 6 * 4) if timesteps > 1 else 0
    angles = 2 * tokens * (shape.hidden // shape.heads) * 4
    return modulation + angles + 2 * text_tokens * shape.hidden * element
