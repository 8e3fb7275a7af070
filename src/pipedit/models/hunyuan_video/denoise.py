"""HunyuanVideo's denoise stage."""

from collections.abc import Sequence

import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import Precision, StageParallel, one_after_the_other
from pipedit.models.course import DenoiseState
from pipedit.models.hunyuan_video.course import HunyuanVideoCourse
from pipedit.models.hunyuan_video.layout import HunyuanVideoLayout
from pipedit.models.hunyuan_video.sequence import HunyuanVideoSequenceBinding
from pipedit.models.hunyuan_video.transformer import load_transformer
from pipedit.models.seeding import initial_noise
from pipedit.models.sequence import attach

HunyuanVideoState = DenoiseState[HunyuanVideoCourse]


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

    @classmethod
    def load(
        cls, layout: HunyuanVideoLayout, device: str, precision: Precision, layers: range | None = None
    ) -> "HunyuanVideoDenoiseStage":
        dtype = getattr(torch, precision.transformer)
        return cls(layout, device, dtype, load_transformer(layout, device=device, dtype=dtype, layers=layers))

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
        assert request.seed is not None
        course = HunyuanVideoCourse.begin(self._layout, request, conditioning, device=self.device, dtype=self._dtype)
        noise = initial_noise(self._layout.latent_shape(request), request.seed, self.device)
        return DenoiseState(course=course, noisy=course.start(noise))

    @torch.inference_mode()
    def step(self, state: HunyuanVideoState, index: int) -> None:
        state.step(index, self.transformer, self._branches)

    def latents(self, state: HunyuanVideoState) -> torch.Tensor:
        return state.noisy.latents.float()
