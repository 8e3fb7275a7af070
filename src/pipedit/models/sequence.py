"""How a model takes part in sequence parallelism: which tensors are cut, which are gathered, and what an attention site
tells. A strategy (see pipedit.parallel) is handed in; no model knows which one it is.

`attach` puts hooks and attention processors on a diffusers transformer and returns what takes them off again.

Shape legend: B batch, S latent tokens of all ranks, s those of this rank, T text tokens, N heads, n some of them, D
head width.
"""

import abc
import contextlib
import dataclasses
import enum
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    Text = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v, each [B, T, n, D]


class AttentionCall(abc.ABC):
    """One self-attention of one layer, as this rank sees it. A strategy asks for heads in the order that suits it.

    Every slice is a run of consecutive heads. Implementations may compute all heads at the first question and keep
    them (where a norm spans all heads), or only the ones that are asked for.
    """

    heads: int
    head_dim: int
    dtype: "torch.dtype"
    batch: int
    local_tokens: int
    text_tokens: int = 0  # replicated on every rank; keys and queries after all latent tokens
    text_mask: "torch.Tensor | None" = None  # [B, T] bool, True where the text token is a key; None: all are

    @abc.abstractmethod
    def value(self, heads: slice) -> "torch.Tensor":
        """[B, s, n, D]; needs neither norm nor position, so it is ready first."""

    @abc.abstractmethod
    def key(self, heads: slice) -> "torch.Tensor":
        """[B, s, n, D], normalised and rotated."""

    @abc.abstractmethod
    def query(self, heads: slice) -> "torch.Tensor":
        """[B, s, n, D], normalised and rotated."""

    def text(self, heads: slice) -> "Text":
        """Query, key and value of the text, [B, T, n, D] each. Only where `text_tokens` is not 0."""
        raise AssertionError("this site has no joint text")


class Attended(Protocol):
    """What comes out for a run of heads: `latents` [B, s, n, D] of this rank's tokens, `text` [B, T, n, D]."""

    @property
    def heads(self) -> slice: ...
    @property
    def latents(self) -> "torch.Tensor": ...
    @property
    def text(self) -> "torch.Tensor | None": ...


class SequenceParallel(Protocol):
    """What a strategy offers to a model."""

    def begin_forward(self, tokens: int) -> None:
        """Before each forward of a transformer: how many latent tokens all ranks together have. Raises
        InvalidRequestError if there are fewer than ranks."""

    def shard(self, tensor: "torch.Tensor", dim: int) -> "torch.Tensor":
        """This rank's rows of a tensor that all ranks have, whose `dim` counts all latent tokens."""

    def gather(self, tensor: "torch.Tensor", dim: int) -> "torch.Tensor":
        """All rows, from each rank's own; the inverse of `shard`."""

    def attend(self, call: AttentionCall) -> Iterator[Attended]:
        """Runs one attention; yields runs of heads in ascending order, as they become ready. Covers every head once.
        The tensors are valid until the next one is asked for."""


class Side(enum.Enum):
    INPUT = "input"
    OUTPUT = "output"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """A tensor to shard: at `module` (path below the transformer), among its positional inputs or its outputs at
    `index` (None: every tensor of the output), along `dim`."""

    module: str
    side: Side
    dim: int
    index: int | None = None


class SequenceBinding(abc.ABC):
    """How one transformer class falls into tokens. Subclasses live beside their model family."""

    @abc.abstractmethod
    def latent_tokens(self, inputs: Mapping[str, Any]) -> int:
        """S, from the inputs of the transformer's forward by name."""

    def prepare_inputs(self, inputs: dict[str, Any], parallel: SequenceParallel) -> dict[str, Any]:
        """The forward's inputs as this rank needs them: text trimmed, per-token timesteps sharded. Called after
        `begin_forward`."""
        return inputs

    @abc.abstractmethod
    def cuts(self) -> Sequence[Cut]: ...

    @property
    @abc.abstractmethod
    def gathered(self) -> str | None:
        """Path of the module whose output holds this rank's tokens along dim 1 and is gathered. None where the
        transformer ends with hidden states for another one: those stay this rank's."""

    @abc.abstractmethod
    def install_processors(self, parallel: SequenceParallel) -> Callable[[], None]:
        """Puts processors on every attention site; returns what puts the old ones back."""


def attach(transformer: "torch.nn.Module", binding: SequenceBinding, parallel: SequenceParallel) -> Callable[[], None]:
    """Makes the transformer run on this rank's tokens; its inputs and outputs stay whole and equal on every rank (but
    hidden states of a partial transformer: those are this rank's rows on both ends). Returns the function that leaves
    it as it was."""
    with contextlib.ExitStack() as undo:
        undo.callback(binding.install_processors(parallel))
        undo.callback(_hook_root(transformer, binding, parallel))
        for cut in binding.cuts():
            undo.callback(_hook_cut(transformer.get_submodule(cut.module), cut, parallel))
        if binding.gathered is not None:
            last = transformer.get_submodule(binding.gathered)
            handle = last.register_forward_hook(lambda _module, _inputs, output: parallel.gather(output, 1))
            undo.callback(handle.remove)
        return undo.pop_all().close


def _hook_root(
    transformer: "torch.nn.Module", binding: SequenceBinding, parallel: SequenceParallel
) -> Callable[[], None]:
    names = _parameter_names(transformer)

    def before(
        _module: "torch.nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        parallel.begin_forward(binding.latent_tokens(inputs))
        return (), binding.prepare_inputs(inputs, parallel)

    return transformer.register_forward_pre_hook(before, with_kwargs=True).remove


def _parameter_names(transformer: "torch.nn.Module") -> list[str]:
    return list(inspect.signature(transformer.forward).parameters)


def _hook_cut(module: "torch.nn.Module", cut: Cut, parallel: SequenceParallel) -> Callable[[], None]:
    if cut.side is Side.INPUT:

        def before(_module: "torch.nn.Module", inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            assert cut.index is not None, cut
            return tuple(parallel.shard(x, cut.dim) if i == cut.index else x for i, x in enumerate(inputs))

        return module.register_forward_pre_hook(before).remove

    def after(_module: "torch.nn.Module", _inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(parallel.shard(x, cut.dim) if cut.index in (None, i) else x for i, x in enumerate(output))
        return parallel.shard(output, cut.dim)

    return module.register_forward_hook(after).remove
