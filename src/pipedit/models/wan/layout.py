"""Where things are in a Wan checkpoint: configs, factors, shapes, layers. Read by the adapter and by its stages."""

from pipedit.core.rotation import TemporalRotation
from pipedit.models.adapter import LayerSplit
from pipedit.models.config_needs import ConfigNeeds
from pipedit.models.layout import Layout

TRANSFORMER_NEEDS = ConfigNeeds(
    integers=(
        "attention_head_dim",
        "ffn_dim",
        "freq_dim",
        "in_channels",
        "num_attention_heads",
        "num_layers",
        "text_dim",
    ),
    optional_integers=("out_channels", "rope_max_seq_len"),
    optional_lists=("patch_size",),
)
CONFIG_NEEDS = {
    "transformer": TRANSFORMER_NEEDS,
    "text_encoder": ConfigNeeds(
        integers=("d_ff", "d_kv", "d_model", "num_heads", "num_layers", "vocab_size"),
        optional_integers=("relative_attention_num_buckets",),
    ),
    "vae": ConfigNeeds(
        integers=("num_res_blocks", "z_dim"),
        lists=("dim_mult", "temperal_downsample"),
        optional_integers=(
            "base_dim",
            "decoder_base_dim",
            "out_channels",
            "patch_size",
            "scale_factor_spatial",
            "scale_factor_temporal",
        ),
    ),
}


class WanLayout(Layout):
    @property
    def has_two_experts(self) -> bool:
        return self.checkpoint.has("transformer_2") and self.checkpoint.index.get("boundary_ratio") is not None

    @property
    def boundary_ratio(self) -> float | None:
        ratio = self.checkpoint.index.get("boundary_ratio")
        return None if ratio is None else float(ratio)

    @property
    def expands_timesteps(self) -> bool:
        """Wan 2.2 TI2V: every token carries its own timestep."""
        return bool(self.checkpoint.index.get("expand_timesteps", False))

    @property
    def temporal_factor(self) -> int:
        return int(self.vae_config.get("scale_factor_temporal", 4))

    @property
    def spatial_factor(self) -> int:
        return int(self.vae_config.get("scale_factor_spatial", 8))

    @property
    def patch(self) -> tuple[int, int, int]:
        frames, rows, columns = self.transformer_config.get("patch_size", (1, 2, 2))
        return frames, rows, columns

    @property
    def temporal_rotation(self) -> TemporalRotation:
        """What is left of a head when rows and columns have taken a third each, rounded down to pairs."""
        width = self.transformer_config["attention_head_dim"]
        return TemporalRotation(channels=width - 2 * 2 * (width // 6), theta=10000.0)

    def layer_split(self) -> LayerSplit:
        """Every layer needs the time, and the text for cross-attention."""
        return LayerSplit(
            front=("patch_embedding",),
            layers=tuple(f"blocks.{layer}" for layer in range(self.transformer_config["num_layers"])),
            back=("proj_out", "scale_shift_table"),
            everywhere=("condition_embedder",),
        )
