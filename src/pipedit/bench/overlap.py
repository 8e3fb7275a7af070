"""`pipedit bench overlap`: what PipeSP hides, and what chunks of heads cost, on one device as one rank of several.

The strategy is the engine's own, at the shapes that a rank of a real group sees; the other ranks are not there, and the
link to them is emulated (see emulated_link). Projections are not part of it.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipedit.bench.bounds import ideal_seconds
from pipedit.bench.emulated_link import EmulatedChannel, EmulatedLink, open_link
from pipedit.bench.environment import environment
from pipedit.bench.sampling import Spread, interleave, ratio
from pipedit.core.errors import InvalidRequestError
from pipedit.core.shares import split_evenly
from pipedit.parallel.exchange import ExchangeShape
from pipedit.parallel.kernels import attention
from pipedit.parallel.pipesp import Lines, Overlap, PipeSP, Schedule
from pipedit.parallel.splits import chunk_heads
from pipedit.parallel.workspace import Workspace
from pipedit.worker.device import device_problems, resolve_device

_GB = 1e9  # links are sold in decimal units
_CHUNK_COUNTS = (1, 2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One attention of a model, shared by `ranks`. Tokens and heads are those of the whole model."""

    model: str
    heads: int
    head_dim: int
    latent_tokens: int
    text_tokens: int = 0
    ranks: int = 8

    @property
    def own_heads(self) -> int:
        return self.heads // self.ranks

    @property
    def chunk_counts(self) -> tuple[int, ...]:
        """1, 2, 4 and as many as there are heads here."""
        return tuple(sorted({min(count, self.own_heads) for count in (*_CHUNK_COUNTS, self.own_heads)}))

    def exchange(self, chunks: int, dtype: torch.dtype) -> ExchangeShape:
        return ExchangeShape(
            tokens=split_evenly(self.latent_tokens, self.ranks),
            chunks=chunk_heads(split_evenly(self.heads, self.ranks), chunks),
            batch=1,
            head_dim=self.head_dim,
            text_tokens=self.text_tokens,
            dtype=dtype,
        )


SITES = {
    "full": (
        Site(model="Wan 2.1 14B, 81 x 720 x 1280", heads=40, head_dim=128, latent_tokens=75_600),
        Site(model="HunyuanVideo, 129 x 720 x 1280", heads=24, head_dim=128, latent_tokens=118_800, text_tokens=256),
    ),
    "small": (
        Site(model="small, without text", heads=8, head_dim=32, latent_tokens=768, ranks=2),
        Site(model="small, with text", heads=12, head_dim=32, latent_tokens=512, text_tokens=16, ranks=4),
    ),
}
LINKS_GB_PER_S = {"full": (12.0, 25.0, 50.0, 400.0), "small": (0.1, 0.4)}
_DTYPES = {"full": torch.bfloat16, "small": torch.float32}

_EMULATION = {
    "cuda": "The other ranks do not exist. A message is a copy within this GPU's memory on a side stream of high "
    "priority, followed by a spinning thread until a link of the stated rate would have delivered it. Both directions "
    "share the link in the order of posting. Buffers, packing, attention kernels and their order are the engine's.",
    "cpu": "The other ranks do not exist, and nothing is transferred: a message is a time of arrival that the stated "
    "rate gives, and waiting for it is sleeping. A real transfer would also take processor time. For trying the bench.",
}
_NOT_MEASURED = (
    "Two processes on one device with a real exchange: NCCL refuses two ranks on one GPU (duplicate GPU), and gloo has "
    "no point-to-point transfer of CUDA tensors."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverlapBench:
    """`scale`: "full" or "small". `links_gb_per_s`: rates of the emulated link each way, in 10^9 bytes per second; none
    means the scale's own."""

    device: str = "auto"
    scale: str = "full"
    links_gb_per_s: tuple[float, ...] = ()
    rounds: int = 5


def run(bench: OverlapBench) -> dict[str, Any]:
    """JSON-ready figures. Raises InvalidRequestError for what cannot be measured here."""
    device = _check(bench)
    rates = bench.links_gb_per_s or LINKS_GB_PER_S[bench.scale]
    with torch.inference_mode():
        cases = [_Case(site, _DTYPES[bench.scale], device).measure(rates, bench.rounds) for site in SITES[bench.scale]]
    return {
        "benchmark": "overlap",
        "device": str(device),
        "scale": bench.scale,
        "rounds": bench.rounds,
        "emulation": _EMULATION[device.type],
        "not_measured": _NOT_MEASURED,
        "cases": cases,
        "environment": environment(),
    }


def _check(bench: OverlapBench) -> torch.device:
    problems = device_problems(bench.device, "auto")
    if bench.scale not in SITES:
        problems.append(f"scale {bench.scale!r} is not known; use {' or '.join(SITES)}")
    problems += [
        f"a link of {rate:g} GB/s is not possible; use a number above 0"
        for rate in bench.links_gb_per_s
        if not 0 < rate < math.inf
    ]
    if problems:
        raise InvalidRequestError(problems)
    device = torch.device(resolve_device(bench.device))
    if device.type == "cpu" and bench.scale == "full":
        raise InvalidRequestError(["scale full needs a GPU, on the CPU it would take hours; use scale small"])
    return device


class _LocalCall:
    """What a model hands to a strategy, without projections: fixed random numbers of one rank's tokens."""

    batch = 1
    text_mask = None

    def __init__(self, site: Site, dtype: torch.dtype, device: torch.device) -> None:
        self.heads, self.head_dim, self.dtype = site.heads, site.head_dim, dtype
        self.local_tokens, self.text_tokens = split_evenly(site.latent_tokens, site.ranks)[0], site.text_tokens

        def random(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            shape = (3, 1, rows, site.heads, site.head_dim)
            query, key, value = torch.randn(shape, dtype=dtype, device=device)
            return query, key, value

        self._latents, self._text = random(self.local_tokens), random(site.text_tokens)

    def query(self, heads: slice) -> torch.Tensor:
        return self._latents[0][:, :, heads]

    def key(self, heads: slice) -> torch.Tensor:
        return self._latents[1][:, :, heads]

    def value(self, heads: slice) -> torch.Tensor:
        return self._latents[2][:, :, heads]

    def text(self, heads: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = (part[:, :, heads] for part in self._text)
        return query, key, value


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Form:
    """A schedule and the name by which results call it."""

    chunks: int
    overlap: Overlap

    @property
    def schedule(self) -> Schedule:
        return Schedule(chunks=self.chunks, overlap=self.overlap)

    def name(self, link: str) -> str:
        return f"{link}, {self.chunks} {self.overlap.value}"


class _Case:
    """All measurements of one site, taken in turn."""

    def __init__(self, site: Site, dtype: torch.dtype, device: torch.device) -> None:
        self._site, self._dtype, self._device = site, dtype, device
        self._call, self._workspace = _LocalCall(site, dtype, device), Workspace(device)
        # One chunk is plain Ulysses, which blocks.
        self._forms = [_Form(chunks=n, overlap=Overlap.FULL if n > 1 else Overlap.NONE) for n in site.chunk_counts]
        if site.own_heads > 1:  # the paper's: a head at a time, only results leave in the background
            self._forms.append(_Form(chunks=site.own_heads, overlap=Overlap.OUTPUT_ONLY))

    def measure(self, rates: Sequence[float], rounds: int) -> dict[str, Any]:
        for form in self._forms:  # so that no buffer holds what memory happened to hold
            self._attend(form, open_link(self._device, math.inf))()
        busy: dict[str, list[float]] = {}
        variants = {_kernel_name(count): self._kernels(count) for count in self._site.chunk_counts}
        variants |= {form.name("no link"): self._attend(form, None) for form in self._forms}
        for rate in rates:
            link = open_link(self._device, rate * _GB)
            for form in self._forms:
                name = form.name(f"{rate:g}")
                variants[name] = self._attend(form, link, busy.setdefault(name, []))
        seconds = interleave(variants, rounds=rounds)
        plain = self._site.exchange(1, self._dtype)
        return {
            "site": {**dataclasses.asdict(self._site), "dtype": str(self._dtype).removeprefix("torch.")},
            "incoming_bytes": plain.incoming_bytes(0, 0),
            "outgoing_bytes": plain.outgoing_bytes(0, 0),
            "attention": self._attention_figures(seconds),
            "links": [self._link_figures(rate, seconds, busy) for rate in rates],
        }

    def _kernels(self, chunks: int) -> Callable[[], float]:
        """Attention alone over this rank's heads, chunk after chunk, on the layout in which they arrive."""
        shape = self._site.exchange(chunks, self._dtype)
        stored = [
            torch.randn(shape.all_rows, 1, 3, heads[0], shape.head_dim, dtype=self._dtype, device=self._device)
            for heads in shape.chunks
        ]
        views = [[packed[:, :, part].permute(1, 2, 0, 3) for part in range(3)] for packed in stored]

        def work() -> None:
            for query, key, value in views:
                attention(query, key, value)

        return lambda: self._time(work)

    def _attend(self, form: _Form, link: EmulatedLink | None, busy: list[float] | None = None) -> Callable[[], float]:
        """The whole exchange and attention once; without a link, all but the transfers."""
        inward, outward = (EmulatedChannel(self._site.ranks, link) for _ in range(2))
        shape = self._site.exchange(form.chunks, self._dtype)
        lines = Lines(inward=inward, outward=outward, workspace=self._workspace)
        strategy = PipeSP(lines, shape, form.schedule, attention)

        def work() -> None:
            for _ in strategy.attend(self._call):
                pass

        def run() -> float:
            seconds = self._time(work)
            if link is not None and busy is not None:
                busy.append(link.take_busy_s())
            return seconds

        return run

    def _time(self, work: Callable[[], None]) -> float:
        self._synchronize()
        start = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _attention_figures(self, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
        whole = seconds[_kernel_name(1)]
        figures = []
        for count in self._site.chunk_counts:
            taken = seconds[_kernel_name(count)]
            slower = dataclasses.asdict(ratio(taken, whole))
            figures.append({"chunks": count, "seconds": dataclasses.asdict(Spread.of(taken)), "over_one": slower})
        return figures

    def _link_figures(
        self, rate: float, seconds: dict[str, list[float]], busy: dict[str, list[float]]
    ) -> dict[str, Any]:
        plain = self._forms[0]
        compute_s = statistics.median(seconds[plain.name("no link")])
        communication_s = statistics.median(busy[plain.name(f"{rate:g}")])
        bound_s = ideal_seconds(compute_s, communication_s)
        return {
            "gb_per_s": rate,
            "compute_s": compute_s,
            "communication_s": communication_s,
            "bound_s": bound_s,
            "hideable_share": min(compute_s / communication_s, 1.0),
            "ideal_speed_up": (compute_s + communication_s) / bound_s,
            "forms": [self._form_figures(form, f"{rate:g}", bound_s, seconds, busy) for form in self._forms],
        }

    def _form_figures(
        self,
        form: _Form,
        link: str,
        bound_s: float,
        seconds: dict[str, list[float]],
        busy: dict[str, list[float]],
    ) -> dict[str, Any]:
        """`hidden_share`: of the time in which the link was busy, how much did not make the whole longer than the same
        schedule takes without a link."""
        taken, compute = seconds[form.name(link)], seconds[form.name("no link")]
        carried = busy[form.name(link)][-len(taken) :]  # the warm-up's left out
        hidden = [1 - (a - b) / c for a, b, c in zip(taken, compute, carried, strict=True)]
        return {
            "chunks": form.chunks,
            "overlap": form.overlap.value,
            "seconds": dataclasses.asdict(Spread.of(taken)),
            "compute_s": statistics.median(compute),
            "communication_s": statistics.median(carried),
            "hidden_share": dataclasses.asdict(Spread.of(hidden)),
            "speed_up": dataclasses.asdict(ratio(seconds[self._forms[0].name(link)], taken)),
            "bound_share": bound_s / statistics.median(taken),
        }


def _kernel_name(chunks: int) -> str:
    return f"kernel, {chunks}"
