"""From what a caller says to requests that can run: names checked, defaults and seeds filled, sizes and memory checked."""

import dataclasses
import difflib
import secrets
from collections.abc import Sequence
from typing import Any

from pipedit.core.errors import InsufficientMemoryError, InvalidRequestError
from pipedit.core.request import FIELD_NAMES, VideoRequest
from pipedit.models.adapter import ModelAdapter, Precision
from pipedit.models.validation import check_request
from pipedit.plan.memory import SizeLadder, memory_problem
from pipedit.worker.device import available_bytes


def make_requests(
    prompts: str | VideoRequest | Sequence[str | VideoRequest], settings: dict[str, Any]
) -> list[VideoRequest]:
    """One request for each prompt; `settings` hold for prompts given as text. Raises InvalidRequestError for names
    that are no setting."""
    if unknown := unknown_settings(settings):
        raise InvalidRequestError(unknown)
    several = [prompts] if isinstance(prompts, (str, VideoRequest)) else list(prompts)
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


def prepare_requests(
    requests: Sequence[VideoRequest], adapter: ModelAdapter, *, device: str, precision: Precision
) -> list[VideoRequest]:
    """The requests, complete. Raises InvalidRequestError with every problem of all of them, or
    InsufficientMemoryError with what would fit."""
    complete = [request.complete(adapter.defaults) for request in requests]
    problems = [] if requests else ["there is no prompt"]
    for number, request in enumerate(complete, start=1):
        prefix = f"prompt {number}: " if len(requests) > 1 else ""
        problems += [prefix + text for text in check_request(request, adapter)]
    if problems:
        raise InvalidRequestError(problems)
    _check_memory(complete, adapter, device, precision)
    return [r if r.seed is not None else dataclasses.replace(r, seed=secrets.randbelow(2**32)) for r in complete]


def _check_memory(requests: Sequence[VideoRequest], adapter: ModelAdapter, device: str, precision: Precision) -> None:
    rules, free = adapter.size_rules, available_bytes(device)
    ladder = SizeLadder(frame_step=rules.frame_step, size_multiple=rules.size_multiple)
    problems = [memory_problem(r, lambda smaller: adapter.cost(smaller, precision), free, ladder) for r in requests]
    if found := [text for text in dict.fromkeys(problems) if text is not None]:
        raise InsufficientMemoryError("\n".join(found))
