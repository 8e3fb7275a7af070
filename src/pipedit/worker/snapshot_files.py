"""One rank's part of a snapshot as a file: a tree of dictionaries with text keys, lists, tensors and what JSON knows,
as safetensors, with the tree's form in the header. Nothing in it is code. Knows no meaning of what it holds.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipedit.core.errors import SnapshotError
from pipedit.core.snapshots import sync_folder
from pipedit.core.staging import Staging

_FORMAT, _VERSION = "pipedit_snapshot", "1"
_TENSOR, _AXES = "$tensor", "axes"  # in the tree's form: the name of a tensor, and how its axes lie in memory
_RENEW = "resume from another checkpoint, or start again without --resume"


def write_tree(path: Path, tree: dict[str, Any], label: Mapping[str, Any]) -> int:
    """Writes the file, which is whole or not there, and on disk when this returns; returns its bytes. `label`: of what
    it is, plain values. Raises SnapshotError where the disk refuses.

    Memory: on the CPU little more than the tree, else one copy of its tensors in host memory.
    """
    tensors = _Tensors()
    form = {"label": dict(label), "tree": tensors.put_away(tree)}
    metadata = {_FORMAT: _VERSION, "form": json.dumps(form, allow_nan=False)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Staging(path.parent)
        try:
            staged = staging.path(path.name)
            save_file(tensors.named, staged, metadata=metadata)
            with staged.open("rb+") as file:
                os.fsync(file.fileno())
                num_bytes = file.seek(0, os.SEEK_END)
            staging.publish()
        finally:
            staging.discard()
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"{path} could not be written: {error}; the checkpoint before it is still whole") from error
    return num_bytes


def read_tree(path: Path, label: Mapping[str, Any]) -> dict[str, Any]:
    """The tree, in host memory of its own. Raises SnapshotError for a file that is missing, torn, foreign, or whose
    label holds other values under the names of `label`."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get(_FORMAT) != _VERSION:
                raise SnapshotError(f"{path} is no part of a checkpoint that this pipedit can read; {_RENEW}")
            form = json.loads(metadata["form"])
            names = file.keys()
            tensors = {name: _own(file.get_tensor(name)) for name in names}
        _compare(path, form["label"], label)
        tree: dict[str, Any] = _built(form["tree"], tensors)
    except FileNotFoundError as error:
        raise SnapshotError(f"{path} is missing; {_RENEW}") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"{path} is torn or no file of pipedit ({error}); {_RENEW}") from error
    return tree


def on_device(tree: Any, device: str) -> Any:
    """The tree with its tensors there; those that are there already are not copied."""
    match tree:
        case torch.Tensor():
            return tree.to(device)
        case dict():
            return {key: on_device(value, device) for key, value in tree.items()}
        case list():
            return [on_device(value, device) for value in tree]
    return tree


class _Tensors:
    """Takes tensors out of a tree and names them. None shares memory with another, as the format demands; one that
    comes twice is kept once."""

    def __init__(self) -> None:
        self.named: dict[str, torch.Tensor] = {}
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._storages: set[int] = set()

    def put_away(self, tree: Any) -> Any:
        match tree:
            case torch.Tensor():
                return self._put(tree)
            case dict():
                assert _TENSOR not in tree and all(isinstance(key, str) for key in tree), tree.keys()
                return {key: self.put_away(value) for key, value in tree.items()}
            case list():
                return [self.put_away(value) for value in tree]
        assert tree is None or isinstance(tree, (bool, int, float, str)), type(tree)
        return tree

    def _put(self, tensor: torch.Tensor) -> dict[str, Any]:
        identity = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or identity not in self._known:
            self._known[identity] = self._put_new(tensor)
        return self._known[identity]

    def _put_new(self, tensor: torch.Tensor) -> dict[str, Any]:
        axes = _axes(tensor)
        name, data = str(len(self.named)), tensor.permute(axes).contiguous().cpu()
        storage = data.untyped_storage()
        if storage.nbytes() != data.nbytes or storage.data_ptr() in self._storages:
            data = data.clone()
        self._storages.add(data.untyped_storage().data_ptr())
        self.named[name] = data
        return {_TENSOR: name, _AXES: axes}


def _axes(tensor: torch.Tensor) -> list[int]:
    """The tensor's axes from the outermost in memory to the innermost. Kernels choose their way by it, and with the way
    the last bits of a result. Tensors with gaps count as others do."""
    natural = list(range(tensor.ndim))
    if tensor.is_contiguous():
        return natural
    strides = tensor.stride()
    by_stride = sorted(natural, key=lambda axis: -strides[axis])
    return by_stride if tensor.permute(by_stride).is_contiguous() else natural


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in fresh memory: what was read lies in the file, at any address, and goes with it."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)


def _built(form: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    match form:
        case {"$tensor": name, "axes": axes}:
            back = sorted(range(len(axes)), key=lambda axis: axes[axis])
            return tensors[name].permute(back)
        case dict():
            return {key: _built(value, tensors) for key, value in form.items()}
        case list():
            return [_built(value, tensors) for value in form]
    return form


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """JSON turns tuples into lists, and what was asked for has gone through it too."""
    plain = json.loads(json.dumps(dict(wanted)))
    others = [name for name, value in plain.items() if found.get(name) != value]
    if others:
        raise SnapshotError(f"{path} was saved by another run: its {' and '.join(others)} differ; {_RENEW}")
