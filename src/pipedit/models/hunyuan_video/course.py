"""How HunyuanVideo is denoised: guidance as an embedding; with a negative prompt, true guidance on top of it."""

import dataclasses

import numpy as np
import torch

from pipedit.core.request import VideoRequest
from pipedit.models.course import Course, Inputs
from pipedit.models.hunyuan_video.layout import HunyuanVideoLayout
from pipedit.models.noise_schedulers import keeps_latents_dtype, make_noise_scheduler

_BRANCHES = (("prompt", "pooled"), ("negative", "negative_pooled"))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HunyuanVideoCourse(Course):
    """FlowMatchEuler returns latents in the transformer's precision, as in the diffusers pipeline."""

    guidance: torch.Tensor  # [1]

    @classmethod
    def begin(
        cls,
        layout: HunyuanVideoLayout,
        request: VideoRequest,
        conditioning: dict[str, torch.Tensor],
        *,
        device: str,
        dtype: torch.dtype,
    ) -> "HunyuanVideoCourse":
        assert request.num_inference_steps is not None
        checkpoint = layout.checkpoint
        noise_scheduler = make_noise_scheduler(
            checkpoint.component_class("scheduler"), checkpoint.config("scheduler"), request.flow_shift
        )
        sigmas = np.linspace(1.0, 0.0, request.num_inference_steps + 1)[:-1]
        noise_scheduler.set_timesteps(sigmas=sigmas, device=device)
        noise_scheduler.set_begin_index(0)
        return cls(
            request=request,
            conditioning={name: tensor.to(device, dtype) for name, tensor in conditioning.items()},
            dtype=dtype,
            noise_scheduler=noise_scheduler,
            # Scaled in the transformer's precision: 6.0 becomes 6016 in bfloat16, which is what diffusers gives it.
            guidance=torch.tensor([request.guidance_scale], dtype=dtype, device=device) * 1000.0,
        )

    @property
    def num_branches(self) -> int:
        return sum(text in self.conditioning for text, _ in _BRANCHES)

    def joint_tokens(self, branch: int) -> int:
        return self.conditioning[_BRANCHES[branch][0]].shape[1]

    def inputs(self, step: int, branch: int, latents: torch.Tensor) -> Inputs:
        text, pooled = (self.conditioning[name] for name in _BRANCHES[branch])
        return {
            "hidden_states": latents,
            "timestep": self.timesteps[step].expand(1).to(self._latents_dtype(step)),
            "encoder_hidden_states": text,
            "encoder_attention_mask": text.new_ones(text.shape[:2]),
            "pooled_projections": pooled,
            "guidance": self.guidance,
            "return_dict": False,
        }

    def scale(self, step: int) -> float:
        assert self.request.true_cfg_scale is not None
        return self.request.true_cfg_scale

    def _latents_dtype(self, step: int) -> torch.dtype:
        """Of the latents before a step, whoever has them: the timestep is given in it, as diffusers does."""
        return torch.float32 if step == 0 or keeps_latents_dtype(self.noise_scheduler) else self.dtype
