"""Configs of published models as data, as far as sizes and costs depend on them: planning needs no file and no network.

Holds no weights and no tokenizer. Values are those of the config files in the models' diffusers folders.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipedit.core.errors import CheckpointError
from pipedit.models.checkpoint import Checkpoint, WeightFiles

Config = Mapping[str, Any]

_UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}
_UMT5_XXL = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 64,
    "num_layers": 24,
    "relative_attention_num_buckets": 32,
    "vocab_size": 256384,
}
_WAN_TRANSFORMER = {
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "freq_dim": 256,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "text_dim": 4096,
}
_WAN_1B = {**_WAN_TRANSFORMER, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
_WAN_14B = {**_WAN_TRANSFORMER, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_WAN_5B = {
    **_WAN_TRANSFORMER,
    "num_attention_heads": 24,
    "num_layers": 30,
    "ffn_dim": 14336,
    "in_channels": 48,
    "out_channels": 48,
}
_WAN_21_VAE = {
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
_WAN_22_VAE = {
    **_WAN_21_VAE,
    "base_dim": 160,
    "decoder_base_dim": 256,
    "in_channels": 12,
    "is_residual": True,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "z_dim": 48,
}
_LLAMA_3_8B = {
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128320,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
_HUNYUAN_VIDEO = {
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 16,
    "mlp_ratio": 4.0,
    "num_attention_heads": 24,
    "num_layers": 20,
    "num_refiner_layers": 2,
    "num_single_layers": 40,
    "out_channels": 16,
    "patch_size": 2,
    "patch_size_t": 1,
    "pooled_projection_dim": 768,
    "qk_norm": "rms_norm",
    "rope_axes_dim": [16, 56, 56],
    "text_embed_dim": 4096,
}
_HUNYUAN_VIDEO_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "out_channels": 3,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
}


def _wan(*experts: Config, vae: Config = _WAN_21_VAE, flow_shift: float = 3.0, **index: Any) -> dict[str, Config]:
    names = ("transformer", "transformer_2")[: len(experts)]
    transformers = dict(zip(names, experts, strict=True))
    classes = {name: ["diffusers", "WanTransformer3DModel"] for name in names}
    return {
        "model_index": {
            "_class_name": "WanPipeline",
            "scheduler": ["diffusers", "UniPCMultistepScheduler"],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", "T5TokenizerFast"],
            "vae": ["diffusers", "AutoencoderKLWan"],
            **classes,
            **index,
        },
        "scheduler": {**_UNIPC, "flow_shift": flow_shift},
        "text_encoder": _UMT5_XXL,
        **transformers,
        "vae": vae,
    }


PUBLISHED: Mapping[str, Mapping[str, Config]] = {
    "wan2.1-t2v-1.3b": _wan(_WAN_1B),
    "wan2.1-t2v-14b": _wan(_WAN_14B),
    "wan2.2-t2v-a14b": _wan(_WAN_14B, _WAN_14B, boundary_ratio=0.875),
    "wan2.2-ti2v-5b": _wan(_WAN_5B, vae=_WAN_22_VAE, flow_shift=5.0, expand_timesteps=True),
    "hunyuanvideo": {
        "model_index": {
            "_class_name": "HunyuanVideoPipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "LlamaModel"],
            "text_encoder_2": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "LlamaTokenizerFast"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
        },
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 7.0,
        },
        "text_encoder": _LLAMA_3_8B,
        "text_encoder_2": _CLIP_L,
        "transformer": _HUNYUAN_VIDEO,
        "vae": _HUNYUAN_VIDEO_VAE,
    },
}
"""Short name of the model -> component -> config; "model_index" is the pipeline itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedCheckpoint(Checkpoint):
    """A checkpoint of which only the configs are known. Raises CheckpointError where files are wanted."""

    configs: Mapping[str, Config] = dataclasses.field(repr=False, compare=False)

    @classmethod
    def of(cls, alias: str) -> "PublishedCheckpoint":
        """The configs of a key of `PUBLISHED`."""
        return cls(folder=Path(alias), name=alias, configs=PUBLISHED[alias])

    @functools.cached_property
    def index(self) -> dict[str, Any]:
        return dict(self.configs["model_index"])

    def config(self, component: str) -> dict[str, Any]:
        return dict(self.configs[component])

    def own_defaults(self) -> dict[str, Any]:
        return {}

    def path(self, component: str) -> Path:
        raise CheckpointError(f"{self.name} was opened for planning, without files; there is no {component} to read")

    def weights(self, component: str) -> WeightFiles:
        raise CheckpointError(
            f"{self.name} was opened for planning, without weights of its {component}; open the model itself"
        )
