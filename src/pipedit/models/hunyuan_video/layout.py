"""Where things are in a HunyuanVideo checkpoint: configs, factors, shapes, layers. Read by adapter and stages."""

from pipedit.core.rotation import TemporalRotation
from pipedit.models.adapter import LayerSplit
from pipedit.models.config_needs import ConfigNeeds
from pipedit.models.layout import Layout

CONFIG_NEEDS = {
    "transformer": ConfigNeeds(
        integers=(
            "attention_head_dim",
            "in_channels",
            "num_attention_heads",
            "num_layers",
            "num_refiner_layers",
            "num_single_layers",
            "pooled_projection_dim",
            "text_embed_dim",
        ),
        optional_integers=("out_channels", "patch_size", "patch_size_t"),
        optional_numbers=("mlp_ratio",),
    ),
    "text_encoder": ConfigNeeds(
        integers=("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
        optional_integers=("head_dim", "num_key_value_heads"),
    ),
    "text_encoder_2": ConfigNeeds(
        integers=("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
        optional_integers=("max_position_embeddings",),
    ),
    "vae": ConfigNeeds(
        optional_integers=(
            "latent_channels",
            "layers_per_block",
            "out_channels",
            "spatial_compression_ratio",
            "temporal_compression_ratio",
        ),
        optional_lists=("block_out_channels",),
    ),
}


class HunyuanVideoLayout(Layout):
    @property
    def temporal_factor(self) -> int:
        return int(self.vae_config.get("temporal_compression_ratio", 4))

    @property
    def spatial_factor(self) -> int:
        return int(self.vae_config.get("spatial_compression_ratio", 8))

    @property
    def patch(self) -> tuple[int, int, int]:
        config = self.transformer_config
        side = int(config.get("patch_size", 2))
        return int(config.get("patch_size_t", 1)), side, side

    @property
    def temporal_rotation(self) -> TemporalRotation:
        config = self.transformer_config
        return TemporalRotation(
            channels=config.get("rope_axes_dim", (16, 56, 56))[0], theta=config.get("rope_theta", 256.0)
        )

    def layer_split(self) -> LayerSplit:
        """Double-stream layers, then single-stream ones, counted through. Every layer needs time, guidance and the
        pooled text; the text itself comes refined out of the front and goes from layer to layer with the latents."""
        config = self.transformer_config
        double = (f"transformer_blocks.{layer}" for layer in range(config["num_layers"]))
        single = (f"single_transformer_blocks.{layer}" for layer in range(config["num_single_layers"]))
        return LayerSplit(
            front=("x_embedder", "context_embedder"),
            layers=(*double, *single),
            back=("norm_out", "proj_out"),
            everywhere=("time_text_embed",),
        )
