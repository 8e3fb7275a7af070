"""From what a caller says to requests that can run: names checked, defaults and seeds filled, sizes checked.

Nothing here loads weights, and only CUDA devices need torch.
"""

import dataclasses
import difflib
import secrets
from collections.abc import Sequence
from typing import Any

from pipedit.core.errors import CheckpointError, InvalidRequestError
from pipedit.core.request import FIELD_NAMES, VideoRequest
from pipedit.engine.blocks import seen_at_once
from pipedit.engine.settings import EngineSettings, setting_problems
from pipedit.engine.sharing import sharing_problems
from pipedit.models.adapter import ModelAdapter
from pipedit.models.registry import open_model, weight_problems
from pipedit.models.validation import check_request, check_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckedInput:
    """`requests` have the model's defaults filled in, unless the model cannot be opened. `problems` is everything."""

    requests: tuple[VideoRequest, ...]
    problems: tuple[str, ...]


def make_requests(
    prompts: str | VideoRequest | Sequence[str | VideoRequest], settings: dict[str, Any]
) -> list[VideoRequest]:
    """One request for each prompt; `settings` hold for prompts given as text. Raises InvalidRequestError for names
    that are no setting."""
    if unknown := unknown_settings(settings):
        raise InvalidRequestError(unknown)
    several = [prompts] if isinstance(prompts, (str, VideoRequest)) else list(prompts)
    if settings and any(isinstance(prompt, VideoRequest) for prompt in several):
        names = ", ".join(settings)
        raise InvalidRequestError([f"{names} cannot change a VideoRequest; put it into the request itself"])
    return [p if isinstance(p, VideoRequest) else VideoRequest(prompt=p, **settings) for p in several]


def unknown_settings(settings: dict[str, Any]) -> list[str]:
    """A sentence for each name that is no setting, with the nearest one."""
    allowed = [name for name in FIELD_NAMES if name != "prompt"]
    problems = []
    for name in settings:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"did you mean {close[0]}?" if close else f"settings are {', '.join(allowed)}"
            problems.append(f"unknown setting {name}; {hint}")
    return problems


def check_input(settings: EngineSettings, requests: Sequence[VideoRequest], labels: Sequence[str] = ()) -> CheckedInput:
    """Everything that is wrong with the settings, the model and the requests, found in one go; raises nothing.

    `labels` say where each request comes from, such as "prompts.txt:3"; without them, several are numbered.
    """
    adapter, problems = None, []
    try:
        adapter = open_model(settings.model)
        problems += weight_problems(adapter)
        requests = complete_requests(requests, adapter)
        problems += request_problems(requests, adapter, settings, labels)
    except (InvalidRequestError, CheckpointError) as error:
        problems += error.problems if isinstance(error, InvalidRequestError) else str(error).splitlines()
        problems += _labelled([check_values(request) for request in requests], labels)
    problems = [*setting_problems(settings, adapter), *problems]
    return CheckedInput(requests=tuple(requests), problems=tuple(dict.fromkeys(problems)))


def complete_requests(requests: Sequence[VideoRequest], adapter: ModelAdapter) -> list[VideoRequest]:
    """The requests with the model's defaults filled in; seeds stay as they are."""
    return [adapter.complete(request) for request in requests]


def request_problems(
    requests: Sequence[VideoRequest], adapter: ModelAdapter, settings: EngineSettings, labels: Sequence[str] = ()
) -> list[str]:
    """Problems of all the completed requests, each with its label where there are several."""
    found = []
    for request in requests:
        problems = check_request(seen_at_once(request, adapter, settings), adapter)
        if request.prompts_at is not None and not settings.is_blockwise:
            problems.append("prompts_at needs strategy dualparal: only there is a video made stretch by stretch")
        found.append([*problems, *sharing_problems(request, adapter, settings, has_sound_size=not problems)])
    return _labelled(found, labels)


def with_seed(request: VideoRequest) -> VideoRequest:
    """The request with a seed: its own, or a random one."""
    return request if request.seed is not None else dataclasses.replace(request, seed=secrets.randbelow(2**32))


def _labelled(found: Sequence[Sequence[str]], labels: Sequence[str]) -> list[str]:
    """Each problem behind the label of its request. What is wrong with all of several is said once, without one."""
    if not labels:
        labels = [f"prompt {number}" for number in range(1, len(found) + 1)] if len(found) > 1 else [""] * len(found)
    shared = set.intersection(*map(set, found)) if len(found) > 1 else set()
    labelled = (
        f"{label}: {text}" if label and text not in shared else text
        for label, problems in zip(labels, found, strict=True)
        for text in problems
    )
    return list(dict.fromkeys(labelled))
