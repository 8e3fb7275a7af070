"""Wan's denoise stage: one transformer, or two experts that take turns at the noise boundary."""

from collections.abc import Sequence

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import Precision, StageParallel, one_after_the_other
from pipedit.models.course import DenoiseState
from pipedit.models.seeding import initial_noise
from pipedit.models.sequence import attach
from pipedit.models.wan.course import WanCourse
from pipedit.models.wan.experts import load_experts
from pipedit.models.wan.layout import WanLayout
from pipedit.models.wan.sequence import WanSequenceBinding

WanState = DenoiseState[WanCourse]


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
        return cls(layout, device, dtype, load_experts(layout, device=device, dtype=dtype, layers=layers))

    @property
    def modules(self) -> Sequence[torch.nn.Module]:
        return self.experts

    def modules_of_step(self, state: WanState, index: int) -> Sequence[torch.nn.Module]:
        return (self.experts[state.course.expert(index)],)

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
        course = WanCourse.begin(self._layout, request, conditioning, device=self.device, dtype=self._dtype)
        noise = initial_noise(self._layout.latent_shape(request), request.seed, self.device)
        return DenoiseState(course=course, noisy=course.start(noise))

    @torch.inference_mode()
    def step(self, state: WanState, index: int) -> None:
        state.step(index, self.experts[state.course.expert(index)], self._branches)

    def latents(self, state: WanState) -> torch.Tensor:
        return state.noisy.latents
