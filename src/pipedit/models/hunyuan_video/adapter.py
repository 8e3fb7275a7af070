"""What the HunyuanVideo family declares. Torch-free; stages that hold weights are in text.py, denoise.py, decode.py."""

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
    PromptFrame,
    QueryKeyNorm,
    SizeRules,
    TextStage,
    TokenLayout,
)
from pipedit.models.checkpoint import Checkpoint
from pipedit.models.config_needs import ConfigNeeds
from pipedit.models.hunyuan_video import text_costs, transformer_costs, vae_costs
from pipedit.models.hunyuan_video.layout import CONFIG_NEEDS, HunyuanVideoLayout
from pipedit.models.hunyuan_video.prompt import CLIP_TOKENS, PROMPT_FRAME
from pipedit.models.hunyuan_video.tiles import kinds_of_tile, num_ready_rounds
from pipedit.plan.costs import PartBytes, RequestCost, SharedAttention
from pipedit.plan.precision import element_bytes


class HunyuanVideoAdapter(ModelAdapter):
    """HunyuanVideo text to video in diffusers format."""

    family: ClassVar[str] = "hunyuan_video"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("HunyuanVideoPipeline",)
    prompt_frame: ClassVar[PromptFrame] = PROMPT_FRAME
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.layout = HunyuanVideoLayout(checkpoint)

    @property
    def published_defaults(self) -> RequestDefaults:
        # 24 fps is what the original code writes (diffusers' example exports at 15); flow_shift stays the checkpoint's.
        return RequestDefaults(
            height=720, width=1280, num_frames=129, fps=24, num_inference_steps=50, guidance_scale=6.0,
            true_cfg_scale=1.0, max_sequence_length=256,
        )  # fmt: skip

    @property
    def size_rules(self) -> SizeRules:
        return SizeRules(
            frame_step=self.layout.temporal_factor, size_multiple=self.layout.spatial_factor * self.layout.patch[1]
        )

    def extra_problems(self, request: VideoRequest) -> list[str]:
        problems = []
        kind = self.layout.transformer_config.get("image_condition_type")
        if kind is not None:
            problems.append(
                f"{self.checkpoint.name} makes videos from an image ({kind}), which is not supported; "
                "use a text-to-video checkpoint"
            )
        if request.guidance_scale_2 is not None:
            problems.append("guidance_scale_2 is only for models with two experts (Wan 2.2 A14B); leave it out")
        return [*problems, *self._guidance_problems(request)]

    def _guidance_problems(self, request: VideoRequest) -> list[str]:
        problems, scale = [], request.true_cfg_scale
        if scale is not None:
            if scale > 1 and request.negative_prompt is None:
                problems.append(
                    f"true_cfg_scale={scale} guides away from a negative prompt, and there is none; "
                    "give negative_prompt (it may be empty) or leave true_cfg_scale out"
                )
            if scale <= 1 and request.negative_prompt is not None:
                problems.append(
                    "negative_prompt has no effect without true_cfg_scale above 1 (which doubles the time); "
                    "set it or leave negative_prompt out"
                )
        chosen = request.guidance_scale not in (None, self.defaults.guidance_scale)
        if chosen and not self.layout.transformer_config.get("guidance_embeds", True):
            problems.append(
                f"guidance_scale={request.guidance_scale} has no effect: this checkpoint has no guidance embedding; "
                "use true_cfg_scale with a negative prompt"
            )
        return problems

    def config_needs(self) -> Mapping[str, ConfigNeeds]:
        return CONFIG_NEEDS

    def weighted_components(self) -> Sequence[str]:
        return ("text_encoder", "text_encoder_2", "transformer", "vae")

    def default_precision(self, device_type: str) -> Precision:
        """On a GPU as the original code runs it: text encoders and VAE in float16, the transformer in bfloat16."""
        if device_type == "cpu":
            return Precision(text_encoder="float32", transformer="float32", vae="float32")
        return Precision(text_encoder="float16", transformer="bfloat16", vae="float16")

    def latent_shape(self, request: VideoRequest) -> tuple[int, int, int, int, int]:
        return self.layout.latent_shape(request)

    def token_layout(self, request: VideoRequest) -> TokenLayout:
        """`text_tokens` is the most that a prompt can have; the padding is never computed (see text.py)."""
        assert request.max_sequence_length
        _, _, frames, rows, columns = self.latent_shape(request)
        patch = self.layout.patch
        return TokenLayout(
            latent_frames=frames // patch[0],
            rows=rows // patch[1],
            columns=columns // patch[2],
            text_tokens=request.max_sequence_length,
            text_is_joint=True,
            text_is_masked=True,
        )

    def attention_sites(self) -> Sequence[AttentionSite]:
        config = self.layout.transformer_config
        return [
            AttentionSite(
                path=f"{layer}.attn",
                layer=number,
                heads=config["num_attention_heads"],
                head_dim=config["attention_head_dim"],
                query_key_norm=QueryKeyNorm.PER_HEAD,
                joint_text=True,
            )
            for number, layer in enumerate(self.layer_split().layers)
        ]

    def layer_split(self) -> LayerSplit:
        return self.layout.layer_split()

    def num_ready_chunks(self, latent_frames: int, *, is_complete: bool, decoders: int = 1) -> int:
        """Rounds of as many temporal tiles as there are ranks."""
        return num_ready_rounds(latent_frames, self.layout.temporal_factor, is_complete=is_complete, decoders=decoders)

    def uses_guidance(self, request: VideoRequest) -> bool:
        """True guidance, against the negative prompt; `guidance_scale` is an embedding and costs no forward."""
        return (request.true_cfg_scale or 0) > 1 and request.negative_prompt is not None

    def cost(
        self, request: VideoRequest, precision: Precision, *, tiling: bool = False, decoders: int = 1
    ) -> RequestCost:
        layout, forwards = self.token_layout(request), 2 if self.uses_guidance(request) else 1
        _, channels, frames, rows, columns = self.latent_shape(request)
        checkpoint = self.checkpoint
        llama, clip = checkpoint.config("text_encoder"), checkpoint.config("text_encoder_2")
        encode = text_costs.llama_operations(llama, PROMPT_FRAME.cropped_tokens + layout.text_tokens)
        num_chunks = self.num_decode_chunks(request)
        first, middle, last = (
            vae_costs.decode_operations(
                self.layout.vae_config, frames=len(tile.latents), rows=rows, columns=columns, tiling=tiling
            )
            for tile in kinds_of_tile(frames, self.layout.temporal_factor)
        )
        return RequestCost(
            num_steps=request.num_inference_steps or 1,
            num_chunks=num_chunks,
            forwards_per_step=forwards,
            latent_tokens=layout.latent_tokens,
            text_tokens=layout.text_tokens,
            latent_bytes=3 * channels * frames * rows * columns * 4,  # latents, prediction, and the next latents
            encode=(encode + text_costs.clip_operations(clip, CLIP_TOKENS)).times(forwards),
            forward=transformer_costs.transformer_cost(
                transformer_costs.TransformerShape.from_config(self.layout.transformer_config),
                tokens=layout.latent_tokens,
                text_tokens=layout.text_tokens,
            ),
            decode_first_chunk=first,
            decode_chunk=middle,
            decode_last_chunk=last if num_chunks > 1 else None,
            parts=self._parts(layout, precision, (frames, rows, columns), tiling=tiling, decoders=decoders),
            attention=self._shared_attention(layout, precision),
            decodes_in_rounds=True,
        )

    def _shared_attention(self, layout: TokenLayout, precision: Precision) -> SharedAttention:
        sites = self.attention_sites()
        hidden = sites[0].heads * sites[0].head_dim
        return SharedAttention(
            sites=len(sites),
            heads=sites[0].heads,
            head_dim=sites[0].head_dim,
            operations=len(sites) * 4 * (layout.latent_tokens + layout.text_tokens) ** 2 * hidden,
            projections=len(sites) * 2 * layout.latent_tokens * 3 * hidden**2,
            element=element_bytes(precision.transformer),
            joint_text=True,
        )

    def _parts(
        self, layout: TokenLayout, precision: Precision, latents: tuple[int, int, int], *, tiling: bool, decoders: int
    ) -> dict[str, PartBytes]:
        shape = transformer_costs.TransformerShape.from_config(self.layout.transformer_config)
        llama, clip = self.checkpoint.config("text_encoder"), self.checkpoint.config("text_encoder_2")
        text, element = element_bytes(precision.text_encoder), element_bytes(precision.transformer)
        vae = element_bytes(precision.vae)
        llama_tokens = PROMPT_FRAME.cropped_tokens + layout.text_tokens
        frames = max(len(tile.latents) for tile in kinds_of_tile(latents[0], self.layout.temporal_factor))
        return {
            "text_encoder": PartBytes(
                weights=text_costs.llama_parameters(llama) * text,
                working=text_costs.llama_working_bytes(llama, tokens=llama_tokens, element=text),
            ),
            "text_encoder_2": PartBytes(
                weights=text_costs.clip_parameters(clip) * text,
                working=text_costs.clip_working_bytes(clip, tokens=CLIP_TOKENS, element=text),
            ),
            "transformer": PartBytes(
                weights=transformer_costs.transformer_parameters(shape) * element,
                layers=tuple(count * element for count in transformer_costs.layer_parameters(shape)),
                working=transformer_costs.transformer_working_bytes(
                    shape, tokens=layout.latent_tokens, text_tokens=layout.text_tokens, element=element
                ),
                attending=transformer_costs.transformer_attending_bytes(
                    shape, tokens=layout.latent_tokens, text_tokens=layout.text_tokens, element=element
                ),
            ),
            "vae": PartBytes(
                weights=vae_costs.decoder_parameters(self.layout.vae_config) * vae,
                working=vae_costs.decode_working_bytes(
                    self.layout.vae_config,
                    frames=frames,
                    rows=latents[1],
                    columns=latents[2],
                    element=vae,
                    tiling=tiling,
                    decoders=decoders,
                ),
            ),
        }

    def load_text_stage(self, device: str, precision: Precision) -> TextStage:
        from pipedit.models.hunyuan_video.text import HunyuanVideoTextStage

        return HunyuanVideoTextStage.load(self.checkpoint, device, precision)

    def load_denoise_stage(self, device: str, precision: Precision, layers: range | None = None) -> DenoiseStage:
        from pipedit.models.hunyuan_video.denoise import HunyuanVideoDenoiseStage

        return HunyuanVideoDenoiseStage.load(self.layout, device, precision, layers)

    def load_block_stage(self, device: str, precision: Precision, layers: range) -> BlockStage:
        from pipedit.models.hunyuan_video.block_stage import HunyuanVideoBlockStage

        return HunyuanVideoBlockStage.load(self.layout, device, precision, layers)

    def load_decode_stage(self, device: str, precision: Precision, *, tiling: bool = False) -> DecodeStage:
        from pipedit.models.hunyuan_video.decode import HunyuanVideoDecodeStage

        return HunyuanVideoDecodeStage.load(self.layout, device, precision, tiling=tiling)
