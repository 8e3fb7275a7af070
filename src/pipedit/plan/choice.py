"""What `--strategy auto` takes for the requests at hand, and why, in a sentence."""

import dataclasses
from collections.abc import Sequence

from pipedit.core.units import format_seconds
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.arrangements import Arrangement, Asked, Kind, arrangements
from pipedit.plan.estimate import DurationsOf
from pipedit.plan.planned_video import PlannedVideo, total_count
from pipedit.plan.planner import Proposal, make_plan
from pipedit.plan.rank_memory import memory_refusal, rank_needs

MARGIN = 0.03  # predictions are not better than that: what promises less stays with the simpler way
_WITHOUT_PREDICTION = (Kind.COLOCATED, Kind.DISAGGREGATED, Kind.OFFLOADED, Kind.SERIAL, Kind.OFFLOADED_SERIAL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """`arrangement.policy` and `arrangement.kind.is_offloaded` belong to it. `proposal`: with its prediction, where
    there was something to compare. `fits`: whether memory allows any of what was asked for; else nothing does, and
    this is the plainest."""

    arrangement: Arrangement
    reason: str
    proposal: Proposal | None = None
    fits: bool = True


def choose_placement(
    videos: Sequence[PlannedVideo],
    num_workers: int,
    *,
    available_bytes: int,
    durations_of: DurationsOf | None = None,
    asked: Asked | None = None,
) -> Choice:
    """For these videos, all handed in at once. `available_bytes`: for each worker. `durations_of`: None where nothing
    is known of the hardware. `asked` must admit something: its degrees are checked before.

    One video, one worker or unknown hardware: colocated, unless memory forbids it. Otherwise what is predicted to be
    done soonest.
    """
    asked = asked or Asked()
    found = list(arrangements(num_workers, videos, asked))
    assert found, f"nothing that is asked for can be run by {num_workers} workers"
    fitting = [a for a in found if _refusal(a, videos, available_bytes) is None]
    if not fitting:
        plainest = _first(found, videos)
        return Choice(arrangement=plainest, reason=_refusal(plainest, videos, available_bytes) or "", fits=False)
    plain = _first(fitting, videos)
    why = _plain_reason(videos, num_workers, is_known=durations_of is not None)
    if plain.kind is Kind.COLOCATED and why:
        return Choice(arrangement=plain, reason=f"{plain.describe()}: {why}")
    if durations_of is None or len(fitting) == 1:
        return Choice(arrangement=plain, reason=_forced_reason(plain, videos, found, available_bytes))
    plan = make_plan(
        videos, num_workers, available_bytes=available_bytes, durations_of=durations_of, asked=asked, tie=MARGIN
    )
    assert plan.best is not None
    return Choice(arrangement=plan.best.arrangement, reason=_compared(plan.proposals), proposal=plan.best)


def _first(found: Sequence[Arrangement], videos: Sequence[PlannedVideo]) -> Arrangement:
    """The one to take without predictions: of two groups, PipeDiT's rule (section 3.2) says how many decode."""
    kind = next(kind for kind in _WITHOUT_PREDICTION if any(a.kind is kind for a in found))
    same = [arrangement for arrangement in found if arrangement.kind is kind]
    if kind is not Kind.DISAGGREGATED:
        return same[0]
    wanted = decoders_by_rule(videos, same[0].num_workers)
    # Whether help pays is measured while it runs, so it may be tried.
    return min(same, key=lambda a: (abs(len(a.placement.decoders) - wanted), a.aco is AcoMode.OFF))


def decoders_by_rule(videos: Sequence[PlannedVideo], num_workers: int) -> int:
    """N_decode ~ N * T_decode / (T_decode + T_denoise), with operations for times."""
    decode = sum(video.count * video.cost.decode.total for video in videos)
    denoise = sum(video.count * video.cost.denoise.total for video in videos)
    return min(max(round(num_workers * decode / (decode + denoise)), 1), num_workers - 1)


def _refusal(arrangement: Arrangement, videos: Sequence[PlannedVideo], available_bytes: int) -> str | None:
    return memory_refusal(arrangement, rank_needs(arrangement, videos), available_bytes)


def _plain_reason(videos: Sequence[PlannedVideo], num_workers: int, *, is_known: bool) -> str:
    """Why there is nothing to compare; "" if there is."""
    if num_workers == 1:
        return "there is one worker"
    if total_count(videos) == 1:
        return "one video has no other to be decoded beside"
    return "" if is_known else "nothing is known of this hardware, so nothing else can be promised to be faster"


def _forced_reason(
    chosen: Arrangement, videos: Sequence[PlannedVideo], found: Sequence[Arrangement], available_bytes: int
) -> str:
    simpler = next((a for a in found if a.kind is Kind.COLOCATED), None)
    refusal = None if simpler is None or chosen is simpler else _refusal(simpler, videos, available_bytes)
    if refusal is None:
        return chosen.describe()  # it was asked for
    return f"{chosen.describe()}: with everything on every worker, {refusal}"


def _compared(proposals: Sequence[Proposal]) -> str:
    best = proposals[0]
    rival = next((p for p in proposals if p.arrangement.kind is not best.arrangement.kind), None)
    text = f"{best.arrangement.describe()}: predicted {format_seconds(best.makespan_s)} for "
    text += f"{best.prediction.num_videos} videos" if best.prediction.num_videos > 1 else "the video"
    if rival is None:
        return text
    return f"{text}, {rival.arrangement.kind} {format_seconds(rival.makespan_s)}"
