"""Operations, parameters and memory of the Wan family, from config values alone. Tests hold them against the modules."""

import dataclasses
import math
from collections.abc import Iterator
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


def transformer_parameters(shape: TransformerShape) -> int:
    d = shape.hidden
    attention = 4 * (d * d + d) + 2 * d
    layer = 2 * attention + (2 * d if shape.cross_norm else 0) + 2 * d * shape.ffn + shape.ffn + d + 6 * d
    front = shape.in_channels * shape.patch * d + d
    time = shape.freq_dim * d + d + d * d + d + d * 6 * d + 6 * d
    text = shape.text_dim * d + d + d * d + d
    back = d * shape.out_channels * shape.patch + shape.out_channels * shape.patch + 2 * d
    return front + time + text + shape.layers * layer + back


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


def transformer_working_bytes(shape: TransformerShape, *, tokens: int, text_tokens: int, element: int) -> int:
    """Peak of one layer: residual stream in its own and in float32 precision, q, k, v, rotations, feed-forward."""
    stream = tokens * shape.hidden * (3 * 4 + 6 * element)
    feed_forward = 2 * tokens * shape.ffn * element
    return stream + feed_forward + 2 * text_tokens * shape.hidden * element


def umt5_parameters(config: dict[str, Any]) -> int:
    """Parameters of `UMT5EncoderModel` (every layer has its own relative position bias)."""
    d, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    gated = 2 if str(config.get("feed_forward_proj", "gated-gelu")).startswith("gated") else 1
    bias = config.get("relative_attention_num_buckets", 32) * config["num_heads"]
    layer = 4 * d * inner + bias + (gated + 1) * d * config["d_ff"] + 2 * d
    return config["vocab_size"] * d + config["num_layers"] * layer + d


def umt5_operations(config: dict[str, Any], tokens: int) -> Operations:
    d, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    gated = 2 if str(config.get("feed_forward_proj", "gated-gelu")).startswith("gated") else 1
    layer = 2 * tokens * (4 * d * inner + (gated + 1) * d * config["d_ff"])
    return Operations(linear=layer, attention=4 * tokens * tokens * inner).times(config["num_layers"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Convolution:
    """One convolution of the decoder. `space` and `time` are the scale of its output against the latents; `cached` is
    how many input frames it keeps between chunks; `later_only`: it does not run in the first chunk."""

    in_channels: int
    out_channels: int
    kernel: int
    space: int
    time: int
    cached: int = 0
    later_only: bool = False


def _residual_block(in_dim: int, out_dim: int, space: int, time: int) -> Iterator[_Convolution]:
    yield _Convolution(in_channels=in_dim, out_channels=out_dim, kernel=27, space=space, time=time, cached=2)
    yield _Convolution(in_channels=out_dim, out_channels=out_dim, kernel=27, space=space, time=time, cached=2)
    if in_dim != out_dim:
        yield _Convolution(in_channels=in_dim, out_channels=out_dim, kernel=1, space=space, time=time)


def _decoder_convolutions(config: dict[str, Any]) -> Iterator[_Convolution]:
    """Every convolution of `AutoencoderKLWan.decoder` in order, the mid block's 1x1 projections included."""
    base, mult = config.get("decoder_base_dim") or config["base_dim"], config["dim_mult"]
    residual, upsample = config.get("is_residual", False), list(config["temperal_downsample"])[::-1]
    dims = [base * m for m in [mult[-1], *mult[::-1]]]
    space, time = 1, 1
    yield _Convolution(in_channels=config["z_dim"], out_channels=dims[0], kernel=27, space=1, time=1, cached=2)
    yield from _residual_block(dims[0], dims[0], 1, 1)
    yield _Convolution(in_channels=dims[0], out_channels=4 * dims[0], kernel=1, space=1, time=1)
    yield from _residual_block(dims[0], dims[0], 1, 1)
    for level, (in_dim, out_dim) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
        current = in_dim // 2 if level > 0 and not residual else in_dim
        for _ in range(config["num_res_blocks"] + 1):
            yield from _residual_block(current, out_dim, space, time)
            current = out_dim
        if level == len(mult) - 1:
            break
        if upsample[level]:
            # the time convolution sees the frames before doubling and makes twice the channels
            yield _Convolution(
                in_channels=out_dim, out_channels=2 * out_dim, kernel=3, space=space, time=time, cached=2,
                later_only=True,
            )  # fmt: skip
            time *= 2
        space *= 2
        narrow = out_dim if residual else out_dim // 2
        yield _Convolution(in_channels=out_dim, out_channels=narrow, kernel=9, space=space, time=time)
    yield _Convolution(
        in_channels=dims[-1], out_channels=config.get("out_channels", 3), kernel=27, space=space, time=time, cached=2
    )


def decode_operations(config: dict[str, Any], *, rows: int, columns: int, first: bool) -> Operations:
    """Decoding one latent frame of `rows` x `columns` positions; the first frame gives one frame, later ones four."""
    total = 2 * rows * columns * config["z_dim"] ** 2  # post_quant_conv
    for c in _decoder_convolutions(config):
        if not (first and c.later_only):
            time = 1 if first else c.time
            total += 2 * c.in_channels * c.out_channels * c.kernel * rows * columns * c.space**2 * time
    mid = (config.get("decoder_base_dim") or config["base_dim"]) * config["dim_mult"][-1]
    return Operations(convolution=total, attention=4 * (rows * columns) ** 2 * mid)


def decoder_parameters(config: dict[str, Any]) -> int:
    """Parameters of the decoder and `post_quant_conv`, all that text-to-video loads."""
    total = config["z_dim"] ** 2 + config["z_dim"]
    norms = 0
    for c in _decoder_convolutions(config):
        total += c.in_channels * c.out_channels * c.kernel + c.out_channels
        if c.kernel == 27 and c.cached:
            norms += c.in_channels  # one norm before each 3x3x3 convolution but the first; the mid block adds one
    mid = (config.get("decoder_base_dim") or config["base_dim"]) * config["dim_mult"][-1]
    return total + norms - config["z_dim"] + mid


def decode_working_bytes(config: dict[str, Any], *, rows: int, columns: int, element: int) -> int:
    """Feature cache plus the widest convolution's input, padded copy and output, for one chunk."""
    area = rows * columns
    cache = widest = 0
    for c in _decoder_convolutions(config):
        pixels = area * c.space**2
        cache += c.cached * c.in_channels * pixels * element
        frames = c.time + 2
        widest = max(widest, (3 * c.in_channels + 2 * c.out_channels) * frames * pixels * element)
    return cache + widest
