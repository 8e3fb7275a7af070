"""What one rank measures for `pipedit profile`: rates of its device, and of the exchange with the other ranks.

All ranks measure at the same time, as they compute at the same time: cores, memory and links are shared then too.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

_CALLS_PER_LAYER = 100  # of kernels: projections, norms, rotations, gates; counted in blocks of Wan and HunyuanVideo
_LEAST_REPEATS, _MOST_REPEATS = 3, 200
_BLOCK_CALLS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured. `linear`: (tokens, width), to four times the width. `attention`: (heads, tokens, head_dim).
    `convolution`: (channels, frames, side), 3 x 3 x 3."""

    linear: tuple[tuple[int, int], ...]
    attention: tuple[tuple[int, int, int], ...]
    convolution: tuple[tuple[int, int, int], ...]
    copied_bytes: int
    exchanged_bytes: int


FOR_CPU = Sizes(
    linear=((256, 512), (1024, 768), (1024, 1536)),
    attention=((4, 1024, 64), (2, 2048, 64), (1, 2048, 128)),
    convolution=((32, 4, 48), (64, 4, 48), (96, 4, 64)),
    copied_bytes=1 << 26,
    exchanged_bytes=1 << 23,
)
FOR_GPU = Sizes(
    linear=((4096, 3072), (16384, 3072), (16384, 5120)),
    attention=((3, 16384, 128), (6, 32768, 128), (3, 65536, 128)),
    convolution=((128, 9, 128), (256, 9, 128), (512, 5, 64)),
    copied_bytes=1 << 29,
    exchanged_bytes=1 << 27,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """`device`: cpu or cuda:N. `each_s`: how long one thing is measured, about. `others`: there are other ranks."""

    device: str
    dtype: torch.dtype
    each_s: float
    others: bool

    @property
    def sizes(self) -> Sizes:
        return FOR_CPU if self.device == "cpu" else FOR_GPU

    def measure(self) -> dict[str, float]:
        """Name of a field of plan.hardware's Device or Link -> its value."""
        found = self._rates()
        if self.others:
            found |= self._links()
        return found

    def _rates(self) -> dict[str, float]:
        plain, masked = ([rate for _, rate in self._attention(masked=masked)] for masked in (False, True))
        memory = self._copy_rate(self._values(self.sizes.copied_bytes))
        return {
            "linear_per_s": statistics.median(self._linear()),
            "attention_per_s": statistics.median(plain),
            "masked_attention": statistics.median(b / a for a, b in zip(plain, masked, strict=True)),
            "convolution_per_s": statistics.median(self._convolution()),
            "memory_bytes_per_s": 2 * memory,  # a copy reads and writes
            "host_bytes_per_s": memory if self.device == "cpu" else self._from_host(),
            "layer_overhead_s": _CALLS_PER_LAYER * self._call_s(),
        }

    def _linear(self) -> Iterator[float]:
        for tokens, width in self.sizes.linear:
            x, weight = self._random(tokens, width), self._random(4 * width, width)
            yield 8 * tokens * width**2 / self._seconds(lambda x=x, weight=weight: F.linear(x, weight))  # type: ignore[misc]

    def _attention(self, *, masked: bool) -> Iterator[tuple[int, float]]:
        for heads, tokens, dim in self.sizes.attention:
            q, k, v = (self._random(1, heads, tokens, dim) for _ in range(3))
            mask = torch.zeros(1, 1, 1, tokens, device=self.device, dtype=self.dtype) if masked else None

            def run(q: Any = q, k: Any = k, v: Any = v, mask: Any = mask) -> torch.Tensor:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

            yield tokens, 4 * heads * tokens**2 * dim / self._seconds(run)

    def _convolution(self) -> Iterator[float]:
        for channels, frames, side in self.sizes.convolution:
            x, weight = self._random(1, channels, frames, side, side), self._random(channels, channels, 3, 3, 3)
            seconds = self._seconds(lambda x=x, weight=weight: F.conv3d(x, weight, padding=1))  # type: ignore[misc]
            yield 2 * 27 * channels**2 * frames * side**2 / seconds

    def _copy_rate(self, source: torch.Tensor) -> float:
        target = torch.empty_like(source, device=self.device)
        return source.nbytes / self._seconds(lambda: target.copy_(source))

    def _from_host(self) -> float:
        return self._copy_rate(torch.empty(self.sizes.copied_bytes, dtype=torch.uint8).pin_memory())

    def _call_s(self) -> float:
        """One call on next to nothing, in a row of many, so that a GPU is kept busy as a layer keeps it."""
        x = self._random(16, 16)

        def run() -> torch.Tensor:
            y = x
            for _ in range(_BLOCK_CALLS):
                y = y + x
            return y

        return self._seconds(run) / _BLOCK_CALLS

    # -- with the other ranks ------------------------------------------------------------------------------------

    def _links(self) -> dict[str, float]:
        """An all-to-all, a swap with the neighbours, and exchanges of next to nothing."""
        size = dist.get_world_size()
        everybody = range(1, size)
        large, small = self.sizes.exchanged_bytes // (size - 1), 64
        return {
            "bytes_per_s": large * (size - 1) / self._exchange_s(large, everybody),
            "neighbour_bytes_per_s": self.sizes.exchanged_bytes / self._exchange_s(self.sizes.exchanged_bytes, (1,)),
            "latency_s": self._exchange_s(small, everybody),
        }

    def _exchange_s(self, num_bytes: int, distances: Any) -> float:
        """Everybody sends so many bytes to the ranks at these distances, and receives as many."""
        rank, size = dist.get_rank(), dist.get_world_size()
        buffers = {
            distance: (self._values(num_bytes), torch.empty(num_bytes, dtype=torch.uint8, device=self.device))
            for distance in distances
        }

        def run() -> None:
            receives = [dist.P2POp(dist.irecv, b, (rank - d) % size) for d, (_, b) in buffers.items()]
            sends = [dist.P2POp(dist.isend, a, (rank + d) % size) for d, (a, _) in buffers.items()]
            for work in dist.batch_isend_irecv([*receives, *sends]):
                work.wait()

        return self._seconds(run, together=True)

    # -- the clock -----------------------------------------------------------------------------------------------

    def _seconds(self, run: Callable[[], Any], *, together: bool = False) -> float:
        """Median of several runs after one that does not count. `together`: all ranks run as often, and at once."""
        run()
        self._synchronize()
        taken: list[float] = []
        began = time.perf_counter()
        while not _is_enough(taken, time.perf_counter() - began, None if together else self.each_s):
            if together:
                dist.barrier()
            start = time.perf_counter()
            run()
            self._synchronize()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def _synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def _values(self, num_bytes: int) -> torch.Tensor:
        return torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=self.device)


_TOGETHER_REPEATS = 15


def _is_enough(taken: list[float], elapsed_s: float, each_s: float | None) -> bool:
    if each_s is None:
        return len(taken) >= _TOGETHER_REPEATS
    return len(taken) >= _MOST_REPEATS or (len(taken) >= _LEAST_REPEATS and elapsed_s >= each_s)


def mean(answers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of what all ranks measured."""
    return {name: statistics.mean(answer[name] for answer in answers) for name in answers[0]}
