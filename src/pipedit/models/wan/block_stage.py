"""Some of Wan's layers as a stage of a pipeline; of both experts the same ones."""

import torch

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import Precision
from pipedit.models.block_stage import TransformerBlockStage, check_patch
from pipedit.models.partial_transformer import PartialTransformer
from pipedit.models.wan.course import WanCourse
from pipedit.models.wan.experts import load_experts
from pipedit.models.wan.layout import WanLayout


def _channels_first(hidden: torch.Tensor) -> torch.Tensor:
    """[B, S, D] -> [B, D, S], as a convolution gives it: the forward flattens what comes after the channels, and turns
    it round."""
    return hidden.transpose(1, 2)


class WanBlockStage(TransformerBlockStage[WanCourse]):
    _layout: WanLayout

    @classmethod
    def load(cls, layout: WanLayout, device: str, precision: Precision, layers: range) -> "WanBlockStage":
        check_patch(layout)
        dtype = getattr(torch, precision.transformer)
        parts = [
            PartialTransformer(expert, layout.layer_split(), layers, {"patch_embedding": _channels_first})
            for expert in load_experts(layout, device=device, dtype=dtype, layers=layers)
        ]
        return cls(layout, device, dtype, parts)

    @torch.inference_mode()
    def begin(self, request: VideoRequest, conditioning: dict[str, torch.Tensor]) -> WanCourse:
        return WanCourse.begin(self._layout, request, conditioning, device=self.device, dtype=self._dtype)
