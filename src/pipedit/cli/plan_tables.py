"""A plan for people: what is proposed, what it gains, what cannot run and why, and the command that runs the best."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipedit.cli.plan_answer import Answer
from pipedit.cli.plan_question import Question
from pipedit.core.placement import Role
from pipedit.core.units import GIB, format_bytes, format_seconds
from pipedit.plan.arrangements import Arrangement, Kind
from pipedit.plan.hardware import Cluster
from pipedit.plan.planned_video import PlannedVideo
from pipedit.plan.planner import Plan, Proposal
from pipedit.plan.replicas import Replicas

_LEGEND = (
    "degrees: c(fg), r(ing), u(lysses), where above 1. each: seconds a video, of all together. GiB: the most that a "
    "worker holds. idle: share of time without work. A/B: denoise and decode workers."
)
_COMMAND_WIDTH = 76  # of a line of the command, which must survive copying from a narrow terminal


def plan_report(answer: Answer, top: int) -> RenderableType:
    """Everything, top down: the question, the proposals, what they gain, the refused, the command, the small print."""
    plan, question = answer.plan, answer.question
    best = plan.best
    parts: list[RenderableType] = [Text(title(answer), style="bold"), Text(machine_text(question))]
    if best is None:
        parts.append(Text(f"\nNothing of this can run: {answer.advice or 'see below'}.", style="bold red"))
    else:
        parts += [proposal_table(shown_proposals(plan, top), plan.videos, best), *map(Text, gain_lines(answer))]
    parts.append(refusal_table(plan) if plan.refusals else Text(""))
    if best is not None and question.model.can_run:
        command = generate_command(best.arrangement, answer)
        parts += [Text("To run the first:", style="bold cyan"), Text(f"\n{folded(command)}\n", no_wrap=True)]
    elif best is not None:
        parts.append(Text(f"pipedit can plan for {question.name}, but not run it yet.\n", style="bold cyan"))
    parts.append(Text(small_print(question), style="dim"))
    return Group(*parts)


def title(answer: Answer) -> str:
    (video,), question = answer.plan.videos, answer.question
    videos = "1 video" if video.count == 1 else f"{video.count} videos"
    steps = "1 step" if video.cost.num_steps == 1 else f"{video.cost.num_steps} steps"
    guided = "guidance in two passes" if video.uses_guidance else "one pass a step"
    size = f"{video.request.width}x{video.request.height}, {video.request.num_frames} frames"
    return f"{question.name}: {videos} of {size}, {steps}, {guided}"


def machine_text(question: Question) -> str:
    cluster = question.cluster
    joined = f", joined by {cluster.link.title or cluster.link.name}" if cluster.num_devices > 1 else ""
    return (
        f"{cluster.num_devices} x {cluster.device.title or cluster.device.name}, "
        f"{format_bytes(question.available_bytes)} each{joined}"
    )


def shown_proposals(plan: Plan, top: int) -> list[Proposal]:
    """The best of each number of workers by role, so many of them, and the best of each kind that is not among them.
    Those that leave workers without work only where that is best."""
    by_split = [p for p in plan.best_by_split() if p is plan.best or p.arrangement.num_workers == plan.num_workers]
    chosen = by_split[:top]
    kinds = {proposal.arrangement.kind for proposal in chosen}
    others = {proposal.arrangement.kind: proposal for proposal in reversed(by_split)}
    return [*chosen, *(others[kind] for kind in Kind if kind in others and kind not in kinds)]


def small_print(question: Question) -> str:
    """Where the figures come from, each source once."""
    device, link = question.cluster.device, question.cluster.link
    sources = {**device.source, **(link.source if question.cluster.num_devices > 1 else {})}
    by_origin: dict[str, list[str]] = {}
    for name, text in sources.items():
        by_origin.setdefault(_origin(text), []).append(name)
    told = [f"{origin}: {', '.join(names)}" for origin, names in by_origin.items()]
    return "\n".join(["Predictions, not measurements: nothing was run. Constants (--json tells more):", *told])


def _origin(source: str) -> str:
    """What sources have in common that differ in details."""
    if source.startswith("published"):
        return "published, times an assumed share"
    return source.partition(":")[0]


def proposal_table(proposals: Sequence[Proposal], videos: Sequence[PlannedVideo], best: Proposal) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("who does what", overflow="fold")
    for name in ("degrees", "total s", "each s", "first s", "GiB", "idle %"):
        table.add_column(name, justify="right", no_wrap=True)
    for proposal in proposals:
        style = "bold green" if proposal is best else ""
        table.add_row(*_cells(proposal, videos), style=style)
    offloaded = [proposal for proposal in proposals if proposal.arrangement.kind.is_offloaded]
    legend = _LEGEND
    if offloaded:
        host = format_bytes(max(proposal.host_bytes for proposal in offloaded))
        legend += f" Offloaded weights take {host} of host memory."
    return Group(table, Text(legend, style="dim"))


def _cells(proposal: Proposal, videos: Sequence[PlannedVideo]) -> list[str]:
    prediction, arrangement = proposal.prediction, proposal.arrangement
    peaks = _by_group(arrangement, [f"{num_bytes / GIB:.1f}" for num_bytes in proposal.peak_bytes])
    return [
        way_text(arrangement),
        degrees_text(arrangement, videos),
        seconds_text(prediction.makespan_s),
        seconds_text(prediction.seconds_each),
        seconds_text(prediction.first_video_s),
        "/".join(peaks),
        "/".join(f"{share * 100:.0f}" for share in prediction.idle.values()),
    ]


def way_text(arrangement: Arrangement) -> str:
    """In the words of the flags, such as "disaggregated 7+1, encode on decode, aco auto"."""
    if arrangement.kind is not Kind.DISAGGREGATED:
        return f"colocated {arrangement.num_workers}{arrangement.kind.removeprefix('colocated')}"
    placement = arrangement.placement
    split = f"{len(placement.denoisers)}+{len(placement.decoders)}"
    return f"disaggregated {split}, encode on {encode_on(arrangement)}, aco {arrangement.aco}"


def encode_on(arrangement: Arrangement) -> str:
    return "denoise" if arrangement.encoder is Role.DENOISER else "decode"


def _by_group(arrangement: Arrangement, by_rank: Sequence[str]) -> list[str]:
    """The figure of the first denoiser and, where it is another rank, of the first decoder."""
    placement = arrangement.placement
    ranks = dict.fromkeys((placement.denoisers[0], placement.decoders[0]))
    return [by_rank[rank] for rank in ranks]


def degrees_text(arrangement: Arrangement, videos: Sequence[PlannedVideo]) -> str:
    """Such as "c2 u4"; several where videos differ."""
    texts = []
    for config in (arrangement.sharing(video) for video in videos):
        degrees = {"c": config.cfg_degree, "r": config.ring_degree, "u": config.ulysses_degree}
        texts.append(" ".join(f"{letter}{degree}" for letter, degree in degrees.items() if degree > 1) or "-")
    return ", ".join(dict.fromkeys(texts))


def seconds_text(seconds: float) -> str:
    """Three digits at least, and no more than whole seconds ask for."""
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}"


def gain_lines(answer: Answer) -> list[str]:
    """How much faster the best is than what else one would do."""
    best, lines = answer.plan.best, []
    assert best is not None
    for kind in Kind:
        rival = answer.plan.best_of(kind)
        if rival is not None and kind is not best.arrangement.kind:
            ratio = rival.makespan_s / best.makespan_s
            lines.append(f"The first is {ratio:.2f}x as fast as {kind} ({format_seconds(rival.makespan_s)}).")
    if (cost := cost_per_video(answer.question.cluster, best)) is not None:
        price = answer.question.cluster.device.price_per_hour
        lines.append(f"With the first, a video costs {cost:.2f}, at {price:g} an hour for each device.")
    if answer.beside is not None:
        lines.append(_beside_text(answer.beside, best))
    return lines


def cost_per_video(cluster: Cluster, proposal: Proposal) -> float | None:
    """In the currency of the device's price; all devices are paid for. None without a price."""
    price = cluster.device.price_per_hour
    return None if price is None else price * cluster.num_devices * proposal.prediction.seconds_each / 3600


def _beside_text(beside: Replicas, best: Proposal) -> str:
    """More videos an hour, or fewer; each of them later."""
    arrangement, prediction = beside.proposal.arrangement, beside.proposal.prediction
    ratio = best.makespan_s / beside.makespan_s
    return (
        f"{beside.engines} engines beside each other, {way_text(arrangement)} each, would take "
        f"{format_seconds(beside.makespan_s)} in all ({ratio:.2f}x as fast as the first), the first video "
        f"{format_seconds(prediction.first_video_s)} instead of {format_seconds(best.prediction.first_video_s)}."
    )


def refusal_table(plan: Plan) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("cannot run", overflow="fold", max_width=28)
    table.add_column("why", overflow="fold")
    for refusal in plan.refusals:
        table.add_row(Text(refusal.what), Text(refusal.reason, style="dim"))
    return table


def arrangement_flags(arrangement: Arrangement, videos: Sequence[PlannedVideo]) -> list[str]:
    """What `pipedit generate` has to be told."""
    workers, placement, kind = arrangement.num_workers, arrangement.placement, arrangement.kind
    flags = ["--num-workers", str(workers)]
    if kind is Kind.DISAGGREGATED:
        flags += ["--strategy", "disaggregated"]
        flags += ["--denoise-workers", str(len(placement.denoisers))]
        flags += ["--decode-workers", str(len(placement.decoders))]
        flags += ["--encode-on", encode_on(arrangement)]
        flags += ["--aco", arrangement.aco]
    else:
        flags += ["--strategy", "colocated"]
        flags += ["--decode", "serial"] if kind.is_serial else []
        flags += ["--offload"] if kind.is_offloaded else []
    shared = {arrangement.sharing(video) for video in videos}
    if len(shared) == 1 and len(placement.denoisers) > 1:
        (config,) = shared
        flags += ["--cfg-degree", str(config.cfg_degree), "--ring-degree", str(config.ring_degree)]
        flags += ["--ulysses-degree", str(config.ulysses_degree)]
    return flags


def generate_command(arrangement: Arrangement, answer: Answer) -> str:
    """What runs it, with the flags that say what to make as they were given."""
    return shlex.join([*generate_words(answer.question), *arrangement_flags(arrangement, answer.plan.videos)])


def generate_words(question: Question) -> list[str]:
    """The command without the flags that say how it runs."""
    words = ["pipedit", "generate", *(["--prompt-file", "prompts.txt"] if question.count > 1 else ["PROMPT"])]
    words += ["--model", question.name]
    for name, value in question.given.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--vae-use-tiling"] if question.tiling else []
    if (question.given.get("true_cfg_scale") or 0) > 1:
        words += ["--negative-prompt", "NEGATIVE"]
    return words


def folded(command: str) -> str:
    """The command on lines that a shell takes for one."""
    lines = [""]
    for word in command.replace(" --", "\n--").split("\n"):  # a flag stays with its value
        if lines[-1] and len(lines[-1]) + len(word) + 3 > _COMMAND_WIDTH:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


# -- as JSON ------------------------------------------------------------------------------------------------------


def plan_as_json(answer: Answer) -> dict[str, Any]:
    plan, question, beside = answer.plan, answer.question, answer.beside
    cluster, best = question.cluster, plan.best
    return {
        "kind": "prediction",
        "model": question.name,
        "videos": [_video_as_json(video) for video in plan.videos],
        "machine": {
            "device": cluster.device.name,
            "num_devices": cluster.num_devices,
            "link": cluster.link.name,
            "available_bytes": question.available_bytes,
            "price_per_hour": cluster.device.price_per_hour,
            "source": {"device": dict(cluster.device.source), "link": dict(cluster.link.source)},
        },
        "proposals": [
            {**_proposal_as_json(proposal, plan.videos), "cost_per_video": cost_per_video(cluster, proposal)}
            for proposal in plan.proposals
        ],
        "replicas": None
        if beside is None
        else {
            "engines": beside.engines,
            "makespan_s": beside.makespan_s,
            "videos_per_hour": beside.videos_per_hour,
            "each": _proposal_as_json(beside.proposal, plan.videos),
        },
        "refusals": [{"what": refusal.what, "reason": refusal.reason} for refusal in plan.refusals],
        "advice": answer.advice,
        "compared": plan.compared,
        "command": None if best is None or not question.model.can_run else generate_command(best.arrangement, answer),
    }


def _video_as_json(video: PlannedVideo) -> dict[str, Any]:
    request = video.request
    return {
        "count": video.count,
        "width": request.width,
        "height": request.height,
        "num_frames": request.num_frames,
        "num_inference_steps": request.num_inference_steps,
        "uses_guidance": video.uses_guidance,
        "latent_tokens": video.cost.latent_tokens,
        "heads": video.heads,
    }


def _proposal_as_json(proposal: Proposal, videos: Sequence[PlannedVideo]) -> dict[str, Any]:
    arrangement, prediction = proposal.arrangement, proposal.prediction
    placement = arrangement.placement
    return {
        "kind": arrangement.kind.name.lower(),
        "description": arrangement.describe(),
        "num_workers": arrangement.num_workers,
        "denoisers": list(placement.denoisers),
        "decoders": list(placement.decoders),
        "encoders": list(placement.encoders),
        "aco": arrangement.aco,
        "offload": arrangement.kind.is_offloaded,
        "parallel": [dataclasses.asdict(arrangement.sharing(video)) for video in videos],
        "makespan_s": prediction.makespan_s,
        "seconds_each": prediction.seconds_each,
        "first_video_s": prediction.first_video_s,
        "videos_per_hour": prediction.videos_per_hour,
        "idle_share": dict(prediction.idle),
        "peak_bytes": list(proposal.peak_bytes),
        "host_bytes": proposal.host_bytes,
        "flags": arrangement_flags(arrangement, videos),
    }
