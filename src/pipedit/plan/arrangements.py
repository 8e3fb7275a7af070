"""Every way in which workers can make videos: who does what, and with which degrees. Knows no times and no memory."""

import dataclasses
import enum
import itertools
import math
from collections.abc import Iterator, Sequence

from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Placement, Role
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.degrees import Wanted, legal_configs
from pipedit.plan.planned_video import PlannedVideo, can_share
from pipedit.plan.scheduler import Policy

_FEW_WORKERS = 16  # up to here, every number of workers is tried
MOST_TOGETHER = 64  # workers of one engine; of more, several engines are the better way
_DEGREES_EACH = 8  # combinations of degrees for a number of denoisers, the most promising ones


class Kind(enum.StrEnum):
    """Simple ones first: that decides between equals."""

    COLOCATED = "colocated"
    SERIAL = "colocated, one decodes"
    DISAGGREGATED = "disaggregated"
    OFFLOADED = "colocated, offloaded"
    OFFLOADED_SERIAL = "colocated, offloaded, one decodes"  # the baseline of PipeDiT (section 4)

    @property
    def is_colocated(self) -> bool:
        return self is not Kind.DISAGGREGATED

    @property
    def is_offloaded(self) -> bool:
        return self in (Kind.OFFLOADED, Kind.OFFLOADED_SERIAL)

    @property
    def is_serial(self) -> bool:
        return self in (Kind.SERIAL, Kind.OFFLOADED_SERIAL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrangement:
    """One way to run. `degrees` are given for all videos alike, or left open, and then chosen for each."""

    kind: Kind
    placement: Placement
    degrees: Wanted
    aco: AcoMode = AcoMode.OFF

    @property
    def num_workers(self) -> int:
        return len(self.placement.world)

    @property
    def encoder(self) -> Role | None:
        """Which of two groups encodes prompts; None where there is one group."""
        if self.kind is not Kind.DISAGGREGATED:
            return None
        return Role.DENOISER if self.placement.encodes_locally else Role.DECODER

    @property
    def policy(self) -> Policy:
        return Policy(aco=self.aco)

    def sharing(self, video: PlannedVideo) -> ParallelConfig:
        return video.sharing(self.degrees, len(self.placement.denoisers))

    def simplicity(self) -> tuple[int, int, bool, int]:
        """The smaller, the simpler: decides between ways that take as long."""
        shares = tuple(Kind).index(self.kind)
        return shares, len(self.placement.decoders), self.aco is not AcoMode.OFF, self.num_workers

    def describe(self) -> str:
        """Who does what, such as "7 denoise, 1 encodes and decodes"."""
        denoise, decode = len(self.placement.denoisers), len(self.placement.decoders)
        if self.kind is not Kind.DISAGGREGATED:
            workers = "1 worker does" if denoise == 1 else f"{denoise} workers do"
            decoding = f"{workers} everything" if not self.kind.is_serial else f"{workers} everything, one decodes"
            return f"{decoding}, weights wait in host memory" if self.kind.is_offloaded else decoding
        works = "encodes and decodes" if self.encoder is Role.DECODER else "decodes"
        several = works.replace("s", "") if decode > 1 else works
        with_text = "encode and denoise" if self.encoder is Role.DENOISER else "denoise"
        first = with_text if denoise > 1 else with_text.replace("encode ", "encodes ").replace("denoise", "denoises")
        return f"{denoise} {first}, {decode} {several}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What somebody has laid down; the rest is open. `kinds` are those that may be taken. `default_degrees`: those
    that are open are what `plan.degrees.choose` takes, so they are not compared. `fewer`: workers may be left without
    work where that is as fast."""

    kinds: frozenset[Kind] = frozenset(Kind)
    denoise_workers: int | None = None
    decode_workers: int | None = None
    encoder: Role | None = None
    aco: tuple[AcoMode, ...] = (AcoMode.OFF, AcoMode.AUTO)
    degrees: Wanted = dataclasses.field(default_factory=Wanted)
    default_degrees: bool = False
    fewer: bool = False


def arrangements(num_workers: int, videos: Sequence[PlannedVideo], asked: Asked | None = None) -> Iterator[Arrangement]:
    """All that can share these videos; whether they fit into memory is another question. Where fewer workers may be
    taken, more than MOST_TOGETHER are not."""
    asked = asked or Asked()
    if asked.fewer:
        num_workers = min(num_workers, MOST_TOGETHER)
    for workers in worker_counts(num_workers, videos, fewer=asked.fewer):
        for kind in (kind for kind in Kind if kind in asked.kinds and kind is not Kind.DISAGGREGATED):
            if asked.denoise_workers is None and not (kind.is_serial and workers == 1):
                place = Placement.serial_decode if kind.is_serial else Placement.colocated
                for degrees in degree_choices(workers, videos, asked):
                    yield Arrangement(kind=kind, placement=place(workers), degrees=degrees)
    if Kind.DISAGGREGATED in asked.kinds:
        yield from _disaggregated(num_workers, videos, asked)


def _disaggregated(num_workers: int, videos: Sequence[PlannedVideo], asked: Asked) -> Iterator[Arrangement]:
    for denoise, decode in splits(num_workers, videos, asked):
        for degrees in degree_choices(denoise, videos, asked):
            for encoder, aco in itertools.product((Role.DECODER, Role.DENOISER), asked.aco):
                if asked.encoder in (None, encoder) and (aco is AcoMode.OFF or may_help(videos, degrees, denoise)):
                    placement = Placement.disaggregated(denoise=denoise, decode=decode, encoder=encoder)
                    yield Arrangement(kind=Kind.DISAGGREGATED, placement=placement, degrees=degrees, aco=aco)


def splits(num_workers: int, videos: Sequence[PlannedVideo], asked: Asked) -> list[tuple[int, int]]:
    """Numbers of denoisers and decoders. PipeDiT's rule says N_decode ~ N * T_decode / (T_decode + T_denoise); we try
    all, because degrees, memory and exchanges decide as well."""
    totals = range(2, num_workers + 1) if asked.fewer and num_workers <= _FEW_WORKERS else [num_workers]
    pairs = [
        (denoise, total - denoise)
        for total in totals
        for denoise in worker_counts(total - 1, videos, fewer=True)
        if total >= 2
    ]
    return [
        (denoise, decode)
        for denoise, decode in pairs
        if asked.denoise_workers in (None, denoise) and asked.decode_workers in (None, decode)
    ]


def worker_counts(num_workers: int, videos: Sequence[PlannedVideo], *, fewer: bool) -> list[int]:
    """Sizes of a group that shares each step. Of many workers, all of them, all but a few, and numbers by which the
    heads come out even."""
    if not fewer:
        return [num_workers]
    if num_workers <= _FEW_WORKERS:
        return list(range(1, num_workers + 1))
    even = {
        math.gcd(video.heads, ulysses) * ring * cfg
        for video in videos
        for ulysses in range(1, video.heads + 1)
        for ring in (1, 2, 4, 8)
        for cfg in (1, 2)
    }
    almost = {num_workers - few for few in (0, 1, 2, 3, 4, 6, 8, 12, 16)}
    return sorted(count for count in even | almost if 1 <= count <= num_workers)


def degree_choices(denoisers: int, videos: Sequence[PlannedVideo], asked: Asked) -> list[Wanted]:
    """Degrees with which so many denoisers can share every video, most promising first; where videos differ, first of
    all each with its own."""
    first, wanted = videos[0], asked.degrees
    can_each = all(can_share(video, wanted, denoisers) for video in videos)
    if asked.default_degrees:
        return [wanted] if can_each else []
    rows = legal_configs(denoisers, first.heads, first.uses_guidance, first.cost.latent_tokens)
    common = [
        _wanted(row.config, wanted)
        for row in rows
        if row.is_legal and wanted.admits(row.config) and all(_suits(row.config, wanted, v) for v in videos)
    ]
    if len(videos) > 1 and can_each:
        common.insert(0, wanted)
    return common[:_DEGREES_EACH]


def _suits(config: ParallelConfig, wanted: Wanted, video: PlannedVideo) -> bool:
    return can_share(video, _wanted(config, wanted), config.world_size)


def _wanted(config: ParallelConfig, wanted: Wanted) -> Wanted:
    return Wanted(
        cfg_degree=config.cfg_degree,
        ring_degree=config.ring_degree,
        ulysses_degree=config.ulysses_degree,
        pipesp_chunks=wanted.pipesp_chunks,
    )


def may_help(videos: Sequence[PlannedVideo], degrees: Wanted, denoise: int) -> bool:
    """Whether decoders can take heads: not of a ring's ranks."""
    return any(video.sharing(degrees, denoise).ring_degree == 1 for video in videos)
