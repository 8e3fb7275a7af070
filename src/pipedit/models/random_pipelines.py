"""Random-weight pipelines built offline: sizes, tokenizers, weights, saving. For tests and for benchmarks.

A size is a frozen config (data only); `randomise` and `build` work for any size, published ones included: random
weights at the true sizes give true timings. Knows no adapter.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import decoders, pre_tokenizers, processors, trainers

from pipedit.models.published_configs import PUBLISHED

Arguments = Mapping[str, Any]  # constructor arguments of one part

# -- sizes --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanSizes:
    """A Wan pipeline. `boundary_ratio` brings the second expert. `contrast` scales the VAE's last convolution so that
    random pixels spread over the range instead of sticking to its ends."""

    transformer: Arguments
    vae: Arguments
    text_encoder: Arguments
    flow_shift: float
    boundary_ratio: float | None = None
    expand_timesteps: bool = False
    contrast: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HunyuanSizes:
    """A HunyuanVideo pipeline: Llama and CLIP text encoders."""

    transformer: Arguments
    vae: Arguments
    text_encoder: Arguments
    text_encoder_2: Arguments
    flow_shift: float
    contrast: float = 1.0


_UMT5_TINY = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_WAN_TINY = {
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "rope_max_seq_len": 64,
}
_WAN_VAE_TINY = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
_WAN_VAE_RESIDUAL = {
    "decoder_base_dim": 4,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [round(0.5 * math.sin(channel), 4) for channel in range(48)],
    "latents_std": [round(1.0 + 0.5 * math.cos(channel), 4) for channel in range(48)],
}

SIZES: Mapping[str, WanSizes | HunyuanSizes] = {
    "wan": WanSizes(transformer=_WAN_TINY, vae=_WAN_VAE_TINY, text_encoder=_UMT5_TINY, flow_shift=3.0),
    "wan22": WanSizes(
        transformer=_WAN_TINY, vae=_WAN_VAE_TINY, text_encoder=_UMT5_TINY, flow_shift=3.0, boundary_ratio=0.875
    ),
    "wan_ti2v": WanSizes(
        transformer=_WAN_TINY | {"in_channels": 48, "out_channels": 48},
        vae=_WAN_VAE_TINY | _WAN_VAE_RESIDUAL,
        text_encoder=_UMT5_TINY,
        flow_shift=5.0,
        expand_timesteps=True,
        contrast=0.6,
    ),
    "hunyuan": HunyuanSizes(
        transformer={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "pooled_projection_dim": 16,
            "rope_axes_dim": (4, 4, 4),
        },
        vae={
            "latent_channels": 4,
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
        text_encoder={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        text_encoder_2={
            "hidden_size": 16,
            "intermediate_size": 32,
            "projection_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        flow_shift=7.0,
        contrast=0.7,
    ),
    # For benchmarks: large enough that arithmetic and not Python dominates, small enough for a laptop.
    "wan_mid": WanSizes(
        transformer={
            "num_layers": 16,
            "num_attention_heads": 8,
            "attention_head_dim": 32,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 128,
            "freq_dim": 128,
            "ffn_dim": 1024,
        },
        vae={"base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1},
        text_encoder={"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 4, "num_heads": 4},
        flow_shift=3.0,
        contrast=0.5,
    ),
}

# Enough of a text encoder for HunyuanVideo, which takes the third hidden state from the end.
_TEXT_LAYERS = 4


def sizes_of(kind: str) -> WanSizes | HunyuanSizes:
    """The sizes of a key of `SIZES`, or of a published model by its short name.

    Of published models the text encoder is cut to a few layers: its time is a small part of a request, its weights are
    half of the disk.
    """
    if kind in SIZES:
        return SIZES[kind]
    configs = PUBLISHED[kind]
    index, scheduler = configs["model_index"], configs["scheduler"]
    if index["_class_name"] == "HunyuanVideoPipeline":
        text = {**configs["text_encoder"], "num_hidden_layers": _TEXT_LAYERS}
        return HunyuanSizes(
            transformer=configs["transformer"],
            vae=configs["vae"],
            text_encoder=text,
            text_encoder_2=configs["text_encoder_2"],
            flow_shift=scheduler["shift"],
        )
    text = {**configs["text_encoder"], "num_layers": _TEXT_LAYERS}
    vae = configs["vae"]
    statistics = {name: _WAN_VAE_RESIDUAL[name] for name in ("latents_mean", "latents_std")}
    return WanSizes(
        transformer=configs["transformer"],
        vae={**vae, **statistics} if vae["z_dim"] == 48 else vae,
        text_encoder=text,
        flow_shift=scheduler["flow_shift"],
        boundary_ratio=index.get("boundary_ratio"),
        expand_timesteps=index.get("expand_timesteps", False),
    )


# -- tokenizers ---------------------------------------------------------------------------------------------------

_SENTENCES = (
    "a red ball moves to the right on a black background",
    "a blue square stands still in the middle of the video",
    "two green triangles and a yellow circle grow slowly while the camera turns left",
)
_PRINTABLE = [chr(code) for code in range(33, 127)]
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<pad>",
)


def umt5_tokenizer() -> Any:
    """Unigram with <pad> 0, </s> 1, <unk> 2: the words of a few sentences, single characters for all else."""
    words = sorted({word for sentence in _SENTENCES for word in sentence.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -30.0)]
    pieces += [("▁" + word, -3.0) for word in words if len(word) > 1]
    pieces += [(character, -10.0) for character in ["▁", *_PRINTABLE]]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def llama3_tokenizer() -> Any:
    """Byte-level BPE on the filled default prompt template, whose prefix then has exactly `crop_start` tokens, one a
    word, as with the real Llama 3. Not LlamaTokenizerFast: that class ignores byte-level rules."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        show_progress=False,
        special_tokens=list(_LLAMA3_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([DEFAULT_PROMPT_TEMPLATE["template"].format(text) for text in _SENTENCES], trainer)
    first = _LLAMA3_SPECIAL[0]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, backend.token_to_id(first))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=first, eos_token="<|end_of_text|>", pad_token="<pad>", padding_side="right"
    )


def clip_tokenizer() -> Any:
    """CLIP's byte-level BPE with hardly any merges: one token a letter. Padded with the end token to 77."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("b", "a"), ("l", "l</w>"), ("re", "d</w>"), ("ba", "ll</w>")]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=merges, model_max_length=77
    )


# -- weights ------------------------------------------------------------------------------------------------------


def randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter anew. Default zeros and ones would hide a dropped bias, gate or norm.

    Norm weights 1 + 0.1 randn, biases and tables 0.1 randn, matrices randn / sqrt(fan-in).
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight")):
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith("table") or parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))


def _wan_parts(sizes: WanSizes) -> dict[str, Any]:
    tokenizer = umt5_tokenizer()
    text_config = transformers.UMT5Config(
        **{"feed_forward_proj": "gated-gelu", **sizes.text_encoder, "vocab_size": len(tokenizer), "dropout_rate": 0.0}
    )
    two_experts = sizes.boundary_ratio is not None
    return {
        "tokenizer": tokenizer,
        "text_encoder": transformers.UMT5EncoderModel(text_config),
        "vae": diffusers.AutoencoderKLWan(**sizes.vae),
        "transformer": diffusers.WanTransformer3DModel(**sizes.transformer),
        "transformer_2": diffusers.WanTransformer3DModel(**sizes.transformer) if two_experts else None,
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=sizes.flow_shift
        ),
    }


def _hunyuan_parts(sizes: HunyuanSizes) -> dict[str, Any]:
    tokenizer, tokenizer_2 = llama3_tokenizer(), clip_tokenizer()
    llama_config = transformers.LlamaConfig(
        **_without_vocabulary(sizes.text_encoder),
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    clip_config = transformers.CLIPTextConfig(
        **_without_vocabulary(sizes.text_encoder_2),
        vocab_size=len(tokenizer_2),
        bos_token_id=tokenizer_2.bos_token_id,
        eos_token_id=tokenizer_2.eos_token_id,  # pooling looks for it
        pad_token_id=tokenizer_2.pad_token_id,
    )
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": transformers.LlamaModel(llama_config),
        "text_encoder_2": transformers.CLIPTextModel(clip_config),
        "vae": diffusers.AutoencoderKLHunyuanVideo(**sizes.vae),
        "transformer": diffusers.HunyuanVideoTransformer3DModel(**sizes.transformer),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=sizes.flow_shift),
    }


# -- saving -------------------------------------------------------------------------------------------------------


def build(kind: str, folder: Path, *, max_shard_size: str | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Writes the pipeline `kind` (see `sizes_of`) as an ordinary diffusers folder; the same bytes every time.

    `max_shard_size`, such as "100KB", splits the weights of every larger part into shards with an index. The whole
    pipeline is in host memory once, in `dtype`.
    """
    sizes = sizes_of(kind)
    with init_empty_weights():  # default initialisation of a 13B model would take minutes, for nothing
        parts = _wan_parts(sizes) if isinstance(sizes, WanSizes) else _hunyuan_parts(sizes)
    if isinstance(sizes, WanSizes):
        options = {"boundary_ratio": sizes.boundary_ratio, "expand_timesteps": sizes.expand_timesteps}
        pipeline = diffusers.WanPipeline(**parts, **options)
        published_tokenizer = "T5TokenizerFast"
    else:
        pipeline = diffusers.HunyuanVideoPipeline(**parts)
        published_tokenizer = "LlamaTokenizerFast"
    generator = torch.Generator("cpu").manual_seed(0)
    for name in sorted(parts):
        if isinstance(parts[name], torch.nn.Module):
            _materialise(parts[name], dtype)
            randomise(parts[name], generator)
    last = parts["vae"].decoder.conv_out
    with torch.no_grad():
        getattr(last, "conv", last).weight.mul_(sizes.contrast)  # HunyuanVideo wraps a plain convolution
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    _name_tokenizer_class(folder, published_tokenizer)


def _materialise(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Gives memory to parameters that have none. Tied ones are tied again."""
    for name, parameter in list(module.named_parameters()):
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path)._parameters[leaf] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
    if isinstance(module, transformers.PreTrainedModel):
        module.tie_weights()


def _without_vocabulary(config: Arguments) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "vocab_size"}


def _name_tokenizer_class(folder: Path, name: str) -> None:
    """Names the class that published checkpoints name, so that loaders meet the same traps here."""
    index_path, config_path = folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"
    index, config = json.loads(index_path.read_text()), json.loads(config_path.read_text())
    index["tokenizer"] = ["transformers", name]
    config["tokenizer_class"] = name.removesuffix("Fast")
    index_path.write_text(json.dumps(index, indent=2) + "\n")
    config_path.write_text(json.dumps(config, indent=2) + "\n")
