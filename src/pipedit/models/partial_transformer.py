"""A run of a diffusers transformer's layers, by the transformer's own forward.

The forward goes through whatever is in the lists of layers. In place of the front stand entries, which put in what
another part computed; behind the last layer an exit leaves the forward, so that nothing of the back is computed. Knows
no model: where front, layers and back are is declared (LayerSplit).
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipedit.models.adapter import LayerSplit

# Hidden states [B, S, C] as they enter the layers -> as the part of the front gives them to the forward.
Arrange = Callable[[torch.Tensor], torch.Tensor]


def as_they_are(hidden: torch.Tensor) -> torch.Tensor:
    """The `Arrange` of a front that ends just before the layers."""
    return hidden


class PartialTransformer:
    """Changes `transformer`, of which other parameters than those of `layers` may be on the meta device: keeps these
    layers, numbered from 0, and drops what it will never run. `entries`: by the path of each part of the front, how
    its output looks; in the order in which the layers' inputs travel."""

    def __init__(self, transformer: Any, split: LayerSplit, layers: range, entries: Mapping[str, Arrange]) -> None:
        assert tuple(entries) == split.front, (tuple(entries), split.front)
        self.transformer = transformer
        self.first, self.last = split.has_front(layers), split.has_back(layers)
        self._entries: list[_Entry] = []
        if not self.first:
            self._entries = [_Entry(arrange) for arrange in entries.values()]
            for path, entry in zip(entries, self._entries, strict=True):
                setattr(transformer, path, entry)
        _keep_layers(transformer, split, layers)
        if not self.last:
            lists = _lists(split)
            getattr(transformer, lists[-1]).append(_Exit(len(entries)))
            for path in split.back:
                delattr(transformer, path)

    def run(self, given: Sequence[torch.Tensor], inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        """`given`: hidden states, one for each entry; none with the front. `inputs`: of the transformer's forward, with
        `return_dict` off. Returns hidden states, or with the back the prediction alone."""
        with self._entered(given):
            try:
                output = self.transformer(**inputs)
            except _Left as left:
                return left.hidden
        return (output[0],)

    @contextlib.contextmanager
    def _entered(self, given: Sequence[torch.Tensor]) -> Iterator[None]:
        for entry, hidden in zip(self._entries, given, strict=True):
            entry.hidden = hidden
        try:
            yield
        finally:
            for entry in self._entries:
                entry.hidden = None


def own_layers(*lists: nn.ModuleList) -> list[nn.Module]:
    """The layers in these lists, without the exit."""
    return [layer for layer in itertools.chain(*lists) if not isinstance(layer, _Exit)]


def takes_hidden_states(front: nn.Module) -> bool:
    """Whether something else than this part of the front computed what comes next."""
    return isinstance(front, _Entry)


def gives_hidden_states(layers: nn.ModuleList) -> bool:
    """Whether the forward ends behind this list, the last one."""
    return len(layers) > 0 and isinstance(layers[-1], _Exit)


class _Entry(nn.Module):
    def __init__(self, arrange: Arrange) -> None:
        super().__init__()
        self._arrange = arrange
        self.hidden: torch.Tensor | None = None  # set for one forward

    def forward(self, *_inputs: Any) -> torch.Tensor:
        assert self.hidden is not None
        return self._arrange(self.hidden)


class _Exit(nn.Module):
    """Called as a layer: the first `count` inputs are the hidden states."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def forward(self, *inputs: Any) -> None:
        raise _Left(inputs[: self._count])


class _Left(Exception):  # noqa: N818 - it is not an error
    """How a forward is left in the middle."""

    def __init__(self, hidden: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.hidden = hidden


def _lists(split: LayerSplit) -> list[str]:
    """Paths of the lists of layers, in order of execution."""
    return list(dict.fromkeys(path.rpartition(".")[0] for path in split.layers))


def _keep_layers(transformer: Any, split: LayerSplit, layers: range) -> None:
    own: dict[str, list[nn.Module]] = {path: [] for path in _lists(split)}
    for path in split.layers[layers.start : layers.stop]:
        own[path.rpartition(".")[0]].append(transformer.get_submodule(path))
    for path, kept in own.items():
        setattr(transformer, path, nn.ModuleList(kept))
