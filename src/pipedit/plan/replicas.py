"""Several engines beside each other, each with its own workers and its share of the videos: what one engine is up
against when there are many videos. Each video takes longer, and ranks exchange less."""

import dataclasses
from collections.abc import Sequence

from pipedit.plan.arrangements import Asked, Kind
from pipedit.plan.estimate import DurationsOf
from pipedit.plan.planned_video import PlannedVideo, total_count
from pipedit.plan.planner import Proposal, make_plan

_WORKERS_EACH = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 64)
# Offloading engines would share the way to host memory, which is predicted for one of them.
_KINDS = frozenset(kind for kind in Kind if not kind.is_offloaded)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replicas:
    """`engines` that are alike; `proposal`: one of them with the largest share of the videos."""

    engines: int
    proposal: Proposal
    num_videos: int

    @property
    def makespan_s(self) -> float:
        return self.proposal.makespan_s

    @property
    def videos_per_hour(self) -> float:
        return 3600 * self.num_videos / self.makespan_s


def best_replicas(
    videos: Sequence[PlannedVideo], num_workers: int, *, available_bytes: int, durations_of: DurationsOf
) -> Replicas | None:
    """The fastest for all videos, of two engines or more; None where none can run."""
    found = []
    for engines, workers in divisions(num_workers, total_count(videos)):
        shares = [dataclasses.replace(video, count=-(-video.count // engines)) for video in videos]
        plan = make_plan(
            shares, workers, available_bytes=available_bytes, durations_of=durations_of, asked=Asked(kinds=_KINDS)
        )
        if plan.best is not None:
            found.append(Replicas(engines=engines, proposal=plan.best, num_videos=total_count(videos)))
    return min(found, key=lambda replicas: replicas.makespan_s, default=None)


def divisions(num_workers: int, num_videos: int) -> list[tuple[int, int]]:
    """Numbers of engines and of workers in each. No engine is without a video."""
    counts = {workers: min(num_workers // workers, num_videos) for workers in _WORKERS_EACH}
    return [(engines, workers) for workers, engines in counts.items() if engines > 1]
