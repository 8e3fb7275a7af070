"""Attention processors of our own on a diffusers model: put on, taken off, kept out of compiled graphs."""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from pipedit.core.errors import InvalidRequestError

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """torch.compile leaves it as it is: the asynchronous handles of an exchange break graphs."""
    untouched: Callable[P, R] = torch.compiler.disable(function)
    return untouched


def replace_processors(attentions: Sequence[Any], *, expected: type, replacement: Any) -> Callable[[], None]:
    """Sets `replacement` on every attention module; returns what puts the old ones back. Raises InvalidRequestError,
    with nothing changed, where something else than diffusers' own processor with torch's attention is in use, because
    replacing it would change the video silently."""
    olds = [attention.processor for attention in attentions]
    problems = dict.fromkeys(problem for old in olds if (problem := _problem(old, expected)))
    if problems:
        raise InvalidRequestError(list(problems))
    for attention in attentions:
        attention.set_processor(replacement)

    def put_back() -> None:
        for attention, old in zip(attentions, olds, strict=True):
            attention.set_processor(old)

    return put_back


def _problem(processor: Any, expected: type) -> str | None:
    kind: Any = type(processor)
    if kind is not expected:
        return f"the attention processor {kind.__name__} cannot be spread over ranks, only {expected.__name__} can"
    if processor._parallel_config is not None:
        return "diffusers' own parallelism is enabled on this model; use either that or pipedit's"
    # Without one of its own, a processor uses the one that was set last, on any model or by the environment.
    backend = AttentionBackendName(processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0])
    if backend is not AttentionBackendName.NATIVE:
        return (
            f"the attention backend {backend.value!r} cannot be spread over ranks; unset DIFFUSERS_ATTN_BACKEND, or "
            "call set_attention_backend('native') on the transformer first"
        )
    return None
