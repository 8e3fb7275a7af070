"""What a module looks like from outside: to show that attaching and detaching leaves nothing behind."""

from typing import Any

from torch import nn

_ADDED_BY_PIPELINES = {"_diffusers_hook"}  # by the first call of any diffusers pipeline


def state_of(module: nn.Module) -> dict[str, Any]:
    """Classes, hooks, processors and attributes of the module and everything in it. Equal before and after."""
    return {
        name: (
            type(part),
            dict(part._forward_hooks),
            dict(part._forward_pre_hooks),
            sorted(vars(part).keys() - _ADDED_BY_PIPELINES),
            getattr(part, "processor", None),
        )
        for name, part in module.named_modules()
    }
