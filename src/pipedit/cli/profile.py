"""`pipedit profile`: what this machine does per second, as a file for `plan`, `simulate` and `--hardware`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pipedit.cli.console import session_of
from pipedit.cli.options import JsonFlag, default, option
from pipedit.core.errors import InvalidRequestError, PipeditError
from pipedit.core.staging import target_problems
from pipedit.core.units import format_bytes


def profile(
    context: typer.Context,
    output: Annotated[
        Path | None, option("--output", "-o", metavar="FILE", help="Write it to this file; replaces it.")
    ] = None,
    device: Annotated[
        str, option("--device", metavar="D", help=f"cpu or cuda. {default('cuda where there is one')}")
    ] = "auto",
    num_workers: Annotated[
        int | None,
        option(
            "--num-workers", metavar="N",
            help=f"Workers that measure at the same time. {default('one for each GPU; 2 on the CPU')}",
        ),
    ] = None,
    budget: Annotated[
        float, option("--budget", metavar="SECONDS", help=f"About how long to measure. {default('45')}")
    ] = 45.0,
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Measure this machine: compute rates, memory, and the links between workers. About a minute; no model needed."""
    if output is not None and (problems := target_problems(output)):
        raise InvalidRequestError(problems)
    if budget <= 0:
        raise InvalidRequestError([f"--budget {budget:g} should be more than 0 seconds"])
    from pipedit.bench.machine_profile import MachineProfile, measure
    from pipedit.plan.hardware import write_cluster

    session = session_of(context)
    cluster = measure(MachineProfile(device=device, workers=num_workers, budget_s=budget))
    session.report.update(dataclasses.asdict(cluster))
    if not as_json:
        session.terminal.table(_table(cluster))
    if output is not None:
        try:
            write_cluster(cluster, output)
        except OSError as error:
            raise PipeditError(f"{output} could not be written: {error.strerror or error}") from error


def _table(cluster: Any) -> Table:
    device, link = cluster.device, cluster.link
    table = Table(show_header=False, title=f"{cluster.num_devices} x {device.title}", box=None)
    for label, rate in (
        ("linear layers", device.linear_per_s),
        ("attention", device.attention_per_s),
        ("attention with a mask", device.attention_per_s * device.masked_attention),
        ("convolutions", device.convolution_per_s),
    ):
        table.add_row(label, f"{rate / 1e9:.1f} GFLOP/s")
    table.add_row("overhead of a layer", f"{device.layer_overhead_s * 1e3:.2f} ms")
    table.add_row("its memory", f"{format_bytes(device.memory_bytes)}, {format_bytes(device.memory_bytes_per_s)}/s")
    table.add_row("from host memory", f"{format_bytes(device.host_bytes_per_s)}/s")
    if cluster.num_devices > 1:
        table.add_row("all-to-all", f"{format_bytes(link.bytes_per_s)}/s each, {link.latency_s * 1e6:.0f} us at least")
        table.add_row("to the next one", f"{format_bytes(link.ring_bytes_per_s)}/s each")
    return table
