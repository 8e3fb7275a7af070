"""Attention over a window in time: keys and values of neighbouring blocks of frames join a forward pass's own
(DualParal, arXiv 2505.21070, section 3; here with entries for both neighbours).

An entry is what one forward pass leaves for another: for each of its attentions, keys and values of a few of its
latent frames. Keys are kept as they were rotated, and turned on by the distance between the two windows when they are
read, because rotary positions only count as differences. Every entry is read exactly once.

Shape legend: B batch, n heads, Q query rows, S latent tokens of the window, T text tokens, c tokens of an entry,
D head width.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch

from pipedit.core.blocks import Storage
from pipedit.parallel.kernels import attention

_LEVELS = 127  # of int8, symmetric


@dataclasses.dataclass(frozen=True, kw_only=True)
class Take:
    """An entry to read, and by how many latent frames its keys are turned."""

    entry: Hashable
    turned: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """An entry to leave: of the window's latent tokens, the run from `first` to `stop`."""

    entry: Hashable
    first: int
    stop: int


Parts = dict[str, torch.Tensor]  # what is kept of a tensor, by name


class _Stored(Protocol):
    def load(self, like: torch.Tensor) -> torch.Tensor:
        """As it was stored, on the device and in the type of `like`."""

    @property
    def nbytes(self) -> int: ...

    @property
    def parts(self) -> Parts: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Whole:
    """On the device, or in host memory."""

    tensor: torch.Tensor

    @classmethod
    def on_device(cls, tensor: torch.Tensor) -> "_Whole":
        return cls(tensor=tensor.clone(memory_format=torch.contiguous_format))

    @classmethod
    def on_host(cls, tensor: torch.Tensor) -> "_Whole":
        home = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return cls(tensor=home.copy_(tensor, non_blocking=True))

    def load(self, like: torch.Tensor) -> torch.Tensor:
        return self.tensor.to(like.device, non_blocking=True)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def parts(self) -> Parts:
        return {"whole": self.tensor}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Quantized:
    levels: torch.Tensor  # int8 [B, n, c, D]
    scales: torch.Tensor  # float32 [B, n, c, 1]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_Quantized":
        scales = tensor.float().abs().amax(dim=-1, keepdim=True) / _LEVELS
        levels = (tensor.float() / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        return cls(levels=levels, scales=scales)

    def load(self, like: torch.Tensor) -> torch.Tensor:
        return (self.levels.float() * self.scales).to(like.dtype)

    @property
    def nbytes(self) -> int:
        return self.levels.nbytes + self.scales.nbytes

    @property
    def parts(self) -> Parts:
        return {"levels": self.levels, "scales": self.scales}


_STORE: dict[Storage, Callable[[torch.Tensor], _Stored]] = {
    Storage.DEVICE: _Whole.on_device,
    Storage.HOST: _Whole.on_host,
    Storage.INT8: _Quantized.of,
}
_STORE_AGAIN: dict[Storage, Callable[[Parts], _Stored]] = {  # parts that are on the device
    Storage.DEVICE: lambda parts: _Whole(tensor=parts["whole"]),
    Storage.HOST: lambda parts: _Whole.on_host(parts["whole"]),
    Storage.INT8: lambda parts: _Quantized(levels=parts["levels"], scales=parts["scales"]),
}

Turn = Callable[[torch.Tensor, int], torch.Tensor]  # rotated keys [B, n, c, D], latent frames -> keys
Layers = list[tuple[_Stored, _Stored]]  # keys and values of each attention of a forward pass, in order


class ContextAttention:
    """A kernel (see calls.py) for forward passes that take and keep entries. `begin` one, run the model, `finish`.

    Memory: the entries that wait, and during an attention one more copy of the window's keys and values. `turn` as in
    rotation.py, for the model.
    """

    def __init__(self, turn: Turn, storage: Storage = Storage.DEVICE) -> None:
        self._turn, self._store, self._store_again = turn, _STORE[storage], _STORE_AGAIN[storage]
        self._entries: dict[Hashable, Layers] = {}
        self._takes: list[tuple[Layers, int]] = []
        self._keeps: list[tuple[Keep, Layers]] = []
        self._calls: int | None = None  # attentions of the forward pass so far; None outside of one

    @property
    def entries(self) -> frozenset[Hashable]:
        """Those that wait to be read."""
        return frozenset(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layers in self._entries.values() for stored in layers for part in stored)

    def begin(self, takes: tuple[Take, ...], keeps: tuple[Keep, ...]) -> None:
        """A forward pass begins. Its entries are there, and no longer wait."""
        assert self._calls is None, "the forward pass before has not finished"
        self._takes = [(self._pop(take.entry), take.turned) for take in takes]
        self._keeps = [(keep, []) for keep in keeps]
        self._calls = 0

    def finish(self) -> None:
        """The forward pass is over; what it leaves can be read."""
        calls, self._calls = self._calls, None
        assert calls is not None and all(len(layers) == calls for layers, _ in self._takes), "attentions are missing"
        for keep, layers in self._keeps:
            assert keep.entry not in self._entries, f"nobody has read {keep.entry}"
            self._entries[keep.entry] = layers
        self._takes, self._keeps = [], []

    def _pop(self, entry: Hashable) -> Layers:
        assert entry in self._entries, f"nobody has left {entry}, or it was read before"
        return self._entries.pop(entry)

    def save(self, entry: Hashable) -> list[list[Parts]]:
        """What an entry that waits holds, as it is stored: for each attention in order, the parts of the keys and of
        the values. It goes on waiting."""
        return [[stored.parts for stored in layer] for layer in self._entries[entry]]

    def restore(self, entry: Hashable, saved: Sequence[Sequence[Parts]]) -> None:
        """An entry that was saved waits again; its parts are on the device."""
        assert entry not in self._entries, f"{entry} waits already"
        again = self._store_again
        self._entries[entry] = [(again(keys), again(values)) for keys, values in saved]

    def forget(self, is_over: Callable[[Hashable], bool]) -> None:
        """Drops the entries that nobody will read."""
        for entry in [entry for entry in self._entries if is_over(entry)]:
            del self._entries[entry]

    def abandon(self) -> None:
        """Drops everything, after a failure in the middle of a forward pass too."""
        self._entries.clear()
        self._takes, self._keeps, self._calls = [], [], None

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """query [B, n, Q, D], key and value [B, n, S + T, D] (latents first), mask [B, 1, 1, S + T] -> [B, n, Q, D]."""
        assert self._calls is not None, "no forward pass has begun"
        number, self._calls = self._calls, self._calls + 1
        for keep, layers in self._keeps:
            rows = slice(keep.first, keep.stop)
            layers.append((self._store(key[:, :, rows]), self._store(value[:, :, rows])))
        assert all(number < len(layers) for layers, _ in self._takes), "more attentions than left the entry"
        given = [(layers[number], turned) for layers, turned in self._takes]
        if not given:
            return attention(query, key, value, mask)
        keys = [key, *(self._turn(stored[0].load(key), turned) for stored, turned in given)]
        values = [value, *(stored[1].load(value) for stored, _ in given)]
        key = torch.cat(keys, dim=2)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(*mask.shape[:3], key.shape[2] - mask.shape[3])], dim=3)
        return attention(query, key, torch.cat(values, dim=2), mask)
