"""What cannot run, and why, in the user's words: too few workers, too little memory, degrees that cannot be."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pipedit.core.parallel import ParallelConfig
from pipedit.plan.arrangements import MOST_TOGETHER, Arrangement, Asked, Kind
from pipedit.plan.degrees import Wanted, legal_configs
from pipedit.plan.planned_video import PlannedVideo
from pipedit.plan.rank_memory import RankNeed, fits, memory_refusal, rank_needs

Needs = Mapping[Arrangement, Sequence[RankNeed]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """`reason`: a sentence."""

    what: str
    reason: str


def find_refusals(
    num_workers: int, videos: Sequence[PlannedVideo], asked: Asked, needs: Needs, available_bytes: int
) -> Iterator[Refusal]:
    """Each reason once. `needs`: of all arrangements that workers could share."""
    by_reason: dict[str, list[str]] = {}
    for refusal in (
        *_count_refusals(num_workers, asked),
        *_memory_refusals(needs, available_bytes),
        *_degree_refusals(min(num_workers, MOST_TOGETHER), videos, asked.degrees),
    ):
        by_reason.setdefault(refusal.reason, []).append(refusal.what)
    for reason, whats in by_reason.items():
        yield Refusal(what="; ".join(whats), reason=reason)


def _count_refusals(num_workers: int, asked: Asked) -> Iterator[Refusal]:
    """Numbers of workers that are too small or too large for a kind."""
    if num_workers == 1 and Kind.DISAGGREGATED in asked.kinds:
        reason = "one worker cannot be divided into a group that denoises and one that decodes; it takes at least 2"
        yield Refusal(what=Kind.DISAGGREGATED, reason=reason)
    if asked.fewer and num_workers > MOST_TOGETHER:
        reason = f"so many would do little but exchange; several engines of up to {MOST_TOGETHER} do better"
        yield Refusal(what=f"one engine of more than {MOST_TOGETHER} workers", reason=reason)


def _memory_refusals(needs: Needs, available_bytes: int) -> Iterator[Refusal]:
    """One for all arrangements of a kind that fail in the same roles, with the figures of the mildest. Those of which
    some variant fits are not told, and neither are those on fewer workers."""

    def place(arrangement: Arrangement) -> object:
        return arrangement.kind, arrangement.placement

    unfit = [arrangement for arrangement, need in needs.items() if not fits(arrangement, need, available_bytes)]
    some_fit = {place(arrangement) for arrangement in needs.keys() - set(unfit)}
    num_workers = max((arrangement.num_workers for arrangement in needs), default=0)
    groups: dict[object, list[Arrangement]] = defaultdict(list)
    for arrangement in unfit:
        if arrangement.num_workers == num_workers and place(arrangement) not in some_fit:
            worst = max(needs[arrangement], key=lambda need: need.needed_bytes)
            groups[arrangement.kind, arrangement.encoder, worst.roles].append(arrangement)
    for members in groups.values():
        yield _memory_refusal(members, needs, available_bytes)


def _memory_refusal(members: Sequence[Arrangement], needs: Needs, available_bytes: int) -> Refusal:
    mildest = min(members, key=lambda arrangement: max(need.needed_bytes for need in needs[arrangement]))
    reason = memory_refusal(mildest, needs[mildest], available_bytes)
    assert reason is not None
    tiled = [need.video.tiled for need in needs[mildest] if need.video.tiled is not None]
    if tiled and fits(mildest, rank_needs(mildest, tiled), available_bytes):
        reason += "; tiling the VAE (--vae-use-tiling) would make room"
    return Refusal(what=_named(members), reason=reason)


def _named(members: Sequence[Arrangement]) -> str:
    """What the members have in common, such as "disaggregated 7+1, 6+2 (denoisers encode)"."""
    kind, encoder = members[0].kind, members[0].encoder
    if encoder is None:
        return kind
    splits = dict.fromkeys(f"{len(m.placement.denoisers)}+{len(m.placement.decoders)}" for m in members)
    return f"{kind} {', '.join(splits)} ({encoder}s encode)"


def _degree_refusals(num_workers: int, videos: Sequence[PlannedVideo], wanted: Wanted) -> list[Refusal]:
    """Combinations of degrees for this many workers that cannot run, by reason."""
    reasons: dict[str, list[ParallelConfig]] = {}
    for video in videos:
        for row in legal_configs(num_workers, video.heads, video.uses_guidance, video.cost.latent_tokens):
            if not row.is_legal and wanted.admits(row.config):
                reasons.setdefault(row.reason, []).append(row.config)
    return [Refusal(what=_counted(dict.fromkeys(configs)), reason=reason) for reason, configs in reasons.items()]


def _counted(configs: Iterable[ParallelConfig]) -> str:
    """The first, and how many others."""
    first, *others = configs
    return f"{first.describe()} and {len(others)} more" if others else first.describe()
