"""Weights from safetensors straight to device and data type: by part, never through a second full copy.

A module is built without memory for its parameters; then only the files that hold wanted tensors are opened, and each
tensor goes to its device as it is read. Parameters outside `prefixes` stay on the meta device, so that using them by
mistake fails at once.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn

from pipedit.core.errors import CheckpointError
from pipedit.models.checkpoint import WeightFiles

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def load_module(
    build: Callable[[], ModuleT],
    weights: WeightFiles,
    *,
    device: str,
    dtype: torch.dtype,
    prefixes: tuple[str, ...] | None = None,
) -> ModuleT:
    """A module in eval mode with the wanted weights on `device` in `dtype`.

    `prefixes` are beginnings of parameter names (None: all). Parameters that the class lists in
    `_keep_in_fp32_modules` stay in float32, as diffusers keeps them. Raises CheckpointError for tensors that are
    missing, left over, or of another shape.
    """
    with init_empty_weights():  # buffers are computed, not loaded, so they stay real
        module = build()
    expected = {name: p.shape for name, p in module.named_parameters() if _is_wanted(name, prefixes)}
    _check_names(module, weights, expected)
    fp32_parts = frozenset(getattr(module, "_keep_in_fp32_modules", None) or ())
    for file, names in weights.by_file(set(expected)).items():
        try:
            with safe_open(file, framework="pt", device=device) as tensors:
                for name in names:
                    keep = not fp32_parts.isdisjoint(name.split("."))
                    tensor = tensors.get_tensor(name)
                    if tensor.shape != expected[name]:
                        has, wants = tuple(tensor.shape), tuple(expected[name])
                        raise CheckpointError(f"{file}: {name} has shape {has}, the config asks for {wants}")
                    _assign(module, name, tensor.to(torch.float32 if keep else dtype))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); download it again") from error
    for name, buffer in list(module.named_buffers()):
        parent, leaf = _parent(module, name)
        parent._buffers[leaf] = buffer.to(device)
    return module.eval()


def _is_wanted(name: str, prefixes: tuple[str, ...] | None) -> bool:
    return prefixes is None or any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _check_names(module: nn.Module, weights: WeightFiles, expected: dict[str, torch.Size]) -> None:
    missing = sorted(set(expected) - set(weights.tensors))
    known = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    ignored = tuple(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
    extra = sorted(name for name in set(weights.tensors) - known if not any(part in name for part in ignored))
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing, {missing[0]} among them")
    if extra:
        problems.append(f"{len(extra)} tensors belong to nothing, {extra[0]} among them")
    if problems:
        raise CheckpointError(f"{weights.component}: config and weights do not match: {'; '.join(problems)}")


def _assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, leaf = _parent(module, name)
    parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _parent(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
