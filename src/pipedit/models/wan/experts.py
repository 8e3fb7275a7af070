"""Wan's transformers: one, or two experts, whole or some of their layers."""

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from pipedit.models.loading import load_module
from pipedit.models.wan.layout import WanLayout


def load_experts(
    layout: WanLayout, *, device: str, dtype: torch.dtype, layers: range | None = None
) -> list[WanTransformer3DModel]:
    """High noise first. Weights outside `layers` stay on the meta device."""
    names = ("transformer", "transformer_2") if layout.has_two_experts else ("transformer",)
    return [
        load_module(
            lambda name=name: WanTransformer3DModel.from_config(layout.checkpoint.config(name)),  # type: ignore[misc]
            layout.checkpoint.weights(name),
            device=device,
            dtype=dtype,
            prefixes=layout.layer_split().wanted(layers),
        )
        for name in names
    ]
