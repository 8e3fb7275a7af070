"""Noise schedulers by the class name in the checkpoint. One object per stream of latents: they carry history."""

from typing import Any

import diffusers

from pipedit.core.errors import CheckpointError

_ALLOWED = ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")


def make_noise_scheduler(class_name: str | None, config: dict[str, Any], flow_shift: float | None) -> Any:
    """A fresh noise scheduler; `flow_shift` replaces the checkpoint's own (named differently in each class)."""
    if class_name not in _ALLOWED:
        raise CheckpointError(f"noise scheduler {class_name} is not supported; supported are {', '.join(_ALLOWED)}")
    overrides: dict[str, float] = {}
    if flow_shift is not None:
        overrides["shift" if class_name == "FlowMatchEulerDiscreteScheduler" else "flow_shift"] = flow_shift
    return getattr(diffusers, class_name).from_config({**config, **overrides})
