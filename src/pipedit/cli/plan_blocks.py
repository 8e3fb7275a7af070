"""A plan for a long video, for people: exact strategies above a line, videos made block by block below it."""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipedit.cli.plan_answer import Answer, BlockAnswer
from pipedit.cli.plan_question import Question
from pipedit.cli.plan_tables import (
    degrees_text,
    folded,
    generate_words,
    machine_text,
    seconds_text,
    small_print,
    title,
    way_text,
)
from pipedit.core.units import GIB, format_bytes, format_seconds
from pipedit.plan.block_planner import Rival, remarks
from pipedit.plan.block_planner import way_text as block_way_text
from pipedit.plan.block_predict import BlockPrediction
from pipedit.plan.planner import Proposal
from pipedit.plan.refusals import Refusal

_LEGEND = (
    "total: of all videos. first: seconds until there are frames. used: share of all workers' time with work. GiB: the "
    "most that a worker holds, weights: of those. Exchanges count as work. In brackets: does not fit; the time is what "
    "it would take if it did."
)


def block_report(answer: Answer, blocks: BlockAnswer, top: int) -> RenderableType:
    """Top down: the question, the table, what the best gains, what is to be known of it, the refused, the command."""
    question, best = answer.question, blocks.plans.best
    parts: list[RenderableType] = [Text(title(answer), style="bold"), Text(machine_text(question))]
    parts += [_table(answer, blocks, top), Text(_LEGEND, style="dim")]
    if best is None:
        parts.append(Text("\nNothing of this can be made block by block: see below.", style="bold red"))
    else:
        parts += [
            Text(""),
            *map(Text, gain_lines(answer, blocks)),
            *map(Text, remarks(best, question.cluster.num_devices)),
            Text(_ring_line(best)),
        ]
    no_plan = answer.plan.refusals if question.too_long else ()
    if refusals := [*no_plan, *blocks.plans.refusals, *_rival_refusals(question, blocks)]:
        parts.append(_refusal_table(refusals))
    if best is not None:
        command = block_command(best, question)
        parts.append(Text(f"To run the first of the others ({block_way_text(best.arrangement)}):", style="bold cyan"))
        parts.append(Text(f"\n{folded(command)}\n", no_wrap=True))
    parts.append(Text(small_print(question), style="dim"))
    return Group(*parts)


def _table(answer: Answer, blocks: BlockAnswer, top: int) -> RenderableType:
    plan = answer.question.blocks
    assert plan is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("the same video as on one device", overflow="fold")
    for name in ("total s", "first s", "used %", "GiB", "weights"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, proposal, fits in _exact_rows(answer, blocks):
        table.add_row(*_exact_cells(name, proposal, fits=fits), style="" if fits else "dim")
    if too_long := answer.question.too_long:
        table.add_row(Text(f"cannot be: {too_long}", style="dim"), *[""] * 5)
    table.add_section()
    context = f"context {plan.context_latents}" if plan.context_latents else "no context"
    table.add_row(Text(f"another video: dualparal, blocks of {plan.block_latents}, {context}", style="bold"), *[""] * 5)
    for prediction in blocks.plans.proposals[:top]:
        table.add_row(*_block_cells(prediction), style="bold green" if prediction is blocks.plans.best else "")
    return table


def _exact_rows(answer: Answer, blocks: BlockAnswer) -> Iterator[tuple[str, Proposal, bool]]:
    """The rivals, and the fastest that fits where it is none of them."""
    known = set()
    for rival in blocks.rivals:
        known.add((rival.proposal.arrangement.kind, degrees_text(rival.proposal.arrangement, answer.plan.videos)))
        yield rival.name, rival.proposal, not rival.lacks_bytes
    best = answer.plan.best
    if best is not None:
        degrees = degrees_text(best.arrangement, answer.plan.videos)
        if (best.arrangement.kind, degrees) not in known:
            yield f"fastest that fits: {way_text(best.arrangement)}, {degrees}", best, True


def _exact_cells(name: str, proposal: Proposal, *, fits: bool) -> list[str]:
    prediction, needs = proposal.prediction, proposal.needs
    cells = [
        seconds_text(prediction.makespan_s),
        seconds_text(prediction.first_frames_s),
        f"{prediction.utilisation * 100:.0f}",
        f"{max(proposal.peak_bytes) / GIB:.1f}",
        f"{max(need.need.weights for need in needs) / GIB:.1f}",
    ]
    return [name, *(cells if fits else (f"({cell})" for cell in cells))]


def _block_cells(prediction: BlockPrediction) -> list[str]:
    return [
        block_way_text(prediction.arrangement),
        seconds_text(prediction.makespan_s),
        seconds_text(prediction.first_frames_s),
        f"{prediction.utilisation * 100:.0f}",
        f"{max(prediction.peak_bytes) / GIB:.1f}",
        f"{max(prediction.weight_bytes) / GIB:.1f}",
    ]


def gain_lines(answer: Answer, blocks: BlockAnswer) -> Iterator[str]:
    """How the best compares with each exact way."""
    best = blocks.plans.best
    assert best is not None
    ours = format_bytes(max(best.peak_bytes))
    for name, proposal, fits in _exact_rows(answer, blocks):
        what, theirs = name.removeprefix("fastest that fits: "), format_bytes(max(proposal.peak_bytes))
        condition = "" if fits else ", if that fitted"
        faster, _ = ratios(best, proposal)
        yield f"{faster:.2f}x as fast as {what}{condition}; the fullest worker holds {ours} instead of {theirs}."


def ratios(best: BlockPrediction, exact: Proposal) -> tuple[float, float]:
    """How much longer an exact way takes, and how much more its fullest worker holds."""
    return exact.makespan_s / best.makespan_s, max(exact.peak_bytes) / max(best.peak_bytes)


def _ring_line(best: BlockPrediction) -> str:
    block = f"A block of {best.arrangement.plan.block_latents} latent frames every {format_seconds(best.block_every_s)}"
    host = f"; {format_bytes(best.host_bytes)} of keys and values in host memory" if best.host_bytes else ""
    if best.arrangement.stages == 1:
        return f"{block}{host}."
    return (
        f"{block}; {best.passes} x {format_bytes(best.hop_bytes)} from stage to stage in each of its steps, "
        f"{format_seconds(best.hop_s)} each{host}."
    )


def _rival_refusals(question: Question, blocks: BlockAnswer) -> Iterator[Refusal]:
    for rival in blocks.rivals:
        if rival.lacks_bytes:
            yield Refusal(what=rival.name, reason=lack_text(rival, question.available_bytes))


def lack_text(rival: Rival, available_bytes: int) -> str:
    worst = max(rival.proposal.needs, key=lambda need: need.needed_bytes)
    return (
        f"a worker needs about {format_bytes(worst.needed_bytes)} ({format_bytes(worst.need.weights)} of it weights), "
        f"{format_bytes(rival.lacks_bytes)} more than the {format_bytes(available_bytes)} that are there; "
        f"if it fitted, it would take {format_seconds(rival.proposal.makespan_s)}"
    )


def _refusal_table(refusals: Sequence[Refusal]) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("cannot run", overflow="fold", max_width=28)
    table.add_column("why", overflow="fold")
    for refusal in refusals:
        table.add_row(Text(refusal.what), Text(refusal.reason, style="dim"))
    return table


def block_command(prediction: BlockPrediction, question: Question) -> str:
    return shlex.join([*generate_words(question), *prediction.arrangement.flags()])


# -- as JSON ------------------------------------------------------------------------------------------------------


def blocks_as_json(blocks: BlockAnswer, question: Question) -> dict[str, Any]:
    best = blocks.plans.best
    return {
        "is_another_video": True,
        "proposals": [
            _prediction_as_json(prediction, question.cluster.num_devices) for prediction in blocks.plans.proposals
        ],
        "refusals": [{"what": refusal.what, "reason": refusal.reason} for refusal in blocks.plans.refusals],
        "rivals": [_rival_as_json(rival, best) for rival in blocks.rivals],
        "command": None if best is None else block_command(best, question),
    }


def _prediction_as_json(prediction: BlockPrediction, num_workers: int) -> dict[str, Any]:
    arrangement, plan = prediction.arrangement, prediction.arrangement.plan
    return {
        "description": f"{arrangement.describe()}; {block_way_text(arrangement)}",
        "stages": arrangement.stages,
        "decode_worker": arrangement.decode_worker,
        "block_size": plan.block_latents,
        "context": plan.context_latents,
        "prefix": plan.prefix,
        "compat": plan.compat,
        "context_storage": arrangement.storage,
        "num_blocks": plan.num_blocks,
        "makespan_s": prediction.makespan_s,
        "seconds_each": prediction.seconds_each,
        "first_frames_s": prediction.first_frames_s,
        "decode_tail_s": prediction.decode_tail_s,
        "block_every_s": prediction.block_every_s,
        "decode_block_s": prediction.decode_block_s,
        "stage_s": list(prediction.stage_s),
        "idle_s": list(prediction.idle_s),
        "utilisation": prediction.utilisation,
        "useful_stages": prediction.useful_stages,
        "hop_bytes": prediction.hop_bytes,
        "hop_s": prediction.hop_s,
        "host_bytes": prediction.host_bytes,
        "peak_bytes": list(prediction.peak_bytes),
        "weight_bytes": list(prediction.weight_bytes),
        "remarks": list(remarks(prediction, num_workers)),
        "flags": arrangement.flags(),
    }


def _rival_as_json(rival: Rival, best: BlockPrediction | None) -> dict[str, Any]:
    prediction = rival.proposal.prediction
    faster, smaller = (None, None) if best is None else ratios(best, rival.proposal)
    return {
        "name": rival.name,
        "fits": not rival.lacks_bytes,
        "lacks_bytes": rival.lacks_bytes,
        "makespan_s": prediction.makespan_s,
        "first_frames_s": prediction.first_frames_s,
        "utilisation": prediction.utilisation,
        "peak_bytes": list(rival.proposal.peak_bytes),
        "weight_bytes": [need.need.weights for need in rival.proposal.needs],
        "times_longer": faster,
        "times_more_memory": smaller,
    }
