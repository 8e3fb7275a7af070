"""Linear layers of an attention, run by run of heads, so that a projection can overlap an exchange.

Only plain linear layers are opened; everything else (LoRA, quantised or offloaded weights, hooks) is called as it is,
once and whole, and its result is cut.

Shape legend: B batch, s tokens of this rank, N heads, n some of them, D head width, C hidden width.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn


class HeadProjection:
    """`linear` applied to `rows` [B, s, C], for the heads that are asked for. `first_head`: where the heads start in
    the output of a linear layer that makes several things at once (fused query, key, value)."""

    def __init__(self, linear: Any, rows: torch.Tensor, head_dim: int, *, first_head: int = 0) -> None:
        self._linear, self._rows, self._head_dim, self._first_head = linear, rows, head_dim, first_head
        self._whole: torch.Tensor | None = None

    def __call__(self, heads: slice) -> torch.Tensor:
        """[B, s, n, D]. Memory: the result; where the layer cannot be opened, the result for all heads is kept."""
        first, last = (self._first_head + head for head in (heads.start, heads.stop))
        wanted = slice(first * self._head_dim, last * self._head_dim)
        if _is_plain(self._linear) and wanted != slice(0, self._linear.out_features):
            bias = None if self._linear.bias is None else self._linear.bias[wanted]
            some: torch.Tensor = F.linear(self._rows, self._linear.weight[wanted], bias)
            return self._by_head(some)
        whole = self._by_head(self._linear(self._rows)) if self._whole is None else self._whole
        if whole.shape[2] > last - first:  # there are others to be asked for
            self._whole = whole
        return whole[:, :, first:last]

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(*rows.shape[:2], -1, self._head_dim)


class HeadSink(Protocol):
    """Takes runs of heads [B, s, n, D] in any order, each head once, and keeps none of the tensors."""

    def add(self, heads: slice, rows: torch.Tensor) -> None: ...

    def result(self) -> torch.Tensor:
        """[B, s, C]."""


class HeadRows:
    """Puts the runs side by side."""

    def __init__(self, heads: int) -> None:
        self._heads = heads
        self._rows: torch.Tensor | None = None

    def add(self, heads: slice, rows: torch.Tensor) -> None:
        if self._rows is None:
            batch, tokens, _, head_dim = rows.shape
            self._rows = rows.new_empty(batch, tokens, self._heads, head_dim)
        self._rows[:, :, heads] = rows

    def result(self) -> torch.Tensor:
        assert self._rows is not None
        return self._rows.flatten(2)


class OutputProjection:
    """`linear` over all heads, as the sum of what each run contributes: the projection of a run overlaps the exchange
    of the next one. In half precision the sum is rounded once a run instead of once."""

    def __init__(self, linear: Any, heads: int) -> None:
        self._linear, self._heads = linear, heads
        self._gathered = None if _is_plain(linear) else HeadRows(heads)
        self._sum: torch.Tensor | None = None

    def add(self, heads: slice, rows: torch.Tensor) -> None:
        if heads == slice(0, self._heads):
            self._sum = self._linear(rows.flatten(2))
        elif self._gathered is not None:
            self._gathered.add(heads, rows)
        else:
            self._accumulate(heads, rows)

    def _accumulate(self, heads: slice, rows: torch.Tensor) -> None:
        head_dim = rows.shape[-1]
        weight = self._linear.weight[:, heads.start * head_dim : heads.stop * head_dim]
        if self._sum is None:
            self._sum = F.linear(rows.flatten(2), weight, self._linear.bias)
        else:
            self._sum.view(-1, self._sum.shape[-1]).addmm_(rows.flatten(2).flatten(0, 1), weight.T)

    def result(self) -> torch.Tensor:
        if self._sum is None:
            assert self._gathered is not None
            self._sum = self._linear(self._gathered.result())
        return self._sum


def _is_plain(linear: Any) -> bool:
    """Whether calling it is `F.linear` with its weight and nothing else."""
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter  # quantised weights are subclasses
        and "forward" not in vars(linear)  # offloading puts one there
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
    )
