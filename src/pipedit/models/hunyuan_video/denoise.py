"""HunyuanVideo's denoise stage: guidance as an embedding; with a negative prompt, true guidance on top of it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import Precision, StageParallel, one_after_the_other
from pipedit.models.hunyuan_video.layout import HunyuanVideoLayout
from pipedit.models.hunyuan_video.sequence import HunyuanVideoSequenceBinding
from pipedit.models.loading import load_module
from pipedit.models.noise_schedulers import make_noise_scheduler
from pipedit.models.seeding import initial_noise
from pipedit.models.sequence import attach


@dataclasses.dataclass(kw_only=True)
class HunyuanVideoState:
    """Latents [1, C, F, H, W], float32 at first, and the noise scheduler that belongs to them alone.

    The scheduler returns latents in the transformer's precision, as in the diffusers pipeline.
    """

    request: VideoRequest
    conditioning: dict[str, torch.Tensor]
    guidance: torch.Tensor  # [1]
    noise_scheduler: Any
    latents: torch.Tensor


class HunyuanVideoDenoiseStage:
    def __init__(
        self,
        layout: HunyuanVideoLayout,
        device: str,
        dtype: torch.dtype,
        transformer: HunyuanVideoTransformer3DModel,
    ) -> None:
        self._layout, self.device, self._dtype, self.transformer = layout, device, dtype, transformer
        self._branches, self._is_attached = one_after_the_other, False
        for layer in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            layer.register_forward_pre_hook(_without_mask)

    @classmethod
    def load(
        cls, layout: HunyuanVideoLayout, device: str, precision: Precision, layers: range | None = None
    ) -> "HunyuanVideoDenoiseStage":
        dtype = getattr(torch, precision.transformer)
        transformer = load_module(
            lambda: HunyuanVideoTransformer3DModel.from_config(layout.transformer_config),
            layout.checkpoint.weights("transformer"),
            device=device,
            dtype=dtype,
            prefixes=layout.layer_split().wanted(layers),
        )
        return cls(layout, device, dtype, transformer)

    @property
    def modules(self) -> Sequence[torch.nn.Module]:
        return (self.transformer,)

    def modules_of_step(self, state: HunyuanVideoState, index: int) -> Sequence[torch.nn.Module]:
        return self.modules

    def attach(self, parallel: StageParallel) -> None:
        attach(self.transformer, HunyuanVideoSequenceBinding(self.transformer), parallel)
        self._branches, self._is_attached = parallel.branches, True

    def compile_layers(self) -> None:
        # The exchanges of attention on several ranks break graphs.
        self.transformer.compile_repeated_blocks(fullgraph=not self._is_attached)

    @torch.inference_mode()
    def begin(self, request: VideoRequest, conditioning: dict[str, torch.Tensor]) -> HunyuanVideoState:
        assert request.seed is not None and request.num_inference_steps is not None
        checkpoint = self._layout.checkpoint
        noise_scheduler = make_noise_scheduler(
            checkpoint.component_class("scheduler"), checkpoint.config("scheduler"), request.flow_shift
        )
        sigmas = np.linspace(1.0, 0.0, request.num_inference_steps + 1)[:-1]
        noise_scheduler.set_timesteps(sigmas=sigmas, device=self.device)
        noise_scheduler.set_begin_index(0)
        return HunyuanVideoState(
            request=request,
            conditioning={name: tensor.to(self.device, self._dtype) for name, tensor in conditioning.items()},
            # Scaled in the transformer's precision: 6.0 becomes 6016 in bfloat16, which is what diffusers gives it.
            guidance=torch.tensor([request.guidance_scale], dtype=self._dtype, device=self.device) * 1000.0,
            noise_scheduler=noise_scheduler,
            latents=initial_noise(self._layout.latent_shape(request), request.seed, self.device),
        )

    @torch.inference_mode()
    def step(self, state: HunyuanVideoState, index: int) -> None:
        time, conditioning = state.noise_scheduler.timesteps[index], state.conditioning
        latents = state.latents.to(self._dtype)
        timestep = time.expand(1).to(state.latents.dtype)
        texts = [(conditioning["prompt"], conditioning["pooled"])]
        if "negative" in conditioning:
            texts.append((conditioning["negative"], conditioning["negative_pooled"]))
        prediction, *others = self._branches(
            [functools.partial(self._predict, latents, timestep, state.guidance, *text) for text in texts]
        )
        for negative in others:
            scale = state.request.true_cfg_scale
            assert scale is not None
            prediction = negative + scale * (prediction - negative)
        state.latents = state.noise_scheduler.step(prediction, time, state.latents, return_dict=False)[0]

    def latents(self, state: HunyuanVideoState) -> torch.Tensor:
        return state.latents.float()

    def _predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        guidance: torch.Tensor,
        text: torch.Tensor,
        pooled: torch.Tensor,
    ) -> torch.Tensor:
        output: torch.Tensor = self.transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_attention_mask=text.new_ones(text.shape[:2]),
            pooled_projections=pooled,
            guidance=guidance,
            return_dict=False,
        )[0]
        return output


def _without_mask(_layer: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Takes the attention mask from a layer's positional inputs (latents, text, time, mask, ...).

    Text is never padded (the trimming rule in text.py), so the mask that the model builds is all true: it changes
    nothing, but with it the fast attention kernels refuse to run.
    """
    latents, text, time, _mask, *rest = inputs
    return (latents, text, time, None, *rest)
