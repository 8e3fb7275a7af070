"""HunyuanVideo's transformer, whole or some of its layers."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

from pipedit.models.hunyuan_video.layout import HunyuanVideoLayout
from pipedit.models.loading import load_module


def load_transformer(
    layout: HunyuanVideoLayout, *, device: str, dtype: torch.dtype, layers: range | None = None
) -> HunyuanVideoTransformer3DModel:
    """Weights outside `layers` stay on the meta device."""
    transformer = load_module(
        lambda: HunyuanVideoTransformer3DModel.from_config(layout.transformer_config),
        layout.checkpoint.weights("transformer"),
        device=device,
        dtype=dtype,
        prefixes=layout.layer_split().wanted(layers),
    )
    for layer in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        layer.register_forward_pre_hook(_without_mask)
    return transformer


def _without_mask(_layer: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Takes the attention mask from a layer's positional inputs (latents, text, time, mask, ...).

    Text is never padded (the trimming rule in text.py), so the mask that the model builds is all true: it changes
    nothing, but with it the fast attention kernels refuse to run.
    """
    latents, text, time, _mask, *rest = inputs
    return (latents, text, time, None, *rest)
