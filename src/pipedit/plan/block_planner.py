"""Ways to make a long video block by block on so many workers, and what the exact strategies would take for it.

It makes another video than those, so nothing here is ever chosen unasked (see engine.settings.Strategy).
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from pipedit.core.blocks import Prefix, Storage
from pipedit.core.placement import Placement, Role
from pipedit.core.units import format_bytes, format_seconds
from pipedit.plan.arrangements import Arrangement, Kind
from pipedit.plan.block_arrangement import BlockArrangement
from pipedit.plan.block_memory import blocks_in_flight
from pipedit.plan.block_predict import BlockDurations, BlockPrediction, BlockVideo, predict_blocks, worker_needs
from pipedit.plan.degrees import Wanted
from pipedit.plan.estimate import DurationsOf
from pipedit.plan.planned_video import PlannedVideo, can_share
from pipedit.plan.planner import TIE, Proposal, predict
from pipedit.plan.predict import Predictor
from pipedit.plan.rank_memory import rank_needs
from pipedit.plan.refusals import Refusal

_UNEVEN = 1.1  # times as long as the fastest stage: that is worth telling
_LONG_TAIL = 0.03  # of the whole time


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlocksAsked:
    """What somebody has laid down. None: open, and compared."""

    block_latents: int
    context_latents: int
    prefix: Prefix | None = None
    storage: Storage | None = None
    compat: bool = False

    @property
    def prefixes(self) -> tuple[Prefix, ...]:
        if self.prefix is not None:
            return (self.prefix,)
        if self.compat:  # the released code knows one of them only
            return (Prefix.RERUN,)
        return tuple(Prefix) if self.context_latents else (Prefix.CACHE,)  # without context they are the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPlans:
    """`proposals`: fastest first, one for each way to handle the context and to decode."""

    video: BlockVideo
    proposals: tuple[BlockPrediction, ...]
    refusals: tuple[Refusal, ...]

    @property
    def best(self) -> BlockPrediction | None:
        return self.proposals[0] if self.proposals else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival:
    """An exact strategy to compare with. `lacks_bytes`: of memory on its fullest worker; 0: it fits."""

    name: str
    proposal: Proposal
    lacks_bytes: int


def make_block_plan(
    video: BlockVideo, num_workers: int, *, asked: BlocksAsked, available_bytes: int, predictor: Predictor
) -> BlockPlans:
    """`available_bytes`: on each worker's device. What was asked must make a legal BlockPlan."""
    proposals: list[BlockPrediction] = []
    refusals: list[Refusal] = list(_count_refusals(video, num_workers))
    for prefix, decode_worker in itertools.product(asked.prefixes, (False, True)):
        plan = video.plan(
            block_latents=asked.block_latents,
            context_latents=asked.context_latents,
            prefix=prefix,
            compat=asked.compat,
        )
        for storage in _storages(asked, prefix):
            ways = [
                BlockArrangement(plan=plan, stages=stages, decode_worker=decode_worker, storage=storage)
                for stages in range(1, min(num_workers - decode_worker, _layers(video)) + 1)
            ]
            fitting = [way for way in ways if _fits(way, video, available_bytes)]
            if fitting:
                proposals.append(_fastest(fitting, video, predictor))
                if storage is Storage.DEVICE:
                    break  # the others only make room
            elif ways:
                refusals.append(_refusal(ways[-1], video, available_bytes))
    proposals.sort(key=lambda found: found.makespan_s)
    return BlockPlans(video=video, proposals=tuple(proposals), refusals=tuple(refusals))


def find_rivals(
    video: PlannedVideo, num_workers: int, *, available_bytes: int, durations_of: DurationsOf
) -> tuple[Rival, ...]:
    """One device, and the plainest ways to share a video among all of them, whether they fit or not."""
    degrees = {
        "one device": (1, Wanted()),
        f"Ulysses on {num_workers}": (num_workers, Wanted(cfg_degree=1, ring_degree=1, ulysses_degree=num_workers)),
        f"Ring on {num_workers}": (num_workers, Wanted(cfg_degree=1, ring_degree=num_workers, ulysses_degree=1)),
    }
    found = []
    for name, (workers, wanted) in degrees.items():
        if can_share(video, wanted, workers) and (workers > 1 or name == "one device"):
            way = Arrangement(kind=Kind.COLOCATED, placement=Placement.colocated(workers), degrees=wanted)
            needs = rank_needs(way, [video])
            proposal = Proposal(arrangement=way, prediction=predict(way, [video], durations_of), needs=needs)
            lacks = max(0, max(proposal.peak_bytes) - available_bytes)
            found.append(Rival(name=name, proposal=proposal, lacks_bytes=lacks))
    return tuple(found)


def remarks(prediction: BlockPrediction, num_workers: int) -> Iterator[str]:
    """What is to be known of it: whether decoding keeps up, stages that are too many, links that are too slow.
    `num_workers`: those that there are."""
    yield _decode_remark(prediction)
    if prediction.decode_tail_s > max(prediction.block_every_s, _LONG_TAIL * prediction.seconds_each):
        yield (
            f"The last blocks are finished faster than they can be decoded: {format_seconds(prediction.decode_tail_s)} "
            "of decoding are left at the end."
        )
    yield from _depth_remarks(prediction, num_workers)
    slowest_s, hops_s = max(prediction.stage_s), prediction.passes * prediction.hop_s
    if hops_s > slowest_s:
        yield (
            f"The links are the slowest part: {prediction.passes} x {format_bytes(prediction.hop_bytes)} take "
            f"{format_seconds(hops_s)} from stage to stage, a step of a block {format_seconds(slowest_s)}."
        )


def _depth_remarks(prediction: BlockPrediction, num_workers: int) -> Iterator[str]:
    arrangement, useful = prediction.arrangement, prediction.useful_stages
    stages, left = arrangement.stages, num_workers - arrangement.num_workers
    if stages + left > useful:
        yield (
            f"More than {useful} stages bring little: {blocks_in_flight(arrangement.plan)} blocks are under way at a "
            f"time, and {stages + left} stages would wait for each other."
        )
    if left > 0:
        workers = "1 worker has" if left == 1 else f"{left} workers have"
        yield f"{workers} nothing to do: with {stages + left} stages it would not be faster."
    slowest_s, fastest_s = max(prediction.stage_s), min(prediction.stage_s)
    if slowest_s > _UNEVEN * fastest_s:
        yield (
            f"Layers do not come out even: a step of a block takes {format_seconds(slowest_s)} on one stage and "
            f"{format_seconds(fastest_s)} on another, which waits."
        )


def _decode_remark(prediction: BlockPrediction) -> str:
    decode_s, every_s = prediction.decode_block_s, prediction.block_every_s
    takes = f"{format_seconds(decode_s)} for a block"
    if not prediction.arrangement.decode_worker:
        share = decode_s / every_s
        more = "; a worker of its own would relieve it" if share > 0.1 else ""
        return f"Decoding takes {takes}, {share:.0%} of the last stage's time{more}."
    if decode_s >= every_s:
        return f"Decoding is the slower side: {takes}; the stages could make one faster, and wait."
    return f"Decoding keeps up: {takes}, and one is finished every {format_seconds(every_s)}."


def _storages(asked: BlocksAsked, prefix: Prefix) -> tuple[Storage, ...]:
    """Where hardly anything waits, there is nothing to choose."""
    if asked.storage is not None:
        return (asked.storage,)
    return tuple(Storage) if prefix is Prefix.CACHE and asked.context_latents else (Storage.DEVICE,)


def _layers(video: BlockVideo) -> int:
    return len(video.cost.forward.layers)


def _fits(way: BlockArrangement, video: BlockVideo, available_bytes: int) -> bool:
    return max(need.needed_bytes for need in worker_needs(way, video)) <= available_bytes


def _fastest(ways: Sequence[BlockArrangement], video: BlockVideo, predictor: Predictor) -> BlockPrediction:
    """Of those that take as long, about, the one with the fewest stages. `ways` differ in nothing else."""
    bounds_s = {way: max(_busy_s(way, video, predictor)) * video.count for way in ways}
    found: list[BlockPrediction] = []
    for way in sorted(ways, key=bounds_s.__getitem__):
        if not found or bounds_s[way] <= min(each.makespan_s for each in found) * (1 + TIE):
            found.append(predict_blocks(way, video, predictor))
    limit_s = min(each.makespan_s for each in found) * (1 + TIE)
    return min((each for each in found if each.makespan_s <= limit_s), key=lambda each: each.arrangement.stages)


def _busy_s(way: BlockArrangement, video: BlockVideo, predictor: Predictor) -> Iterator[float]:
    """By stage, what it has to do for a video at least."""
    durations = BlockDurations(predictor, video, way)
    return (durations.denoise_s(stage) for stage in range(way.stages))


def _count_refusals(video: BlockVideo, num_workers: int) -> Iterator[Refusal]:
    if num_workers > (most := _layers(video)) + 1:
        reason = f"the model has {most} layers, and every stage needs one; a further worker can decode"
        yield Refusal(what=f"dualparal on more than {most + 1} workers", reason=reason)


def _refusal(way: BlockArrangement, video: BlockVideo, available_bytes: int) -> Refusal:
    """Of the deepest pipeline, which needs least."""
    worst = max(worker_needs(way, video), key=lambda need: need.needed_bytes)
    held = ", ".join(_HELD[role] for role in worst.roles)
    reason = (
        f"a worker with {held} needs about {format_bytes(worst.needed_bytes)} "
        f"({format_bytes(worst.need.weights)} of it weights), {format_bytes(available_bytes)} are there"
    )
    if Role.DENOISER in worst.roles and way.plan.prefix is Prefix.CACHE and way.storage is not Storage.HOST:
        reason += "; keys and values of neighbours take most of it: a smaller --context makes room"
    return Refusal(what=f"dualparal, {way_text(way)}", reason=reason)


_HELD = {Role.ENCODER: "the text encoder", Role.DENOISER: "a stage of layers", Role.DECODER: "the VAE"}


def way_text(way: BlockArrangement) -> str:
    """In the words of the flags, such as "8 stages + 1 decodes, prefix cache, int8"."""
    stages = f"{way.stages} stage{'s' if way.stages > 1 else ''}{' + 1 decodes' if way.decode_worker else ''}"
    compat = ", compat" if way.plan.compat else ""
    return f"{stages}, prefix {way.plan.prefix}{compat}" + ("" if way.storage is Storage.DEVICE else f", {way.storage}")
