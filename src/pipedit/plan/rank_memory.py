"""What each rank of an arrangement has to hold at its worst moment, and in words why it does not fit."""

import dataclasses
from collections.abc import Sequence

from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Role
from pipedit.core.units import format_bytes
from pipedit.plan.aco_gate import AcoMode, helper_groups, shares_with_help
from pipedit.plan.arrangements import Arrangement
from pipedit.plan.memory import Need, Room
from pipedit.plan.planned_video import PlannedVideo

_EMPTY = Room(available_bytes=0)
_PARTS = {Role.ENCODER: "text encoder", Role.DENOISER: "transformer", Role.DECODER: "VAE"}
# A helper holds queries, keys, values and the result of its heads, and twice those of the chunk that is under way.
_HELP_TENSORS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankNeed:
    """The worst of all videos for one rank. `needed_bytes` has libraries and the margin in it."""

    roles: tuple[Role, ...]
    video: PlannedVideo
    need: Need

    @property
    def needed_bytes(self) -> int:
        return _EMPTY.needed(self.need)


def rank_needs(arrangement: Arrangement, videos: Sequence[PlannedVideo]) -> tuple[RankNeed, ...]:
    """By rank. Ranks with the same roles need the same."""
    placement = arrangement.placement
    by_roles = {
        roles: max((_need(arrangement, roles, video) for video in videos), key=lambda found: found.needed_bytes)
        for roles in {placement.roles(rank) for rank in placement.world}
    }
    return tuple(by_roles[placement.roles(rank)] for rank in placement.world)


def fits(arrangement: Arrangement, needs: Sequence[RankNeed], available_bytes: int) -> bool:
    return memory_refusal(arrangement, needs, available_bytes) is None


def memory_refusal(arrangement: Arrangement, needs: Sequence[RankNeed], available_bytes: int) -> str | None:
    """None where every rank has room, else a sentence about the rank that lacks most."""
    worst = max(needs, key=lambda found: found.needed_bytes)
    if worst.needed_bytes <= available_bytes:
        return None
    held = ", ".join(_PARTS[role] for role in worst.roles)
    kept = f"the largest of {held}" if arrangement.kind.is_offloaded and len(worst.roles) > 1 else held
    return (
        f"{worst.video.title} need about {format_bytes(worst.needed_bytes)} on a worker with {kept} "
        f"({format_bytes(worst.need.weights)} of it weights), {format_bytes(available_bytes)} are there"
    )


def _need(arrangement: Arrangement, roles: Sequence[Role], video: PlannedVideo) -> RankNeed:
    """Whichever is worse: with a decode for itself, or with one that all decoders share."""
    parallel, decoders = arrangement.sharing(video), len(arrangement.placement.decoders)
    together = {decoders} if arrangement.kind.is_colocated else {1, decoders}
    costs = [video.cost_with(count) for count in sorted(together)]
    if arrangement.kind.is_offloaded:
        needs = [Need.offloaded(cost, parallel, roles=roles) for cost in costs]
    else:
        helping = help_bytes(arrangement, video) if Role.DECODER in roles else 0
        needs = [Need.of(cost, parallel, roles=roles, helping=helping) for cost in costs]
    return RankNeed(roles=tuple(roles), video=video, need=max(needs, key=_EMPTY.needed))


def help_bytes(arrangement: Arrangement, video: PlannedVideo) -> int:
    """What a decoder needs to help with the attention of this video, at most."""
    if arrangement.aco is AcoMode.OFF:
        return 0
    attention, shares = video.cost.attention, most_help(arrangement, video, arrangement.sharing(video))
    if attention is None or not shares:
        return 0
    tokens = video.cost.latent_tokens + (video.cost.text_tokens if attention.joint_text else 0)
    return shares[0][-1] * tokens * attention.head_dim * attention.element * _HELP_TENSORS


def most_help(arrangement: Arrangement, video: PlannedVideo, parallel: ParallelConfig) -> list[tuple[int, ...]]:
    """Ways to deal the heads where all decoders are idle; none where they cannot help."""
    (group, *_) = helper_groups(arrangement.placement.decoders, parallel)
    return shares_with_help(video.heads, parallel.ulysses_degree, len(group))
