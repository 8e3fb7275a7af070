"""Operations, parameters and memory of HunyuanVideo's two text encoders, from config values alone."""

from typing import Any

from pipedit.models.hunyuan_video.prompt import SKIPPED_LAYERS
from pipedit.plan.costs import Operations


def _llama_matrices(config: dict[str, Any]) -> int:
    """Weights of one layer's matrices; it has no biases."""
    d, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or d // heads
    keys = (config.get("num_key_value_heads") or heads) * head_dim
    return int(2 * d * heads * head_dim + 2 * d * keys + 3 * d * config["intermediate_size"])


def llama_parameters(config: dict[str, Any]) -> int:
    """Parameters of `LlamaModel` as far as it is loaded: without its last layers and final norm."""
    d, layers = config["hidden_size"], config["num_hidden_layers"] - SKIPPED_LAYERS
    return int(config["vocab_size"] * d + layers * (_llama_matrices(config) + 2 * d))


def llama_operations(config: dict[str, Any], tokens: int) -> Operations:
    """One prompt of `tokens` tokens, those of the cropped frame included. The causal half is counted whole."""
    heads = config["num_attention_heads"]
    inner = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    layer = Operations(linear=2 * tokens * _llama_matrices(config), attention=4 * tokens * tokens * inner)
    return layer.times(config["num_hidden_layers"] - SKIPPED_LAYERS)


def llama_working_bytes(config: dict[str, Any], *, tokens: int, element: int) -> int:
    return int(tokens * (3 * config["intermediate_size"] + 6 * config["hidden_size"]) * element)


def clip_parameters(config: dict[str, Any]) -> int:
    """Parameters of `CLIPTextModel`."""
    d, ffn = config["hidden_size"], config["intermediate_size"]
    layer = 4 * (d * d + d) + 2 * d * ffn + ffn + d + 4 * d
    embeddings = (config["vocab_size"] + config.get("max_position_embeddings", 77)) * d
    return int(embeddings + config["num_hidden_layers"] * layer + 2 * d)


def clip_operations(config: dict[str, Any], tokens: int) -> Operations:
    d, ffn = config["hidden_size"], config["intermediate_size"]
    layer = Operations(linear=2 * tokens * (4 * d * d + 2 * d * ffn), attention=4 * tokens * tokens * d)
    return layer.times(config["num_hidden_layers"])


def clip_working_bytes(config: dict[str, Any], *, tokens: int, element: int) -> int:
    return int(tokens * (3 * config["intermediate_size"] + 6 * config["hidden_size"]) * element)
