"""What the Wan family declares. Torch-free; stages that hold weights are in text.py, denoise.py, decode.py."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from pipedit.core.request import RequestDefaults, VideoRequest
from pipedit.models.adapter import (
    AttentionSite,
    BlockStage,
    DecodeStage,
    DenoiseStage,
    LayerSplit,
    ModelAdapter,
    Precision,
    QueryKeyNorm,
    SizeRules,
    TextStage,
    TokenLayout,
)
from pipedit.models.checkpoint import MODEL_INDEX, Checkpoint
from pipedit.models.config_needs import ConfigNeeds, is_number
from pipedit.models.wan import text_costs, transformer_costs, vae_costs
from pipedit.models.wan.layout import CONFIG_NEEDS, TRANSFORMER_NEEDS, WanLayout
from pipedit.plan.costs import PartBytes, RequestCost, SharedAttention
from pipedit.plan.precision import element_bytes


class WanAdapter(ModelAdapter):
    """Wan in diffusers format: one `transformer`, or two experts that a noise boundary separates."""

    family: ClassVar[str] = "wan"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("WanPipeline",)

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.layout = WanLayout(checkpoint)

    @property
    def published_defaults(self) -> RequestDefaults:
        if self.layout.expands_timesteps:
            return RequestDefaults(
                height=704, width=1280, num_frames=121, fps=24, num_inference_steps=50, guidance_scale=5.0,
                max_sequence_length=512,
            )  # fmt: skip
        two = self.layout.has_two_experts
        return RequestDefaults(
            height=480, width=832, num_frames=81, fps=16, num_inference_steps=40 if two else 50,
            guidance_scale=4.0 if two else 5.0, guidance_scale_2=3.0 if two else None, max_sequence_length=512,
        )  # fmt: skip

    @property
    def size_rules(self) -> SizeRules:
        return SizeRules(
            frame_step=self.layout.temporal_factor, size_multiple=self.layout.spatial_factor * self.layout.patch[1]
        )

    def complete(self, request: VideoRequest) -> VideoRequest:
        """Both experts follow a guidance scale that is asked for alone, as in diffusers."""
        if self.layout.has_two_experts and request.guidance_scale_2 is None:
            request = dataclasses.replace(request, guidance_scale_2=request.guidance_scale)
        return super().complete(request)

    def config_needs(self) -> Mapping[str, ConfigNeeds]:
        second = {"transformer_2": TRANSFORMER_NEEDS} if self.layout.has_two_experts else {}
        return {**CONFIG_NEEDS, **second}

    def config_problems(self) -> list[str]:
        problems, ratio = super().config_problems(), self.checkpoint.index.get("boundary_ratio")
        if ratio is not None and not (is_number(ratio) and 0 <= ratio <= 1):
            problems.append(f"{self.checkpoint.name}: boundary_ratio={ratio!r} in {MODEL_INDEX} is not between 0 and 1")
        if ratio is not None and not self.checkpoint.has("transformer_2"):
            problems.append(
                f"{self.checkpoint.name} sets boundary_ratio, so it needs two experts, but {MODEL_INDEX} names no "
                "transformer_2: the model is incomplete"
            )
        return problems

    def extra_problems(self, request: VideoRequest) -> list[str]:
        problems = []
        if request.guidance_scale_2 is not None and not self.layout.has_two_experts:
            problems.append("guidance_scale_2 is only for models with two experts (Wan 2.2 A14B); leave it out")
        if request.true_cfg_scale is not None:
            problems.append("true_cfg_scale is only for HunyuanVideo; Wan's guidance is guidance_scale")
        scale, negative = request.guidance_scale, request.negative_prompt
        if negative and negative != self.defaults.negative_prompt and scale is not None and scale <= 1:
            problems.append(
                "negative_prompt has no effect without guidance_scale above 1 (which doubles the time); "
                "set it or leave negative_prompt out"
            )
        return problems + self._position_problems(request)

    def _position_problems(self, request: VideoRequest) -> list[str]:
        """The rotary embedding holds a fixed number of positions along each axis."""
        positions = int(self.layout.transformer_config.get("rope_max_seq_len", 1024))
        patch = self.layout.patch
        most_frames = (positions * patch[0] - 1) * self.layout.temporal_factor + 1
        problems = []
        if request.num_frames is not None and request.num_frames > most_frames:
            problems.append(f"num_frames={request.num_frames} is more than this model has positions for: {most_frames}")
        for name, size in (("height", patch[1]), ("width", patch[2])):
            pixels, most = getattr(request, name), positions * size * self.layout.spatial_factor
            if pixels is not None and pixels > most:
                problems.append(f"{name}={pixels} is more than this model has positions for: {most}")
        return problems

    def clean_prompt(self, prompt: str) -> str:
        from pipedit.models.wan.prompt import clean

        return clean(prompt)

    def weighted_components(self) -> Sequence[str]:
        return ("text_encoder", "transformer", *(("transformer_2",) if self.layout.has_two_experts else ()), "vae")

    def default_precision(self, device_type: str) -> Precision:
        if device_type == "cpu":
            return Precision(text_encoder="float32", transformer="float32", vae="float32")
        return Precision(text_encoder="bfloat16", transformer="bfloat16", vae="float32")

    def latent_shape(self, request: VideoRequest) -> tuple[int, int, int, int, int]:
        return self.layout.latent_shape(request)

    def token_layout(self, request: VideoRequest) -> TokenLayout:
        assert request.max_sequence_length
        _, _, frames, rows, columns = self.latent_shape(request)
        patch = self.layout.patch
        return TokenLayout(
            latent_frames=frames // patch[0],
            rows=rows // patch[1],
            columns=columns // patch[2],
            text_tokens=request.max_sequence_length,
            text_is_joint=False,
            text_is_masked=False,
        )

    def attention_sites(self) -> Sequence[AttentionSite]:
        config = self.layout.transformer_config
        return [
            AttentionSite(
                path=f"blocks.{layer}.attn1",
                layer=layer,
                heads=config["num_attention_heads"],
                head_dim=config["attention_head_dim"],
                query_key_norm=QueryKeyNorm.ALL_HEADS,
                joint_text=False,
            )
            for layer in range(config["num_layers"])
        ]

    def layer_split(self) -> LayerSplit:
        return self.layout.layer_split()

    def num_ready_chunks(self, latent_frames: int, *, is_complete: bool, decoders: int = 1) -> int:
        """One a latent frame, which waits for no other; ranks share its rows."""
        return latent_frames

    def uses_guidance(self, request: VideoRequest) -> bool:
        """Classifier-free guidance doubles the forwards; diffusers decides by the first scale alone, and so do we."""
        assert request.guidance_scale is not None
        return request.guidance_scale > 1.0

    def cost(
        self, request: VideoRequest, precision: Precision, *, tiling: bool = False, decoders: int = 1
    ) -> RequestCost:
        layout, forwards = self.token_layout(request), 2 if self.uses_guidance(request) else 1
        _, channels, frames, rows, columns = self.latent_shape(request)
        forward = transformer_costs.transformer_cost(
            transformer_costs.TransformerShape.from_config(self.layout.transformer_config),
            tokens=layout.latent_tokens,
            text_tokens=layout.text_tokens,
            timesteps=layout.latent_tokens if self.layout.expands_timesteps else 1,
        )
        encode = text_costs.umt5_operations(self.checkpoint.config("text_encoder"), layout.text_tokens)
        first, later = (
            vae_costs.decode_operations(self.layout.vae_config, rows=rows, columns=columns, first=first, tiling=tiling)
            for first in (True, False)
        )
        return RequestCost(
            num_steps=request.num_inference_steps or 1,
            num_chunks=frames,
            forwards_per_step=forwards,
            latent_tokens=layout.latent_tokens,
            text_tokens=layout.text_tokens,
            latent_bytes=4 * channels * frames * rows * columns * 4,  # latents and the noise scheduler's history
            encode=encode.times(forwards),
            forward=forward,
            decode_first_chunk=first,
            decode_chunk=later,
            parts=self._parts(layout, precision, rows, columns, tiling=tiling, decoders=decoders),
            attention=self._shared_attention(layout.latent_tokens, precision),
        )

    def _shared_attention(self, tokens: int, precision: Precision) -> SharedAttention:
        sites = self.attention_sites()
        hidden = sites[0].heads * sites[0].head_dim
        return SharedAttention(
            sites=len(sites),
            heads=sites[0].heads,
            head_dim=sites[0].head_dim,
            operations=len(sites) * 4 * tokens**2 * hidden,
            projections=len(sites) * 2 * tokens * 3 * hidden**2,
            element=element_bytes(precision.transformer),
        )

    def _parts(
        self, layout: TokenLayout, precision: Precision, rows: int, columns: int, *, tiling: bool, decoders: int
    ) -> dict[str, PartBytes]:
        shape = transformer_costs.TransformerShape.from_config(self.layout.transformer_config)
        text_config, text = self.checkpoint.config("text_encoder"), element_bytes(precision.text_encoder)
        element, vae = element_bytes(precision.transformer), element_bytes(precision.vae)
        tokens, text_tokens = layout.latent_tokens, layout.text_tokens
        sizes = {
            "tokens": tokens,
            "text_tokens": text_tokens,
            "timesteps": tokens if self.layout.expands_timesteps else 1,
            "element": element,
        }
        expert = PartBytes(
            weights=transformer_costs.transformer_parameters(shape) * element,
            layers=tuple(count * element for count in transformer_costs.layer_parameters(shape)),
            working=transformer_costs.transformer_working_bytes(shape, **sizes),
            attending=transformer_costs.transformer_attending_bytes(shape, **sizes),
        )
        return {
            "text_encoder": PartBytes(
                weights=text_costs.umt5_parameters(text_config) * text,
                working=text_costs.umt5_working_bytes(text_config, tokens=text_tokens, element=text),
            ),
            "transformer": expert,
            **({"transformer_2": expert} if self.layout.has_two_experts else {}),
            "vae": PartBytes(
                weights=vae_costs.decoder_parameters(self.layout.vae_config) * vae,
                working=vae_costs.decode_working_bytes(
                    self.layout.vae_config,
                    rows=rows,
                    columns=columns,
                    element=vae,
                    tiling=tiling,
                    decoders=decoders,
                ),
            ),
        }

    def load_text_stage(self, device: str, precision: Precision) -> TextStage:
        from pipedit.models.wan.text import WanTextStage

        return WanTextStage.load(self.checkpoint, device, precision)

    def load_denoise_stage(self, device: str, precision: Precision, layers: range | None = None) -> DenoiseStage:
        from pipedit.models.wan.denoise import WanDenoiseStage

        return WanDenoiseStage.load(self.layout, device, precision, layers)

    def load_block_stage(self, device: str, precision: Precision, layers: range) -> BlockStage:
        from pipedit.models.wan.block_stage import WanBlockStage

        return WanBlockStage.load(self.layout, device, precision, layers)

    def load_decode_stage(self, device: str, precision: Precision, *, tiling: bool = False) -> DecodeStage:
        from pipedit.models.wan.decode import WanDecodeStage

        return WanDecodeStage.load(self.layout, device, precision, tiling=tiling)
