"""How to run, as the user said it, and what can be wrong with that. Knows no requests."""

import dataclasses

from pipedit.core.errors import InvalidRequestError
from pipedit.models.adapter import ModelAdapter
from pipedit.models.registry import EMBEDDED, open_model
from pipedit.worker.device import device_problems, resolve_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How to run, as the user said it. Nothing here changes the video, except `dtype` and `vae_tiling`."""

    model: str = EMBEDDED
    num_workers: int = 1
    device: str = "auto"
    dtype: str = "auto"
    vae_tiling: bool = False
    compile_layers: bool = False


def setting_problems(settings: EngineSettings) -> list[str]:
    """What is wrong with the settings besides the model's name, one sentence each."""
    device = settings.device
    if device == "auto" and settings.dtype == "float16":
        device = resolve_device(device)  # only here it matters which: finding out imports torch
    problems = device_problems(device, settings.dtype)
    if settings.num_workers != 1:
        problems.append(f"num_workers={settings.num_workers}: this version runs on 1 worker")
    return problems


def open_adapter(settings: EngineSettings) -> ModelAdapter:
    """The model's adapter. Raises one InvalidRequestError with everything that is wrong with the settings."""
    problems = setting_problems(settings)
    try:
        adapter = open_model(settings.model)
    except InvalidRequestError as error:
        raise InvalidRequestError([*problems, *error.problems]) from error
    if problems:
        raise InvalidRequestError(problems)
    return adapter
