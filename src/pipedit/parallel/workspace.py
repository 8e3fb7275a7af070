"""Buffers that are kept from call to call: nothing is allocated in steady state, and memory is bounded by the largest
call so far."""

import math
from collections.abc import Hashable, Sequence

import torch


class Workspace:
    """Named flat buffers on one device that only grow. Whoever asks for a name again gets the same memory again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[Hashable, torch.dtype], torch.Tensor] = {}

    def take(self, name: Hashable, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of this shape, its contents undefined."""
        count, key = math.prod(shape), (name, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < count:
            self._buffers.pop(key, None)  # freed first: the old one and the new one need not be there together
            with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
                buffer = self._buffers[key] = torch.empty(count, dtype=dtype, device=self._device)
        return buffer[:count].view(*shape)

    def clear(self) -> None:
        """Lets go of all buffers. Whoever still holds a tensor keeps its memory, but nobody else will get it."""
        self._buffers.clear()

    @property
    def allocated_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())
