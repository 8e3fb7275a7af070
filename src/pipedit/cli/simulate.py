"""`pipedit simulate`: a workload on a cluster, in virtual time; and tables of cases."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipedit.cli.console import Session, session_of
from pipedit.cli.options import default, option, switch
from pipedit.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from pipedit.engine.simulation import Scenario
    from pipedit.plan.cluster_file import ClusterFile
    from pipedit.plan.outcome import Outcome
    from pipedit.plan.pools import Service
    from pipedit.plan.timeline import Timeline

_WHAT, _RUN, _OUTPUT = "What to simulate", "How it runs", "Output"
_MOST_SPANS = 300_000  # of a picture or a trace: about 100 MiB as a file
_MOST_RANKS = 128  # of a picture
EPILOG = """
[bold]Examples[/bold]

pipedit simulate workload.csv --cluster cluster.json --picture timeline.png

pipedit simulate workload.csv --gpu a6000 --gpus 8 --strategy colocated

pipedit simulate --cases cases.csv -o predicted.csv

[dim]A line of a workload has a model; width, height, num_frames, num_inference_steps, guidance_scale; count; arrival_s,
arrivals (burst, constant, poisson), rate in requests per second, seed; priority. Only the model must be there.[/dim]

[dim]A cluster file is a JSON object with device, num_devices, devices_per_node, link, node_link, price_per_hour, and
replicas: a list of objects with model, count, num_workers, strategy and other flags of pipedit generate.[/dim]
"""


def simulate(
    typer_context: typer.Context,
    workload: Annotated[str | None, typer.Argument(metavar="WORKLOAD", hidden=True)] = None,
    cluster: Annotated[
        str | None, option("--cluster", panel=_WHAT, metavar="FILE", help="Which devices there are, as JSON.")
    ] = None,
    gpu: Annotated[
        str | None, option("--gpu", panel=_WHAT, metavar="D", help="Instead: the kind of device, by name or a file.")
    ] = None,
    gpus: Annotated[
        int | None, option("--gpus", panel=_WHAT, metavar="N", help=f"How many of them. {default('8')}")
    ] = None,
    link: Annotated[
        str | None,
        option("--link", panel=_WHAT, metavar="L", help=f"What joins them. {default('as the device usually comes')}"),
    ] = None,
    cases: Annotated[
        str | None,
        option(
            "--cases",
            panel=_WHAT,
            metavar="FILE",
            help="Instead of a workload: a table with model, gpu, width, height, frames, steps, prompts, variant; "
            "a column predicted_s is added.",
        ),
    ] = None,
    num_workers: Annotated[
        int | None,
        option("--num-workers", panel=_RUN, metavar="N", help=f"Of each engine. {default('devices of one machine')}"),
    ] = None,
    strategy: Annotated[
        str | None,
        option(
            "--strategy",
            panel=_RUN,
            metavar="S",
            help=f"auto, colocated, disaggregated or dualparal. {default('auto')}",
        ),
    ] = None,
    denoise_workers: Annotated[
        int | None, option("--denoise-workers", panel=_RUN, metavar="A", help="Workers that denoise.")
    ] = None,
    decode_workers: Annotated[
        int | None, option("--decode-workers", panel=_RUN, metavar="B", help="Workers that decode.")
    ] = None,
    encode_on: Annotated[
        str | None,
        option("--encode-on", panel=_RUN, metavar="GROUP", help="denoise or decode: where prompts are encoded."),
    ] = None,
    aco: Annotated[
        str | None,
        option("--aco", panel=_RUN, metavar="A", help="on, off, auto: idle decode workers help with attention."),
    ] = None,
    decode: Annotated[
        str | None, option("--decode", panel=_RUN, metavar="D", help="spread or serial, of colocated workers.")
    ] = None,
    offload: Annotated[
        bool, switch("--offload", panel=_RUN, help="Weights wait in host memory while they are not used.")
    ] = False,
    block_size: Annotated[
        int | None,
        option("--block-size", panel=_RUN, metavar="N", help=f"dualparal: latent frames in a block. {default('8')}"),
    ] = None,
    context: Annotated[
        int | None,
        option(
            "--context",
            panel=_RUN,
            metavar="N",
            help=f"dualparal: latent frames of each neighbour that a block sees. {default('a whole block')}",
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        option("--prefix", panel=_RUN, metavar="P", help=f"dualparal: cache or rerun. {default('cache')}"),
    ] = None,
    context_storage: Annotated[
        str | None,
        option(
            "--context-storage", panel=_RUN, metavar="S", help=f"dualparal: device, host or int8. {default('device')}"
        ),
    ] = None,
    dualparal_compat: Annotated[
        bool, switch("--dualparal-compat", panel=_RUN, help="dualparal: as the released code does it.")
    ] = False,
    grain: Annotated[
        int | None,
        option(
            "--grain",
            panel=_RUN,
            metavar="N",
            help=f"Steps or chunks in one command, at least; 0: all. {default('1; more for very many requests')}",
        ),
    ] = None,
    output: Annotated[
        str | None,
        option("--output", "-o", panel=_OUTPUT, metavar="FILE", help=f"Of --cases. {default('stdout')}"),
    ] = None,
    trace: Annotated[
        str | None, option("--trace", panel=_OUTPUT, metavar="FILE", help="Write the timeline, as generate does.")
    ] = None,
    picture: Annotated[
        str | None, option("--picture", panel=_OUTPUT, metavar="FILE", help="Draw the timeline, as .svg or .png.")
    ] = None,
    as_json: Annotated[bool, switch("--json", panel=_OUTPUT, help="Print one JSON document.")] = False,
    quiet: Annotated[bool, switch("--quiet", "-q", panel=_OUTPUT, help="Nothing on stderr but errors.")] = False,
) -> None:
    """Predict a WORKLOAD on a cluster: throughput, waiting, idle devices and what a video costs.

    The request scheduler is the one that generates videos, and runs here on predicted times.
    """
    session = session_of(typer_context)
    session.terminal.quiet = quiet
    settings = {
        "num_workers": num_workers,
        "strategy": strategy,
        "denoise_workers": denoise_workers,
        "decode_workers": decode_workers,
        "encode_on": encode_on,
        "aco": aco,
        "decode": decode,
        "offload": offload or None,
        "block_size": block_size,
        "context": context,
        "prefix": prefix,
        "context_storage": context_storage,
        "dualparal_compat": dualparal_compat or None,
    }
    machine = {"cluster": cluster, "gpu": gpu, "gpus": gpus, "link": link}
    given = {name: value for name, value in settings.items() if value is not None}
    if cases is not None:
        others = {"WORKLOAD": workload, "trace": trace, "picture": picture, "grain": grain, **machine, **given}
        _refuse([name for name, value in others.items() if value is not None], "--cases says all of it")
        _simulate_cases(session, cases, output, as_json=as_json)
        return
    if workload is None:
        raise InvalidRequestError(
            ["name a workload file, or a table with --cases; pipedit simulate --help describes both"]
        )
    _refuse([] if output is None else ["output"], "it belongs to --cases; there are --trace, --picture and --json")
    scenario = _prepare(workload, machine, given, grain=grain, files=(trace, picture))
    outcome, timeline = _run(scenario, keep_spans=trace is not None or picture is not None)
    _report(session, scenario, outcome, as_json=as_json)
    if timeline is not None:
        _write(session, timeline, trace, picture)


def _refuse(names: Sequence[str], why: str) -> None:
    if names:
        flags = [name if name.isupper() else "--" + name.replace("_", "-") for name in names]
        raise InvalidRequestError([f"{', '.join(flags)} cannot be used here: {why}"])


# -- a workload ---------------------------------------------------------------------------------------------------


def _cluster_file(machine: dict[str, Any]) -> "ClusterFile":
    from pipedit.plan.cluster_file import ClusterFile, read_cluster_file

    path = machine.pop("cluster")
    if path is not None:
        _refuse([name for name, value in machine.items() if value is not None], "--cluster says all of it")
        return read_cluster_file(path)
    if machine["gpu"] is None:
        raise InvalidRequestError(["say on which machine: --cluster FILE, or --gpu and --gpus"])
    gpus = 8 if machine["gpus"] is None else machine["gpus"]
    if gpus < 1:
        raise InvalidRequestError([f"--gpus {gpus} must be at least 1"])
    return ClusterFile(device=machine["gpu"], num_devices=gpus, devices_per_node=min(gpus, 8), link=machine["link"])


def _prepare(
    workload: str,
    machine: dict[str, Any],
    settings: dict[str, Any],
    *,
    grain: int | None,
    files: tuple[str | None, str | None],
) -> "Scenario":
    """Raises InvalidRequestError with what is wrong with the workload, the machine, and the names of files to write."""
    from pipedit.core.staging import target_problems
    from pipedit.engine.simulation import attempt, prepare
    from pipedit.media import check_picture
    from pipedit.plan.workload import read_workload

    problems: list[str] = []
    streams = attempt(problems, lambda: read_workload(workload))
    cluster_file = attempt(problems, lambda: _cluster_file(machine))
    scenario = None
    if streams is not None and cluster_file is not None:
        scenario = attempt(problems, lambda: prepare(streams, cluster_file, settings, grain=grain))
    elif cluster_file is not None:
        attempt(problems, cluster_file.cluster)
    trace, picture = files
    problems += [] if trace is None else target_problems(Path(trace))
    problems += [] if picture is None else check_picture(picture)
    problems += [f"--grain {grain} must be at least 0"] if grain is not None and grain < 0 else []
    if scenario is not None and (trace is not None or picture is not None):
        problems += _size_problems(scenario, picture)
    if problems or scenario is None:
        raise InvalidRequestError(problems)
    return scenario


def _size_problems(scenario: "Scenario", picture: str | None) -> list[str]:
    """A request has about as many spans as steps and chunks, on each rank of an engine."""
    services = {name: (pool, service) for pool in scenario.pools for name, service in pool.services.items()}
    spans = 0
    for arrival in scenario.arrivals:
        pool, service = services[arrival.kind]
        spans += _spans_of_a_rank(service) * len(pool.placement.world)
    problems = []
    if spans > _MOST_SPANS:
        problems.append(
            f"a timeline of {len(scenario.arrivals)} requests has about {spans} pieces, and {_MOST_SPANS} are the most "
            "to be written; take fewer requests, or leave --trace and --picture out"
        )
    ranks = sum(pool.num_ranks for pool in scenario.pools)
    if picture is not None and ranks > _MOST_RANKS:
        problems.append(f"a picture of {ranks} devices is too tall, {_MOST_RANKS} are the most; leave --picture out")
    return problems


def _spans_of_a_rank(service: "Service") -> int:
    """About."""
    blocks, ring = service.work.blocks, service.ring
    if blocks is None or ring is None:
        return service.work.num_steps + service.work.num_chunks
    return (blocks.num_operations or 0) * ring.passes


def _run(scenario: "Scenario", *, keep_spans: bool) -> "tuple[Outcome, Timeline | None]":
    from pipedit.core.version import __version__
    from pipedit.plan.outcome import summarize
    from pipedit.plan.simulator import simulate
    from pipedit.plan.timeline import Timeline

    run = simulate(scenario.pools, scenario.arrivals, keep_spans=keep_spans)
    outcome = summarize(run, price_per_hour=scenario.price_per_hour, num_devices=scenario.cluster.num_devices)
    if not keep_spans:
        return outcome, None
    models = ", ".join(dict.fromkeys(engines.model for engines in scenario.engines))
    metadata = {
        "title": f"Predicted: {models} on {scenario.cluster.num_devices} × {scenario.cluster.device.title}",
        "pipedit_version": __version__,
    }
    return outcome, Timeline(spans=run.spans, metadata=metadata)


def _report(session: Session, scenario: "Scenario", outcome: "Outcome", *, as_json: bool) -> None:
    from pipedit.cli.simulate_tables import engines_as_json, outcome_tables

    session.report.update(outcome.as_json(), engines=engines_as_json(scenario), grain=scenario.grain)
    if not as_json:
        for table in outcome_tables(scenario, outcome):
            session.terminal.table(table)


def _write(session: Session, timeline: "Timeline", trace: str | None, picture: str | None) -> None:
    from pipedit.media import save_picture
    from pipedit.plan.trace_file import write_trace

    if trace is not None:
        write_trace(trace, timeline)
        session.terminal.say(f"timeline in {trace}")
    if picture is not None:
        save_picture(timeline, picture)
        session.terminal.say(f"drawn in {picture}")
    session.report.update({name: file for name, file in (("trace", trace), ("picture", picture)) if file is not None})


# -- cases --------------------------------------------------------------------------------------------------------


def _simulate_cases(session: Session, cases: str, output: str | None, *, as_json: bool) -> None:
    from pipedit.core.staging import target_problems, write_text_whole
    from pipedit.engine.cases import cases_as_csv, predict_cases, read_cases

    problems = [] if output is None else target_problems(Path(output))
    try:
        table = read_cases(cases)
    except InvalidRequestError as error:
        raise InvalidRequestError([*error.problems, *problems]) from error
    if problems:
        raise InvalidRequestError(problems)
    predictions = list(predict_cases(table.cases))
    text = cases_as_csv(table, predictions)
    rows = [{**case.row.values, "predicted_s": seconds} for case, seconds in zip(table.cases, predictions, strict=True)]
    session.report.update(cases=rows)
    if output is not None:
        write_text_whole(Path(output), text)
        session.terminal.say(f"{len(predictions)} cases predicted in {output}")
    elif not as_json:
        session.terminal.data(text.rstrip("\n"))
