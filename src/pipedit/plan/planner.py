"""The planner: which arrangement makes some videos soonest, what each would take, and why others cannot run.

It is told how long work takes (`DurationsOf`) and how much memory there is; it reads nothing itself.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from pipedit.plan.arrangements import Arrangement, Asked, Kind, arrangements
from pipedit.plan.estimate import DurationsOf, estimate_makespan_s
from pipedit.plan.memory import Need
from pipedit.plan.outcome import summarize
from pipedit.plan.planned_video import PlannedVideo
from pipedit.plan.pools import Pool, Service
from pipedit.plan.predict import Predictor
from pipedit.plan.predicted_durations import PredictedDurations
from pipedit.plan.rank_memory import RankNeed, fits, rank_needs
from pipedit.plan.refusals import Refusal, find_refusals
from pipedit.plan.simulator import Arrival, simulate

TIE = 0.01  # what takes no more than this much longer counts as equal
_SPLITS_SIMULATED, _VARIANTS_SIMULATED = 8, 3  # numbers of workers by role, and ways to run each of them
_MOST_ANSWERS = (
    40_000  # of ranks to commands, in one simulation; of more videos than that makes, the rest is extrapolated
)
_FEWEST_VIDEOS = 8

_Split = tuple[Kind, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """All videos handed in at second 0. `first_frames_s`: of the first video. `idle`: by group, the share of its ranks'
    time without work; `utilisation`: of all ranks."""

    num_videos: int
    makespan_s: float
    first_frames_s: float
    first_video_s: float
    idle: Mapping[str, float]
    utilisation: float

    @property
    def seconds_each(self) -> float:
        return self.makespan_s / self.num_videos

    @property
    def videos_per_hour(self) -> float:
        return 3600 / self.seconds_each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """An arrangement that can run. `needs`: by rank."""

    arrangement: Arrangement
    prediction: Prediction
    needs: tuple[RankNeed, ...]

    @property
    def makespan_s(self) -> float:
        return self.prediction.makespan_s

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """By rank."""
        return tuple(need.needed_bytes for need in self.needs)

    @property
    def host_bytes(self) -> int:
        """Of all workers' weights, where they wait in host memory."""
        if not self.arrangement.kind.is_offloaded:
            return 0
        return self.arrangement.num_workers * max(need.video.cost.weight_bytes for need in self.needs)

    @property
    def split(self) -> _Split:
        placement = self.arrangement.placement
        return self.arrangement.kind, len(placement.denoisers), len(placement.decoders)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """`proposals`: best first. `compared`: arrangements that were looked at, those that are not worth simulating
    included."""

    videos: tuple[PlannedVideo, ...]
    num_workers: int
    proposals: tuple[Proposal, ...]
    refusals: tuple[Refusal, ...]
    compared: int

    @property
    def best(self) -> Proposal | None:
        return self.proposals[0] if self.proposals else None

    def best_of(self, kind: Kind) -> Proposal | None:
        return next((proposal for proposal in self.proposals if proposal.arrangement.kind is kind), None)

    def best_by_split(self) -> list[Proposal]:
        """The best of each number of workers by role, best first."""
        found: dict[_Split, Proposal] = {}
        for proposal in self.proposals:
            found.setdefault(proposal.split, proposal)
        return list(found.values())


def make_plan(
    videos: Sequence[PlannedVideo],
    num_workers: int,
    *,
    available_bytes: int,
    durations_of: DurationsOf,
    asked: Asked | None = None,
    tie: float = TIE,
) -> Plan:
    """`available_bytes`: on each worker's device. `tie`: see `ranked`."""
    asked = asked or Asked()
    found = list(arrangements(num_workers, videos, asked))
    needs = {arrangement: rank_needs(arrangement, videos) for arrangement in found}
    fitting = [arrangement for arrangement in found if fits(arrangement, needs[arrangement], available_bytes)]
    proposals = [
        Proposal(
            arrangement=arrangement,
            prediction=predict(arrangement, videos, durations_of),
            needs=needs[arrangement],
        )
        for arrangement in _shortlist(fitting, videos, durations_of)
    ]
    return Plan(
        videos=tuple(videos),
        num_workers=num_workers,
        proposals=tuple(ranked(proposals, tie)),
        refusals=tuple(find_refusals(num_workers, videos, asked, needs, available_bytes)),
        compared=len(found),
    )


def least_need(videos: Sequence[PlannedVideo], num_workers: int, asked: Asked | None = None) -> Need:
    """What the fullest worker has to hold in the arrangement that asks least of it."""
    fullest = (
        max(rank_needs(arrangement, videos), key=lambda need: need.needed_bytes)
        for arrangement in arrangements(num_workers, videos, asked)
    )
    return min(fullest, key=lambda need: need.needed_bytes).need


def ranked(proposals: Iterable[Proposal], tie: float = TIE) -> list[Proposal]:
    """Shortest makespan first; but of those that take up to a share `tie` longer than that, the simplest before all."""
    order = sorted(proposals, key=lambda proposal: proposal.makespan_s)
    if not order:
        return []
    limit_s = order[0].makespan_s * (1 + tie)
    equals = (proposal for proposal in order if proposal.makespan_s <= limit_s)
    best = min(equals, key=lambda proposal: proposal.arrangement.simplicity())
    order.remove(best)
    return [best, *order]


# -- prediction ---------------------------------------------------------------------------------------------------


def predicted_by(predictor: Predictor) -> DurationsOf:
    """Durations on the predictor's cluster. Keep it for several plans: it remembers what steps take."""

    @functools.cache
    def resident(video: PlannedVideo) -> PredictedDurations:
        return PredictedDurations.of(predictor, video.cost)

    def durations_of(arrangement: Arrangement, video: PlannedVideo) -> PredictedDurations:
        return dataclasses.replace(resident(video), is_offloaded=arrangement.kind.is_offloaded)

    return durations_of


def pool_of(arrangement: Arrangement, videos: Sequence[PlannedVideo], durations_of: DurationsOf) -> Pool:
    """One engine that is arranged like this; the kinds of request are named by their places in `videos`."""
    decoders = len(arrangement.placement.decoders)
    services = {
        str(number): Service(
            work=video.work(arrangement.sharing(video), decoders), durations=durations_of(arrangement, video)
        )
        for number, video in enumerate(videos)
    }
    return Pool(placement=arrangement.placement, services=services, policy=arrangement.policy)


def predict(arrangement: Arrangement, videos: Sequence[PlannedVideo], durations_of: DurationsOf) -> Prediction:
    """Simulates all videos, handed in at once and well mixed; very many of one kind are extrapolated."""
    kinds = _mixed(videos)
    commands = max(video.cost.num_steps + video.chunks_with(1) for video in videos)
    simulated = kinds[: max(_FEWEST_VIDEOS, _MOST_ANSWERS // (commands * arrangement.num_workers))]
    run = simulate([pool_of(arrangement, videos, durations_of)], [Arrival(at_s=0.0, kind=kind) for kind in simulated])
    outcome, done = summarize(run), sorted(life.done_s for life in run.lives)
    half = len(done) // 2
    period_s = (done[-1] - done[half - 1]) / (len(done) - half) if half else done[-1]
    return Prediction(
        num_videos=len(kinds),
        makespan_s=outcome.makespan_s + period_s * (len(kinds) - len(simulated)),
        first_frames_s=min(life.first_frames_s for life in run.lives),
        first_video_s=outcome.first_video_s,
        utilisation=outcome.utilisation,
        idle={name: max(0.0, use.idle_share) for name, use in outcome.groups.items()},
    )


def _mixed(videos: Sequence[PlannedVideo]) -> list[str]:
    """The kinds of all requests in an order in which every stretch has its share of each."""
    turns = [
        ((turn + 0.5) / video.count, str(number)) for number, video in enumerate(videos) for turn in range(video.count)
    ]
    return [kind for _, kind in sorted(turns)]


def _shortlist(
    fitting: Sequence[Arrangement], videos: Sequence[PlannedVideo], durations_of: DurationsOf
) -> list[Arrangement]:
    """Those that may be best, and the most promising of every kind, to compare with."""
    estimates = {arrangement: estimate_makespan_s(arrangement, videos, durations_of) for arrangement in fitting}
    by_split: dict[_Split, list[Arrangement]] = defaultdict(list)
    for arrangement in sorted(fitting, key=lambda a: (estimates[a], a.simplicity())):
        by_split[arrangement.kind, len(arrangement.placement.denoisers), len(arrangement.placement.decoders)].append(
            arrangement
        )
    splits = list(by_split)  # in order of their best estimates
    first_of_kind = {kind: split for split in reversed(splits) for kind in split[:1]}
    chosen = dict.fromkeys([*splits[:_SPLITS_SIMULATED], *first_of_kind.values()])
    return [arrangement for split in chosen for arrangement in by_split[split][:_VARIANTS_SIMULATED]]
