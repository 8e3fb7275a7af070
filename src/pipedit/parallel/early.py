"""Attention that starts before all keys are there: over the own ones first, over the others' when they have come.

The two lots are merged by their log-sum-exp, so the result equals whole attention up to rounding (not to the bit).
"""

from collections.abc import Sequence

import torch

from pipedit.parallel.kernels import attention_with_lse, merge
from pipedit.parallel.workspace import Workspace


class EarlyAttention:
    """`query`, `key`, `value` [B, n, R, D] are buffers that are still being filled; rows `own` of the keys and values
    are there. `mask` as in `kernels.attention`. Memory, kept in `workspace`: a sum of the query's size, in float32
    (float64 for float64)."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        own: slice,
        workspace: Workspace,
    ) -> None:
        self._query, self._key, self._value, self._mask, self._own = query, key, value, mask, own
        batch, heads, rows, width = query.shape
        dtype = torch.promote_types(query.dtype, torch.float32)
        self._total = workspace.take("early", (batch, heads, rows, width), dtype)
        self._lse = workspace.take("early lse", (batch, heads, rows), dtype)

    def add(self, rows: Sequence[slice]) -> None:
        """These query rows have come: attends to the own keys. Every row is added once."""
        for each in rows:
            if each.stop > each.start:
                out, lse = self._over(self._query[:, :, each], self._own)
                self._total[:, :, each].copy_(out)
                self._lse[:, :, each].copy_(lse)

    def finish(self) -> torch.Tensor:
        """All keys and values have come: the result [B, n, R, D] in the query's dtype."""
        for keys in (slice(0, self._own.start), slice(self._own.stop, self._key.shape[2])):
            if keys.stop > keys.start:
                merge(self._total, self._lse, *self._over(self._query, keys))
        return self._total.to(self._query.dtype)

    def _over(self, query: torch.Tensor, keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        mask = None if self._mask is None else self._mask[..., keys]
        return attention_with_lse(query, self._key[:, :, keys], self._value[:, :, keys], mask)
