"""Operations, parameters and memory of Open-Sora-Plan's text encoder (mT5), from config values alone."""

from typing import Any

from pipedit.plan.costs import Operations


def _matrices(config: dict[str, Any]) -> int:
    """Weights of one layer's matrices; it has no biases."""
    d, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    gated = str(config.get("feed_forward_proj", "gated-gelu")).startswith("gated")
    return int(4 * d * inner + (2 + gated) * d * config["d_ff"])


def mt5_parameters(config: dict[str, Any]) -> int:
    """Parameters of `MT5EncoderModel`: one relative position bias serves all layers, unlike in UMT5."""
    d = config["d_model"]
    bias = config.get("relative_attention_num_buckets", 32) * config["num_heads"]
    return int(config["vocab_size"] * d + bias + config["num_layers"] * (_matrices(config) + 2 * d) + d)


def mt5_operations(config: dict[str, Any], tokens: int) -> Operations:
    """One prompt, padded to `tokens` tokens."""
    inner = config["num_heads"] * config["d_kv"]
    layer = Operations(linear=2 * tokens * _matrices(config), attention=4 * tokens * tokens * inner)
    return layer.times(config["num_layers"])


def mt5_working_bytes(config: dict[str, Any], *, tokens: int, element: int) -> int:
    """Peak of one layer: in its attention, which adds a bias for every pair of tokens, or in its feed-forward."""
    width = max(config["d_model"], config["num_heads"] * config["d_kv"])
    attention = 7 * tokens * width + 2 * config["num_heads"] * tokens * tokens
    return int(max(attention, tokens * (4 * config["d_ff"] + 4 * config["d_model"])) * element)
