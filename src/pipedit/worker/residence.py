"""Where weights are: in host memory, and on the device only as long as somebody computes with them (offloading).

Knows no stages. Nothing is ever copied back: weights do not change, so the copy on the device is simply dropped.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import nn


@dataclasses.dataclass(kw_only=True)
class _Block:
    """One piece of memory, and the parameters and buffers that lie in it: tied weights share one. Those may be views
    of any form."""

    home: torch.Tensor  # its bytes in host memory
    tenants: list[torch.Tensor]

    def place(self, data: torch.Tensor) -> None:
        """Makes the tenants lie in `data`, which holds the same bytes."""
        for tenant in self.tenants:
            view = torch.empty(0, dtype=tenant.dtype, device=data.device)
            view.set_(data.untyped_storage(), tenant.storage_offset(), tenant.size(), tenant.stride())
            tenant.data = view


class Residence:
    """Modules whose weights live in host memory (for CUDA: pinned, which makes copies fast and gives up swapping).

    Memory: the weights once in host memory, where torch rounds each pinned piece up to a power of two; on `device`
    those of the modules that were brought last. On the CPU the latter is a copy too, so that it is the same program
    everywhere.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._blocks: dict[nn.Module, list[_Block]] = {}
        self._present: set[nn.Module] = set()

    def settle(self, module: nn.Module) -> None:
        """From now on the module is at home in host memory, where its weights are already. For CUDA each block of
        memory is copied into pinned memory, one after the other."""
        blocks = self._blocks[module] = list(_blocks_of(module))
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):  # pinning makes a context on the current device
                for block in blocks:
                    block.home = block.home.pin_memory()
                    block.place(block.home)

    def bring(self, modules: Iterable[nn.Module]) -> int:
        """Brings these to the device and sends all others home. Returns how many bytes were copied; waits for it."""
        wanted = set(modules)
        self._send_home(self._present - wanted)
        self._present &= wanted
        missing = wanted - self._present
        blocks = [block for module in missing for block in self._blocks[module]]
        try:
            for block in blocks:
                block.place(_copy(block.home, self._device))
            if blocks and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        except BaseException:  # no memory left, or Ctrl-C: nobody stays half here and half there
            self._send_home(missing)
            raise
        self._present = wanted
        return sum(block.home.nbytes for block in blocks)

    def clear(self) -> None:
        """Sends everybody home."""
        self.bring(())

    def _send_home(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            for block in self._blocks[module]:
                block.place(block.home)


def _blocks_of(module: nn.Module) -> Iterator[_Block]:
    """Parts that were not loaded (on the meta device) have no memory."""
    blocks: dict[int, _Block] = {}
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.is_meta or tensor.numel() == 0:
            continue
        assert tensor.device.type == "cpu", f"weights are loaded into host memory, not onto {tensor.device}"
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in blocks:
            data = torch.empty(0, dtype=torch.uint8).set_(storage)
            blocks[storage.data_ptr()] = _Block(home=data, tenants=[])
        blocks[storage.data_ptr()].tenants.append(tensor)
    yield from blocks.values()


def _copy(data: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(data, device=device).copy_(data, non_blocking=True)
