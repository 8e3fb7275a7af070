"""From the question of `pipedit plan` to its answer. Knows no tables."""

import dataclasses

from pipedit.cli.plan_question import CPU, Question
from pipedit.core.request import VideoRequest
from pipedit.plan.arrangements import Asked
from pipedit.plan.block_planner import BlockPlans, BlocksAsked, Rival, find_rivals, make_block_plan
from pipedit.plan.estimate import DurationsOf
from pipedit.plan.memory import Need, Room, SizeLadder, memory_problem
from pipedit.plan.planner import Plan, least_need, make_plan, predicted_by
from pipedit.plan.predict import Predictor
from pipedit.plan.refusals import Refusal
from pipedit.plan.replicas import Replicas, best_replicas


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockAnswer:
    """Videos made block by block, and the exact ways that they are compared with."""

    plans: BlockPlans
    rivals: tuple[Rival, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """`beside`: the best of several engines beside each other. `advice`: what would fit where nothing does. `blocks`:
    where they were asked for."""

    question: Question
    plan: Plan
    beside: Replicas | None
    advice: str | None
    blocks: BlockAnswer | None = None


def answer(question: Question) -> Answer:
    """Compares one engine with one engine, and the best with several beside each other."""
    num_workers, available = question.cluster.num_devices, question.available_bytes
    predictor = Predictor(cluster=question.cluster)
    durations_of, videos = predicted_by(predictor), question.videos
    # On a CPU, weights are in host memory anyway.
    kinds = frozenset(kind for kind in question.kinds if question.cluster.device.name != CPU or not kind.is_offloaded)
    asked = Asked(kinds=kinds, fewer=True)
    blocks = None if question.blocks is None else _in_blocks(question, question.blocks, predictor, durations_of)
    if question.too_long:
        return Answer(question=question, plan=_no_plan(question), beside=None, advice=None, blocks=blocks)
    found = make_plan(videos, num_workers, available_bytes=available, durations_of=durations_of, asked=asked)
    beside = best_replicas(videos, num_workers, available_bytes=available, durations_of=durations_of)
    return Answer(
        question=question,
        plan=found,
        beside=beside,
        advice=_advice(question) if found.best is None else None,
        blocks=blocks,
    )


def _no_plan(question: Question) -> Plan:
    """For a video that cannot be made in one piece."""
    refusal = Refusal(what="the same video as on one device", reason=question.too_long)
    return Plan(
        videos=tuple(question.videos),
        num_workers=question.cluster.num_devices,
        proposals=(),
        refusals=(refusal,),
        compared=0,
    )


def _in_blocks(question: Question, asked: BlocksAsked, predictor: Predictor, durations_of: DurationsOf) -> BlockAnswer:
    num_workers, available = question.cluster.num_devices, question.available_bytes
    video = question.model.in_blocks(question.request, question.count, tiling=question.tiling)
    (exact,) = question.videos
    rivals: tuple[Rival, ...] = ()
    if not question.too_long:
        rivals = find_rivals(exact, num_workers, available_bytes=available, durations_of=durations_of)
    plans = make_block_plan(video, num_workers, asked=asked, available_bytes=available, predictor=predictor)
    return BlockAnswer(plans=plans, rivals=rivals)


def _advice(question: Question) -> str | None:
    """Where nothing fits: how far it is from that, and what would fit."""
    rules = question.model.size_rules
    ladder = SizeLadder(frame_step=rules.frame_step, size_multiple=rules.size_multiple)

    def need_of(request: VideoRequest) -> Need:
        return least_need([question.planned(request)], question.cluster.num_devices)

    return memory_problem(question.request, need_of, Room(available_bytes=question.available_bytes), ladder, {})
