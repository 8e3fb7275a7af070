"""The tables of `pipedit bench`'s parallel measurements, from their JSON documents."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from pipedit.core.units import format_bytes, format_seconds


def sequence_parallel_tables(result: dict[str, Any]) -> Iterator[Table]:
    """One for each run, then what to know before believing it."""
    for part, label in (("attention", "attention"), ("layers", "whole transformer")):
        for run in result.get(part, {}).get("runs", []):
            yield _table(run, f"{label}, {run['ranks']} ranks")
    yield _notes(result)


def _table(run: dict[str, Any], label: str) -> Table:
    baselines = list(next(iter(run["variants"].values()))["speed_up"])
    table = Table(title=f"{label}: {_conditions(run)}", box=None, title_justify="left")
    for heading in ("", "time", "spread", *(f"over {_plain(name)}" for name in baselines), "of the ideal", "exposed"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_column("result")
    table.add_column("buffers", justify="right")
    for name, seconds in run["references_s"].items():
        table.add_row(name, *_time(seconds), style="dim")
    for name, figures in run["variants"].items():
        speed_ups = [f"{figures['speed_up'][baseline]['median']:.2f}x" for baseline in baselines]
        share = f"{figures['share_of_ideal']['median']:.1%}"
        exposed = _milliseconds(figures["exposed_s"]["median"])
        table.add_row(
            _label(name, figures),
            *_time(figures["seconds"]),
            *speed_ups,
            share,
            exposed,
            _result(figures),
            _buffers(figures),
        )
    return table


def _conditions(run: dict[str, Any]) -> str:
    limit, delivered = run["limit_bits_per_s"], run["delivered_bits_per_s"]
    told = [
        f"communication : compute {run['ratio']['median']:.2f}",
        "links unlimited" if limit is None else f"links of {limit / 1e6:.0f} Mbit/s",
        f"delivered {min(delivered) / 1e6:.0f} to {max(delivered) / 1e6:.0f}",
        f"ideal {_milliseconds(run['ideal_s']['median'])}",
    ]
    if "hidden_under_attention_s" in run:
        told.append(f"all hidden under attention {_milliseconds(run['hidden_under_attention_s']['median'])}")
    return ", ".join(told)


def _label(name: str, figures: dict[str, Any]) -> str:
    return f"{name} (chose {figures['chosen_chunks']})" if "chosen_chunks" in figures else name


def _time(seconds: dict[str, float]) -> tuple[str, str]:
    spread = f"{_milliseconds(seconds['min'])} to {_milliseconds(seconds['max'])}"
    return _milliseconds(seconds["median"]), spread


def _milliseconds(seconds: float) -> str:
    """Finer than `format_seconds`: variants differ by a few of them."""
    return f"{seconds * 1000:.0f} ms" if abs(seconds) < 60 else format_seconds(seconds)


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("ulysses", "Ulysses")


def _result(figures: dict[str, Any]) -> str:
    return "equal bits" if figures["is_equal"] else f"differs by {figures['max_difference']:.1e}"


def _buffers(figures: dict[str, Any]) -> str:
    return format_bytes(figures["buffer_bytes"]) if "buffer_bytes" in figures else ""


def _notes(result: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    load = result["load_at_start"]
    if load["is_busy"]:
        table.add_row(
            f"the machine was busy at the start (load average {load['load_average']:.2f}, "
            f"{load['busy_cores']:.2f} cores at work): do not quote these times"
        )
    for run in result.get("attention", {}).get("runs", []):
        if not run["control_holds"]:
            table.add_row(
                f"{run['ranks']} ranks at {run['wanted_ratio']:g}: blocking chunks beat plain Ulysses, "
                "so something is wrong with the links or the machine"
            )
    table.add_row(f"medians of {result['rounds']} interleaved rounds; ideal: the longer of compute and communication")
    return table


def overlap_table(case: dict[str, Any]) -> Table:
    """What `bench overlap` found for one site."""
    site = case["site"]
    title = f"{site['model']}, one of {site['ranks']} ranks"
    columns = ("link", "chunks", "overlap", "time", "bound", "hidden", "speed-up", "attention / one chunk")
    table = Table(*columns, title=title, box=None)
    kernels = {row["chunks"]: row["over_one"]["median"] for row in case["attention"]}
    for link in case["links"]:
        for form in link["forms"]:
            hidden = f"{form['hidden_share']['median']:.0%} of {link['hideable_share']:.0%}"
            table.add_row(
                f"{link['gb_per_s']:g} GB/s", str(form["chunks"]), form["overlap"].replace("_", " "),
                f"{form['seconds']['median'] * 1e3:.2f} ms", f"{link['bound_s'] * 1e3:.2f} ms",
                hidden, f"{form['speed_up']['median']:.2f}", f"{kernels[form['chunks']]:.3f}",
            )  # fmt: skip
    return table


def disaggregation_tables(result: dict[str, Any]) -> list[Table]:
    """One for each mix, and for each mix at each rate of the link."""
    tables = [_streams_table(name, mix) for name, mix in result["mixes"].items()]
    for limited in result.get("limited", ()):
        link = f"link of {limited['bits_per_s'] / 1e6:g} Mbit/s"
        tables += [_streams_table(f"{name}, {link}", mix) for name, mix in limited["mixes"].items()]
    return tables


def _streams_table(name: str, mix: dict[str, Any]) -> Table:
    bound, loaded = (format_seconds(mix[key]) for key in ("bound_interval_s", "loaded_bound_interval_s"))
    table = Table(
        "", "all videos", "a video (min to max)", "of the bound", "loaded", "speed-up", "predicted", "levels off",
        title=f"{name}: {mix['num_inference_steps']} steps, bound {bound} a video, {loaded} loaded", box=None,
        caption="loaded: all workers busy; predicted: even rounds, by durations of the odd ones",
    )  # fmt: skip
    for variant, figures in mix["variants"].items():
        each, predicted = figures["interval_s"], figures["predicted"]
        table.add_row(
            variant,
            format_seconds(figures["makespan_s"]["median"]),
            f"{each['median']:.3f} s ({each['min']:.3f} to {each['max']:.3f})",
            f"{figures['share_of_bound']['median'] * 100:.0f} %",
            f"{figures['share_of_loaded_bound']['median'] * 100:.0f} %",
            f"{figures['speedup_over_colocated']['median']:.2f}x",
            f"{predicted['error'] * 100:+.0f} %",
            str(figures["largest_difference"]),
        )
    return table


def long_video_tables(result: dict[str, Any]) -> list[Table]:
    """One for each length."""
    return [_lengths_table(frames, variants) for frames, variants in result["lengths"].items()]


def _lengths_table(frames: str, variants: dict[str, Any]) -> Table:
    table = Table(
        "", "to the file (min to max)", "first frames", "largest worker", "stages at work",
        title=f"{frames} frames", box=None,
        caption="stages at work: the least and the most busy one, in the steady state",
    )  # fmt: skip
    for name, figures in variants.items():
        taken, least, most = figures["seconds"], figures["least_busy_share"], figures["busiest_share"]
        table.add_row(
            name if figures["num_frames"] == int(frames) else f"{name} ({figures['num_frames']} frames)",
            f"{taken['median']:.1f} s ({taken['min']:.1f} to {taken['max']:.1f})",
            format_seconds(figures["first_frames_s"]["median"]),
            format_bytes(figures["largest_peak_bytes"]),
            "-" if most is None else f"{least['median'] * 100:.0f} to {most['median'] * 100:.0f} %",
        )
    return table


def faults_table(result: dict[str, Any]) -> Table:
    """Kills by stage, then how far the requests had come that were cancelled."""
    kills, cancels = result["kills"], result["cancels"]
    table = Table("", "", "how often", box=None, title="faults", title_justify="left")
    for stage, roles in kills.get("by_stage_and_role", {}).items():
        table.add_row("killed", stage, str(sum(roles.values())))
    if kills["count"]:
        after = kills["named_after_s"]
        told = f"{format_seconds(after['median'])}, at most {format_seconds(after['max'])}"
        table.add_row("", f"named after {told}", str(kills["count"]))
        table.add_row("", "requests that failed", str(kills["requests_failed"]))
        table.add_row("", "requests that began again", str(kills["requests_begun_again"]))
    for stage, count in sorted(cancels["cancelled_after"].items()):
        table.add_row("cancelled", stage, str(count))
    table.add_row("", "were over before", str(cancels["finished_nevertheless"]))
    table.add_row("", "others, which finished", str(cancels["untouched"]))
    table.add_row("problems", "", str(len(result["problems"])))
    return table
