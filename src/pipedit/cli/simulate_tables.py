"""The tables of `pipedit simulate`: what ran, what came out of it, and what each group of devices did."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from pipedit.core.units import format_bytes, format_seconds
from pipedit.plan.aco_gate import AcoMode

if TYPE_CHECKING:
    from pipedit.engine.simulation import Engines, Scenario
    from pipedit.plan.outcome import Outcome


def outcome_tables(scenario: "Scenario", outcome: "Outcome") -> Iterator[Table]:
    yield _engines_table(scenario)
    yield _figures(outcome)
    yield _groups(outcome)


def _engines_table(scenario: "Scenario") -> Table:
    device = scenario.cluster.device.title
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    table.add_column(f"engines on {scenario.cluster.num_devices} × {device}", overflow="fold")
    table.add_column("workers", justify="right")
    for engines in scenario.engines:
        workers = engines.arrangement.num_workers
        table.add_row(engines.model, _described(engines), f"{engines.pool.count} × {workers}")
    return table


def _described(engines: "Engines") -> str:
    helping = "" if engines.arrangement.aco is AcoMode.OFF else ", which help with attention"
    return engines.arrangement.describe() + helping


def _figures(outcome: "Outcome") -> Table:
    latency = outcome.latency
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("requests", str(outcome.requests))
    table.add_row("makespan", format_seconds(outcome.makespan_s))
    table.add_row("throughput", f"{outcome.throughput_per_s * 3600:,.1f} videos an hour")
    table.add_row("first video", format_seconds(outcome.first_video_s))
    quantiles = [("median", latency.p50_s), ("90 %", latency.p90_s), ("95 %", latency.p95_s), ("99 %", latency.p99_s)]
    table.add_row("latency", ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in quantiles))
    table.add_row(
        "longest wait", f"{format_seconds(outcome.longest_wait_s)}, at most {outcome.peak_queue} in the queue"
    )
    table.add_row("handed over", f"{format_bytes(outcome.hand_over_bytes)} in {format_seconds(outcome.hand_over_s)}")
    table.add_row("utilisation", f"{outcome.utilisation:.1%} of {outcome.num_devices} devices")
    if outcome.cost_per_video is not None:
        table.add_row("cost", f"{outcome.cost_per_video:,.3f} a video")
    return table


def _groups(outcome: "Outcome") -> Table:
    """Shares of the makespan, by group of devices and kind of work."""
    kinds = list(dict.fromkeys(what for use in outcome.groups.values() for what in use.busy_s))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("group")
    for name in ("devices", *kinds, "idle"):
        table.add_column(name, justify="right")
    for group, use in outcome.groups.items():
        available_s = use.ranks * outcome.makespan_s
        shares = [use.busy_s.get(what, 0.0) / available_s if available_s else 0.0 for what in kinds]
        table.add_row(group, str(use.ranks), *(f"{share:.1%}" for share in shares), f"{use.idle_share:.1%}")
    return table


def engines_as_json(scenario: "Scenario") -> list[dict[str, Any]]:
    return [
        {
            "model": engines.model,
            "count": engines.pool.count,
            "workers": engines.arrangement.num_workers,
            "description": _described(engines),
            "denoisers": list(engines.arrangement.placement.denoisers),
            "decoders": list(engines.arrangement.placement.decoders),
            "encoders": list(engines.arrangement.placement.encoders),
            "aco": str(engines.arrangement.aco),
        }
        for engines in scenario.engines
    ]
