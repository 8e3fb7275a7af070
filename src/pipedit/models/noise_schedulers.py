"""Noise schedulers by the class name in the checkpoint. One object per stream of latents: they carry history."""

from collections.abc import Mapping
from typing import Any

from pipedit.core.errors import CheckpointError

_ALLOWED = ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")


def make_noise_scheduler(class_name: str | None, config: dict[str, Any], flow_shift: float | None) -> Any:
    """A fresh noise scheduler; `flow_shift` replaces the checkpoint's own (named differently in each class)."""
    import diffusers  # here, because the functions below are part of checking input, which should be quick

    if problem := scheduler_problem(class_name, config):
        raise CheckpointError(problem)
    assert class_name is not None
    overrides: dict[str, float] = {}
    if flow_shift is not None:
        overrides["shift" if class_name == "FlowMatchEulerDiscreteScheduler" else "flow_shift"] = flow_shift
    return getattr(diffusers, class_name).from_config({**config, **overrides})


def scheduler_problem(class_name: str | None, config: dict[str, Any]) -> str | None:
    """Why a checkpoint's noise scheduler cannot be used, or None."""
    if class_name not in _ALLOWED:
        return f"noise scheduler {class_name} is not supported; supported are {', '.join(_ALLOWED)}"
    if config.get("use_dynamic_shifting"):
        return f"{class_name} with use_dynamic_shifting is not supported; no known video model is trained with it"
    return None


def snapshot_problem(class_name: str | None, config: Mapping[str, Any]) -> str | None:
    """Why a run with this noise scheduler cannot be saved and gone on with, or None."""
    if config.get("stochastic_sampling"):
        return f"{class_name} with stochastic_sampling draws noise in every step, which cannot be saved"
    return None


def keeps_latents_dtype(noise_scheduler: Any) -> bool:
    """Whether a step returns latents in their own data type; else it returns them in the prediction's."""
    return type(noise_scheduler).__name__ == "UniPCMultistepScheduler"


def ignores_flow_shift(class_name: str | None, config: dict[str, Any]) -> bool:
    """Whether another `flow_shift` would change nothing: UniPC looks at it for one kind of noise levels only."""
    others = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    return class_name == "UniPCMultistepScheduler" and (
        not config.get("use_flow_sigmas", False) or any(config.get(name) for name in others)
    )


def most_steps(config: dict[str, Any]) -> int:
    """More denoising steps than noise levels in training would repeat some of them."""
    return int(config.get("num_train_timesteps", 1000))
