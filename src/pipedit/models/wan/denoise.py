"""Wan's denoise stage: one transformer, or two experts that take turns at the noise boundary."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import Precision, StageParallel, one_after_the_other
from pipedit.models.loading import load_module
from pipedit.models.noise_schedulers import make_noise_scheduler
from pipedit.models.seeding import initial_noise
from pipedit.models.sequence import attach
from pipedit.models.wan.layout import WanLayout
from pipedit.models.wan.sequence import WanSequenceBinding


@dataclasses.dataclass(kw_only=True)
class WanState:
    """Latents [1, C, F, H, W] in float32 and the noise scheduler that belongs to them alone."""

    request: VideoRequest
    conditioning: dict[str, torch.Tensor]
    noise_scheduler: Any
    latents: torch.Tensor


class WanDenoiseStage:
    def __init__(
        self, layout: WanLayout, device: str, dtype: torch.dtype, experts: list[WanTransformer3DModel]
    ) -> None:
        self._layout, self.device, self._dtype, self.experts = layout, device, dtype, experts
        self._branches, self._is_attached = one_after_the_other, False

    @classmethod
    def load(
        cls, layout: WanLayout, device: str, precision: Precision, layers: range | None = None
    ) -> "WanDenoiseStage":
        dtype = getattr(torch, precision.transformer)
        names = ("transformer", "transformer_2") if layout.has_two_experts else ("transformer",)
        experts = [
            load_module(
                lambda name=name: WanTransformer3DModel.from_config(layout.checkpoint.config(name)),  # type: ignore[misc]
                layout.checkpoint.weights(name),
                device=device,
                dtype=dtype,
                prefixes=layout.layer_split().wanted(layers),
            )
            for name in names
        ]
        return cls(layout, device, dtype, experts)

    @property
    def modules(self) -> Sequence[torch.nn.Module]:
        return self.experts

    def modules_of_step(self, state: WanState, index: int) -> Sequence[torch.nn.Module]:
        expert, _ = self._expert(state, state.noise_scheduler.timesteps[index])
        return (expert,)

    def attach(self, parallel: StageParallel) -> None:
        for expert in self.experts:
            attach(expert, WanSequenceBinding(expert), parallel)
        self._branches, self._is_attached = parallel.branches, True

    def compile_layers(self) -> None:
        for expert in self.experts:
            # The exchanges of attention on several ranks break graphs.
            expert.compile_repeated_blocks(fullgraph=not self._is_attached)

    @torch.inference_mode()
    def begin(self, request: VideoRequest, conditioning: dict[str, torch.Tensor]) -> WanState:
        assert request.seed is not None
        checkpoint = self._layout.checkpoint
        noise_scheduler = make_noise_scheduler(
            checkpoint.component_class("scheduler"), checkpoint.config("scheduler"), request.flow_shift
        )
        noise_scheduler.set_timesteps(request.num_inference_steps, device=self.device)
        noise_scheduler.set_begin_index(0)
        return WanState(
            request=request,
            conditioning={name: tensor.to(self.device, self._dtype) for name, tensor in conditioning.items()},
            noise_scheduler=noise_scheduler,
            latents=initial_noise(self._layout.latent_shape(request), request.seed, self.device),
        )

    @torch.inference_mode()
    def step(self, state: WanState, index: int) -> None:
        time = state.noise_scheduler.timesteps[index]
        expert, scale = self._expert(state, time)
        latents = state.latents.to(self._dtype)
        timestep = self._timestep(state.latents, time)
        texts = [state.conditioning[name] for name in ("prompt", "negative") if name in state.conditioning]
        prediction, *others = self._branches(
            [functools.partial(self._predict, expert, latents, timestep, text) for text in texts]
        )
        for negative in others:
            prediction = negative + scale * (prediction - negative)
        state.latents = state.noise_scheduler.step(prediction, time, state.latents, return_dict=False)[0]

    def latents(self, state: WanState) -> torch.Tensor:
        return state.latents

    def _expert(self, state: WanState, time: torch.Tensor) -> tuple[WanTransformer3DModel, float]:
        """The expert for this noise level and its guidance scale."""
        request, ratio = state.request, self._layout.boundary_ratio
        assert request.guidance_scale is not None
        if len(self.experts) == 1 or ratio is None:
            return self.experts[0], request.guidance_scale
        if time >= ratio * state.noise_scheduler.config.num_train_timesteps:
            return self.experts[0], request.guidance_scale
        low = request.guidance_scale_2
        return self.experts[1], request.guidance_scale if low is None else low

    def _timestep(self, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """[1], or [1, S] where every token has its own timestep (all equal in text-to-video)."""
        if not self._layout.expands_timesteps:
            return time.expand(1)
        _, rows, columns = self.experts[0].config.patch_size
        tokens = latents.shape[2] * (latents.shape[3] // rows) * (latents.shape[4] // columns)
        return (torch.ones(tokens, dtype=torch.float32, device=latents.device) * time).unsqueeze(0)

    @staticmethod
    def _predict(
        expert: WanTransformer3DModel, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        output: torch.Tensor = expert(
            hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False
        )[0]
        return output
