"""Some of HunyuanVideo's layers, double-stream or single-stream or both, as a stage of a pipeline. The text's hidden
states travel behind those of the latents."""

import torch

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import Precision
from pipedit.models.block_stage import TransformerBlockStage, check_patch
from pipedit.models.hunyuan_video.course import HunyuanVideoCourse
from pipedit.models.hunyuan_video.layout import HunyuanVideoLayout
from pipedit.models.hunyuan_video.transformer import load_transformer
from pipedit.models.partial_transformer import PartialTransformer, as_they_are


class HunyuanVideoBlockStage(TransformerBlockStage[HunyuanVideoCourse]):
    _layout: HunyuanVideoLayout

    @classmethod
    def load(
        cls, layout: HunyuanVideoLayout, device: str, precision: Precision, layers: range
    ) -> "HunyuanVideoBlockStage":
        check_patch(layout)
        dtype = getattr(torch, precision.transformer)
        transformer = load_transformer(layout, device=device, dtype=dtype, layers=layers)
        entries = {"x_embedder": as_they_are, "context_embedder": as_they_are}
        return cls(layout, device, dtype, [PartialTransformer(transformer, layout.layer_split(), layers, entries)])

    @torch.inference_mode()
    def begin(self, request: VideoRequest, conditioning: dict[str, torch.Tensor]) -> HunyuanVideoCourse:
        return HunyuanVideoCourse.begin(self._layout, request, conditioning, device=self.device, dtype=self._dtype)
