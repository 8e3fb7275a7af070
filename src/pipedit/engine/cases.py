"""Tables of cases: a model, a kind of GPU, a size, a number of prompts and a way to run them; what each would take.

The ways are those of PipeDiT's tables (plan.paper_variants) and "ours", the planner's choice.
"""

import csv
import dataclasses
import functools
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipedit.core.errors import CheckpointError, InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.models.by_name import PlannableModel, find_model, is_same_model
from pipedit.models.paper_costs import paper_cost
from pipedit.plan.estimate import DurationsOf
from pipedit.plan.hardware import Cluster, make_cluster
from pipedit.plan.paper_variants import OURS, SYSTEMS, VARIANTS, PublishedSystem, predicted_s
from pipedit.plan.planner import make_plan, predicted_by
from pipedit.plan.predict import Predictor
from pipedit.plan.table_file import Column, Row, parse_row, raise_problems, read_table

PREDICTED = "predicted_s"
_GPUS = 8  # as in all of PipeDiT's tables
_COLUMNS = {
    "model": Column(kind=str, is_required=True),
    "gpu": Column(kind=str, is_required=True),
    "width": Column(kind=int, least=1, is_required=True),
    "height": Column(kind=int, least=1, is_required=True),
    "frames": Column(kind=int, least=1, is_required=True),
    "steps": Column(kind=int, least=1, is_required=True),
    "prompts": Column(kind=int, least=1, is_required=True),
    "variant": Column(kind=str, choices=VARIANTS, is_required=True),
    "gpus": Column(kind=int, least=1),
    "link": Column(kind=str),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table, checked."""

    row: Row
    model: str
    request: VideoRequest
    cluster: Cluster
    prompts: int
    variant: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseTable:
    names: tuple[str, ...]
    cases: tuple[Case, ...]


def read_cases(path: str | os.PathLike[str]) -> CaseTable:
    """Raises InvalidRequestError with every problem of every line. Columns of other names are handed on."""
    table = read_table(path)
    cases, problems = [], []
    for row in table.rows:
        case = _case(row, table.names)
        if isinstance(case, Case):
            cases.append(case)
        else:
            problems += [f"{row.source}: {problem}" for problem in case]
    raise_problems(problems)
    return CaseTable(names=table.names, cases=tuple(cases))


def predict_cases(cases: Sequence[Case]) -> Iterator[float]:
    """Seconds that all prompts of each case take, one after the other. Raises InvalidRequestError for a case of which
    nothing fits into memory."""
    for case in cases:
        yield _ours_s(case) if case.variant == OURS else _published_s(case)


def cases_as_csv(table: CaseTable, predictions: Sequence[float]) -> str:
    """The table as it was, with a column `predicted_s` at the end."""
    names = [name for name in table.names if name != PREDICTED]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, PREDICTED])
    for case, seconds in zip(table.cases, predictions, strict=True):
        writer.writerow([*(case.row.values.get(name, "") for name in names), f"{seconds:.1f}"])
    return text.getvalue()


# -- checks -------------------------------------------------------------------------------------------------------


def _case(row: Row, names: Sequence[str]) -> Case | list[str]:
    """The case, or what is wrong with the line."""
    values, problems = parse_row(row, _COLUMNS, others=names)
    model, cluster = None, None
    if "model" in values:
        model, found = _model(values["model"])
        problems += found
        if model is not None and "variant" in values:
            problems += _variant_problems(values["model"], values["variant"])
    if "gpu" in values:
        cluster, found = _cluster(values["gpu"], values.get("link"), values.get("gpus", _GPUS))
        problems += found
    if problems or model is None or cluster is None:
        return problems
    request = _request(model, values)
    if problems := model.problems(request):
        return problems
    return Case(
        row=row,
        model=values["model"],
        request=request,
        cluster=cluster,
        prompts=values["prompts"],
        variant=values["variant"],
    )


def _request(model: PlannableModel, values: Mapping[str, Any]) -> VideoRequest:
    return model.complete(
        VideoRequest(
            prompt="",
            width=values["width"],
            height=values["height"],
            num_frames=values["frames"],
            num_inference_steps=values["steps"],
        )
    )


def _variant_problems(model: str, variant: str) -> list[str]:
    if variant == OURS or _system(model) is not None:
        return []
    return [f"variant {variant} is published for {' and '.join(SYSTEMS)} only; {model} has {OURS}"]


@functools.cache
def _model(name: str) -> tuple[PlannableModel | None, list[str]]:
    try:
        return find_model(name), []
    except InvalidRequestError as error:
        return None, list(error.problems)
    except CheckpointError as error:
        return None, str(error).splitlines()


@functools.cache
def _cluster(gpu: str, link: str | None, gpus: int) -> tuple[Cluster | None, list[str]]:
    try:
        return make_cluster(gpu, link, num_devices=gpus, devices_per_node=_GPUS), []
    except InvalidRequestError as error:
        return None, list(error.problems)


def _system(model: str) -> PublishedSystem | None:
    name = _name_in_paper(model)
    return None if name is None else SYSTEMS[name]


def _name_in_paper(model: str) -> str | None:
    return next((name for name in SYSTEMS if is_same_model(name, model)), None)


# -- predictions --------------------------------------------------------------------------------------------------


def _published_s(case: Case) -> float:
    """With the models' own decoding, as the paper ran it, not diffusers'."""
    name, request = _name_in_paper(case.model), case.request
    assert name and request.width and request.height and request.num_frames and request.num_inference_steps, case
    cost = paper_cost(name, request.width, request.height, request.num_frames)
    steps, prompts = request.num_inference_steps, case.prompts
    return predicted_s(SYSTEMS[name], cost, case.cluster, case.variant, steps=steps, prompts=prompts)


def _ours_s(case: Case) -> float:
    """What the planner would take, in the simulator."""
    model, _ = _model(case.model)
    assert model is not None
    plan = make_plan(
        [model.planned(case.request, case.prompts)],
        case.cluster.num_devices,
        available_bytes=case.cluster.device.memory_bytes,
        durations_of=_durations(case.cluster),
    )
    if plan.best is None:
        reasons = "; ".join(f"{refusal.what}: {refusal.reason}" for refusal in plan.refusals)
        raise InvalidRequestError([f"{case.row.source}: nothing fits: {reasons}"])
    return plan.best.makespan_s


@functools.cache
def _durations(cluster: Cluster) -> DurationsOf:
    return predicted_by(Predictor(cluster=cluster))
