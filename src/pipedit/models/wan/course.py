"""How Wan is denoised: classifier-free guidance; two experts that take turns at the noise boundary; in TI2V a timestep
for every token."""

import dataclasses
from typing import Any

import torch

from pipedit.core.request import VideoRequest
from pipedit.models.course import Course, Inputs
from pipedit.models.noise_schedulers import make_noise_scheduler
from pipedit.models.wan.layout import WanLayout

_BRANCHES = ("prompt", "negative")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WanCourse(Course):
    layout: WanLayout
    experts: tuple[int, ...]  # by step

    @classmethod
    def begin(
        cls,
        layout: WanLayout,
        request: VideoRequest,
        conditioning: dict[str, torch.Tensor],
        *,
        device: str,
        dtype: torch.dtype,
    ) -> "WanCourse":
        checkpoint = layout.checkpoint
        noise_scheduler = make_noise_scheduler(
            checkpoint.component_class("scheduler"), checkpoint.config("scheduler"), request.flow_shift
        )
        noise_scheduler.set_timesteps(request.num_inference_steps, device=device)
        noise_scheduler.set_begin_index(0)
        return cls(
            layout=layout,
            request=request,
            conditioning={name: tensor.to(device, dtype) for name, tensor in conditioning.items()},
            dtype=dtype,
            noise_scheduler=noise_scheduler,
            experts=_experts(layout, noise_scheduler),
        )

    @property
    def num_branches(self) -> int:
        return sum(name in self.conditioning for name in _BRANCHES)

    def expert(self, step: int) -> int:
        return self.experts[step]

    def inputs(self, step: int, branch: int, latents: torch.Tensor) -> Inputs:
        return {
            "hidden_states": latents,
            "timestep": self._timestep(step, latents),
            "encoder_hidden_states": self.conditioning[_BRANCHES[branch]],
            "return_dict": False,
        }

    def scale(self, step: int) -> float:
        """The low-noise expert has its own, if one is set."""
        high, low = self.request.guidance_scale, self.request.guidance_scale_2
        assert high is not None
        return high if low is None or self.expert(step) == 0 else low

    def _timestep(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """[1], or [1, S] where every token has its own timestep (all equal in text-to-video)."""
        time = self.timesteps[step]
        if not self.layout.expands_timesteps:
            return time.expand(1)
        tokens = self.layout.tokens(latents.shape)
        return (torch.ones(tokens, dtype=torch.float32, device=latents.device) * time).unsqueeze(0)


def _experts(layout: WanLayout, noise_scheduler: Any) -> tuple[int, ...]:
    """0 above the boundary, where there is much noise, and 1 below it."""
    times = noise_scheduler.timesteps
    if not layout.has_two_experts:
        return (0,) * len(times)
    assert layout.boundary_ratio is not None
    boundary = layout.boundary_ratio * noise_scheduler.config.num_train_timesteps
    return tuple((times < boundary).long().tolist())
