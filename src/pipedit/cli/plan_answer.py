"""From the question of `pipedit plan` to its answer. Knows no tables."""

import dataclasses

from pipedit.cli.plan_question import CPU, Question
from pipedit.core.request import VideoRequest
from pipedit.plan.arrangements import Asked, Kind
from pipedit.plan.memory import Need, Room, SizeLadder, memory_problem
from pipedit.plan.planner import Plan, least_need, make_plan, predicted_by
from pipedit.plan.predict import Predictor
from pipedit.plan.replicas import Replicas, best_replicas


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """`beside`: the best of several engines beside each other. `advice`: what would fit where nothing does."""

    question: Question
    plan: Plan
    beside: Replicas | None
    advice: str | None


def answer(question: Question) -> Answer:
    """Compares one engine with one engine, and the best with several beside each other."""
    num_workers, available = question.cluster.num_devices, question.available_bytes
    durations_of, videos = predicted_by(Predictor(cluster=question.cluster)), question.videos
    # On a CPU, weights are in host memory anyway.
    kinds = frozenset(kind for kind in Kind if question.cluster.device.name != CPU or not kind.is_offloaded)
    asked = Asked(kinds=kinds, fewer=True)
    found = make_plan(videos, num_workers, available_bytes=available, durations_of=durations_of, asked=asked)
    beside = best_replicas(videos, num_workers, available_bytes=available, durations_of=durations_of)
    return Answer(
        question=question, plan=found, beside=beside, advice=_advice(question) if found.best is None else None
    )


def _advice(question: Question) -> str | None:
    """Where nothing fits: how far it is from that, and what would fit."""
    rules = question.model.size_rules
    ladder = SizeLadder(frame_step=rules.frame_step, size_multiple=rules.size_multiple)

    def need_of(request: VideoRequest) -> Need:
        return least_need([question.planned(request)], question.cluster.num_devices)

    return memory_problem(question.request, need_of, Room(available_bytes=question.available_bytes), ladder, {})
