"""From a diffusers transformer to how it takes part in sequence parallelism."""

import importlib
from typing import TYPE_CHECKING, Any

from pipedit.core.errors import InvalidRequestError
from pipedit.models.sequence import SequenceBinding

if TYPE_CHECKING:
    import torch

# Classes as text, so that a family is imported only where it is used.
_BINDINGS = {
    "WanTransformer3DModel": "pipedit.models.wan.sequence:WanSequenceBinding",
    "HunyuanVideoTransformer3DModel": "pipedit.models.hunyuan_video.sequence:HunyuanVideoSequenceBinding",
}


def binding_of(transformer: "torch.nn.Module") -> SequenceBinding:
    """Raises InvalidRequestError for a class that nobody wrote a binding for, for image-conditioned variants, and for
    what would go wrong unseen: a step cache decides on each rank for itself, and a graph of the whole model hides
    its parts."""
    name = type(transformer).__name__
    problems = []
    if hasattr(transformer, "_orig_mod") or transformer._compiled_call_impl is not None:
        problems.append(
            f"{name} was compiled as a whole; compile its layers instead, with transformer.compile_repeated_blocks()"
        )
    elif name not in _BINDINGS:
        problems.append(f"{name} cannot be spread over ranks yet; supported are {', '.join(_BINDINGS)}")
    if getattr(transformer, "is_cache_enabled", False):
        problems.append(f"a step cache is enabled on {name}; call transformer.disable_cache() first")
    if problems:
        raise InvalidRequestError(problems)
    module, _, attribute = _BINDINGS[name].partition(":")
    make: Any = getattr(importlib.import_module(module), attribute)
    binding: SequenceBinding = make(transformer)
    return binding
