"""Peak of live tensor memory on the meta device: what an allocator without fragmentation would need.

Fused attention is assumed (its score matrix is never in memory), as on GPUs and on the CPU.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipedit.core.shares import split_evenly


class _Allocations(TorchDispatchMode):
    """Counts the bytes of every storage from the operation that makes it until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, weakref.finalize[..., Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note(args, kwargs, counts=False)  # weights and inputs were there before
        result = func(*args, **(kwargs or {}))
        self._note(result, counts=True)
        return result

    def _note(self, *values: Any, counts: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._register(storage, storage.nbytes() if counts else 0)

    def _register(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else (kwargs or {})["query"])
        return func(*args, **(kwargs or {}))


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes of tensors made by `run` that are alive at one time. Weights made before do not count."""
    allocations = _Allocations()
    with torch.no_grad(), allocations, _FusedAttention():
        result = run()
    del result
    return allocations.peak


class AbsentGroup:
    """A group of ranks of which only one is there: what the others would send has its size and no values."""

    def __init__(self, size: int, index: int) -> None:
        self.size, self.index = size, index

    def begin(self) -> None:
        pass

    def shares(self, total: int, members: int) -> tuple[int, ...]:
        return (*split_evenly(total, members), *[0] * (self.size - members))

    def with_edges(self, tensors: Sequence[torch.Tensor], members: int) -> list[torch.Tensor]:
        neighbours = [self.index > 0, True, self.index + 1 < members]

        def extended(x: torch.Tensor) -> torch.Tensor:
            row = torch.empty_like(x[..., :1, :])
            return torch.cat([part for part, there in zip((row, x, row), neighbours, strict=True) if there], dim=-2)

        return [extended(x) for x in tensors]

    def gather_rows(self, tensor: torch.Tensor, shares: Sequence[int]) -> torch.Tensor:
        others = [tensor.new_empty(*tensor.shape[:-2], rows, tensor.shape[-1]) for rows in shares]
        return torch.cat([*others[: self.index], tensor, *others[self.index + 1 :]], dim=-2)

    def collect(self, own: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor] | None:
        return [own, *(own.new_empty(count) for count in counts[1:])] if self.index == 0 else None

    def pass_on(self, outgoing: torch.Tensor | None, incoming: torch.Tensor | None) -> None:
        pass
