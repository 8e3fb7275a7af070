"""`pipedit bench`: measurements anybody can repeat. Every figure comes with the machine, the commit and the command."""

import contextlib
import dataclasses
import enum
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.table import Table

from pipedit.cli.bench_tables import (
    disaggregation_tables,
    faults_table,
    long_video_tables,
    overlap_table,
    sequence_parallel_tables,
)
from pipedit.cli.console import session_of
from pipedit.cli.options import Command, Group, JsonFlag
from pipedit.core.errors import InvalidRequestError, PipeditError
from pipedit.core.staging import target_problems, write_text_whole
from pipedit.core.units import format_bytes, format_seconds

bench = typer.Typer(help="Measure speed and memory on this machine.", cls=Group, no_args_is_help=True)

Model = Annotated[str, typer.Option(help="Model to measure: a folder, a hub id or a short name.")]
RandomModel = Annotated[
    str | None,
    typer.Option("--random-model", help="Build this one with random weights: wan_mid, or any short name of a model."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16, for both sides.")]
NumFrames = Annotated[int | None, typer.Option(help="Frames (default: the model's).")]
Height = Annotated[int | None, typer.Option(help="Height in pixels (default: the model's).")]
Width = Annotated[int | None, typer.Option(help="Width in pixels (default: the model's).")]
Steps = Annotated[int | None, typer.Option("--num-inference-steps", help="Denoising steps (default: the model's).")]
TextLength = Annotated[int | None, typer.Option("--max-sequence-length", help="Text tokens (default: the model's).")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="Also write the JSON result to this file; replaces it.")
]


Number = TypeVar("Number")


class Part(enum.StrEnum):
    """What of `bench sequence-parallel`."""

    ATTENTION = "attention"
    LAYERS = "layers"
    ALL = "all"


@bench.command("generate", cls=Command)
def bench_generate(
    context: typer.Context,
    model: Model = "tiny",
    random_model: RandomModel = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    num_frames: NumFrames = None,
    height: Height = None,
    width: Width = None,
    num_inference_steps: Steps = None,
    max_sequence_length: TextLength = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds with both sides loaded.")] = 5,
    cold_rounds: Annotated[int, typer.Option(min=0, help="Rounds of fresh processes, imports included.")] = 5,
    compile_layers: Annotated[
        bool, typer.Option("--enable-torch-compile", help="torch.compile of the layers, on both sides.")
    ] = False,
    as_json: JsonFlag = False,
    output: Output = None,
) -> None:
    """End to end against the plain diffusers pipeline: same weights, same machine, interleaved."""
    _check_target(output)
    from pipedit.bench import generate

    session = session_of(context)
    settings = _settings(num_frames, height, width, num_inference_steps, max_sequence_length)
    with tempfile.TemporaryDirectory() as scratch:
        plan = generate.GenerateBench(
            model=_model(model, random_model, Path(scratch)), settings=settings, device=device, dtype=dtype,
            rounds=rounds, cold_rounds=cold_rounds, compile_layers=compile_layers,
        )  # fmt: skip
        result = generate.run(plan)
    _name_random(result, random_model)
    session.report.update(result)
    if not as_json:
        session.terminal.table(_generate_table(result))
    _write(result, output)


@bench.command("memory", cls=Command)
def bench_memory(
    context: typer.Context,
    model: Model = "tiny",
    random_model: RandomModel = None,
    dtype: Dtype = "float32",
    num_frames: Annotated[str, typer.Option(help="Frame counts, separated by commas.")] = "17,65,129,257",
    height: Height = None,
    width: Width = None,
    num_inference_steps: Steps = 1,
    max_sequence_length: TextLength = None,
    as_json: JsonFlag = False,
    output: Output = None,
) -> None:
    """Peak memory of a whole process against the number of frames, beside plain diffusers. On the CPU."""
    _check_target(output)
    from pipedit.bench import generate, memory

    session = session_of(context)
    counts = _numbers(int, "--num-frames", num_frames)
    settings = _settings(None, height, width, num_inference_steps, max_sequence_length)
    with tempfile.TemporaryDirectory() as scratch:
        chosen = _model(model, random_model, Path(scratch))
        result = memory.run(generate.GenerateBench(model=chosen, settings=settings, dtype=dtype), counts)
    _name_random(result, random_model)
    session.report.update(result)
    if not as_json:
        session.terminal.table(_memory_table(result))
    _write(result, output)


@bench.command("device", cls=Command)
def bench_device(
    context: typer.Context,
    model: Model = "tiny",
    random_model: RandomModel = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    num_frames: NumFrames = None,
    height: Height = None,
    width: Width = None,
    as_json: JsonFlag = False,
    output: Output = None,
) -> None:
    """Rates of attention, linear layers and VAE decoding at a model's shapes: a device profile for planning."""
    _check_target(output)
    from pipedit.bench.device import measure
    from pipedit.core.request import VideoRequest
    from pipedit.engine.engine import Engine
    from pipedit.plan.device_profile import write_profile

    session = session_of(context)
    settings = _settings(num_frames, height, width, None, None)
    with tempfile.TemporaryDirectory() as scratch:
        engine = Engine(_model(model, random_model, Path(scratch)), device=device, dtype=dtype)
        (request,) = engine.prepare([VideoRequest(prompt="a red ball moves right", seed=0, **settings)])
        profile = measure(engine, request)
    session.report.update(dataclasses.asdict(profile))
    if not as_json:
        table = Table("work", "dtype", "shape", "rate", title=profile.device, box=None)
        for rate in profile.rates:
            shape = ", ".join(f"{name} {size}" for name, size in rate.shape.items())
            table.add_row(rate.kind, rate.dtype, shape, f"{rate.operations_per_s / 1e9:.1f} GFLOP/s")
        session.terminal.table(table)
    if output is not None:
        with _writing(output):
            write_profile(profile, output)


@bench.command("sequence-parallel", cls=Command)
def bench_sequence_parallel(
    context: typer.Context,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, separated by commas.")] = "2,4",
    part: Annotated[Part, typer.Option(help="Attention alone, a whole transformer, or both.")] = Part.ALL,
    links: Annotated[
        str, typer.Option(help="Attention: communication : compute of the links, separated by commas.")
    ] = "0.5,1,2",
    tokens: Annotated[int, typer.Option(min=1, help="Attention: tokens.")] = 4096,
    heads: Annotated[int, typer.Option(min=1, help="Attention: heads.")] = 16,
    head_dim: Annotated[int, typer.Option(min=1, help="Attention: width of a head.")] = 64,
    rates: Annotated[
        str, typer.Option(help="Transformer: limits of the links in Mbit/s, separated by commas; or unlimited.")
    ] = "300,unlimited",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    as_json: JsonFlag = False,
    output: Output = None,
) -> None:
    """How much of the communication is hidden, between ranks with a core and a limited link each. Linux; needs root and
    iproute2."""
    _check_target(output)
    from pipedit.bench import sequence_parallel as measured

    session = session_of(context)
    plan = measured.SequenceParallelBench(
        links=_numbers(float, "--links", links),
        ranks=_numbers(int, "--ranks", ranks),
        rates_bits_per_s=_numbers(_rate, "--rates", rates),
        parts=(measured.ATTENTION, measured.LAYERS) if part is Part.ALL else (part.value,),
        rounds=rounds,
        attention=measured.AttentionShape(tokens=tokens, heads=heads, head_dim=head_dim),
    )
    result = measured.run(plan, session.terminal.say)
    session.report.update(result)
    if not as_json:
        for table in sequence_parallel_tables(result):
            session.terminal.table(table)
    _write(result, output)


@bench.command("overlap", cls=Command)
def bench_overlap(
    context: typer.Context,
    device: Device = "auto",
    scale: Annotated[str, typer.Option(help="full: what a rank of 8 sees; small: for the CPU.")] = "full",
    links: Annotated[
        str | None, typer.Option(help="Rates of the emulated link in GB/s each way, separated by commas.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    as_json: JsonFlag = False,
    output: Output = None,
) -> None:
    """One device as one rank of several: what PipeSP hides of an emulated exchange, what chunks cost."""
    _check_target(output)
    from pipedit.bench import overlap

    session = session_of(context)
    rates = tuple(_numbers(float, "--links", links)) if links is not None else ()
    result = overlap.run(overlap.OverlapBench(device=device, scale=scale, links_gb_per_s=rates, rounds=rounds))
    session.report.update(result)
    if not as_json:
        for case in result["cases"]:
            session.terminal.table(overlap_table(case))
        session.terminal.note(result["emulation"])
    _write(result, output)


@bench.command("disaggregation", cls=Command)
def bench_disaggregation(
    context: typer.Context,
    model: Model = "tiny",
    random_model: RandomModel = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    num_frames: NumFrames = None,
    height: Height = None,
    width: Width = None,
    steps: Annotated[
        str, typer.Option(help="Mixes and their denoising steps.")
    ] = "decode-heavy=2,balanced=6,denoise-heavy=16",
    denoise_workers: Annotated[int, typer.Option(min=1, help="Workers that denoise where groups are apart.")] = 1,
    decode_workers: Annotated[int, typer.Option(min=1, help="Workers that decode.")] = 1,
    prompts: Annotated[int, typer.Option(min=2, help="Videos of each stream.")] = 10,
    rounds: Annotated[
        int,
        typer.Option(min=2, help="Interleaved rounds: the simulator learns from the odd ones and predicts the others."),
    ] = 4,
    rates: Annotated[
        str | None, typer.Option(help="Also with so many Mbit/s between the workers, separated by commas; needs root.")
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=1.0, help="Limit for the streams at one rate.")] = 1800.0,
    as_json: JsonFlag = False,
    output: Output = None,
) -> None:
    """A stream of prompts on the same workers, arranged in every way, against pipeline bounds and the simulator."""
    _check_target(output)
    from pipedit.bench import disaggregation

    session = session_of(context)
    with tempfile.TemporaryDirectory() as scratch:
        plan = disaggregation.DisaggregationBench(
            model=_model(model, random_model, Path(scratch)),
            settings=_settings(num_frames, height, width, None, None),
            steps=_mixes(steps),
            denoise_workers=denoise_workers,
            decode_workers=decode_workers,
            prompts=prompts,
            rounds=rounds,
            device=device,
            dtype=dtype,
        )
        result = disaggregation.run(plan)
        if rates is not None:
            limited = dataclasses.replace(plan, only=disaggregation.APART)
            numbers = [number * 1e6 for number in _numbers(float, "--rates", rates)]
            result["limited"] = disaggregation.run_limited(limited, numbers, timeout_s=timeout_s)
    _name_random(result, random_model)
    session.report.update(result)
    if not as_json:
        for table in disaggregation_tables(result):
            session.terminal.table(table)
    _write(result, output)


@bench.command("long-video", cls=Command)
def bench_long_video(
    context: typer.Context,
    model: Model = "tiny",
    random_model: RandomModel = None,
    num_frames: Annotated[str, typer.Option(help="Lengths in frames, separated by commas.")] = "257,1025",
    height: Height = None,
    width: Width = None,
    num_inference_steps: Steps = None,
    workers: Annotated[str, typer.Option(help="Numbers of workers, separated by commas.")] = "1,2",
    block_size: Annotated[int, typer.Option(help="Latent frames in a block.")] = 8,
    context_latents: Annotated[int, typer.Option("--context", help="Latent frames of each neighbour.")] = 8,
    whole_frames: Annotated[
        int | None, typer.Option(help="Longest video that is also made in one piece (default: all).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 3,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    timeout_s: Annotated[float, typer.Option(min=1.0, help="Limit for each video.")] = 1800.0,
    as_json: JsonFlag = False,
    output: Output = None,
) -> None:
    """A long video in one piece and block by block (DualParal): time to the first frames and to the file, memory."""
    _check_target(output)
    from pipedit.bench import long_video

    session = session_of(context)
    with tempfile.TemporaryDirectory() as scratch:
        plan = long_video.LongVideoBench(
            model=_model(model, random_model, Path(scratch)),
            settings=_settings(None, height, width, num_inference_steps, None),
            frames=tuple(_numbers(int, "--num-frames", num_frames)),
            workers=tuple(_numbers(int, "--workers", workers)),
            blocks={"block_size": block_size, "context": context_latents},
            whole_frames=whole_frames,
            rounds=rounds,
            device=device,
            dtype=dtype,
            timeout_s=timeout_s,
        )
        result = long_video.run(plan)
    _name_random(result, random_model)
    session.report.update(result)
    if not as_json:
        for table in long_video_tables(result):
            session.terminal.table(table)
    _write(result, output)


@bench.command("faults", cls=Command)
def bench_faults(
    context: typer.Context,
    model: Model = "tiny",
    kills: Annotated[
        int | None, typer.Option(min=0, help="Workers to kill (default: each role at each stage of each placement).")
    ] = None,
    cancels: Annotated[int, typer.Option(min=0, help="Requests to cancel at random times.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the random times.")] = 0,
    as_json: JsonFlag = False,
    output: Output = None,
) -> None:
    """Kill workers and cancel requests at every stage, in every placement: errors, other requests, what is left over.
    On the CPU."""
    _check_target(output)
    from pipedit.bench import faults

    session = session_of(context)
    result = faults.run(faults.FaultBench(model=model, kills=kills, cancels=cancels, seed=seed), session.terminal.say)
    session.report.update(result)
    if not as_json:
        session.terminal.table(faults_table(result))
    _write(result, output)
    if result["problems"]:
        raise PipeditError("\n".join(result["problems"]))


def _mixes(text: str) -> dict[str, int]:
    """ "balanced=6,denoise-heavy=16"."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and steps.isdecimal() and int(steps) for name, _, steps in pairs):
        raise InvalidRequestError([f"--steps {text} should be names with numbers, such as balanced=6,long=20"])
    return {name: int(steps) for name, _, steps in pairs}


def _settings(
    num_frames: int | None, height: int | None, width: int | None, steps: int | None, text: int | None
) -> dict[str, Any]:
    values = {
        "num_frames": num_frames, "height": height, "width": width, "num_inference_steps": steps,
        "max_sequence_length": text,
    }  # fmt: skip
    return {name: value for name, value in values.items() if value is not None}


def _model(model: str, random_model: str | None, scratch: Path) -> str:
    """The model to open; a random one is built first."""
    if random_model is None:
        return model
    import torch

    from pipedit.models import random_pipelines
    from pipedit.models.published_configs import PUBLISHED

    kinds = (*random_pipelines.SIZES, *PUBLISHED)
    if random_model not in kinds:
        raise InvalidRequestError([f"--random-model {random_model} is not known; use {', '.join(kinds)}"])
    dtype = torch.bfloat16 if random_model in PUBLISHED else torch.float32
    random_pipelines.build(random_model, scratch / random_model, dtype=dtype)
    return str(scratch / random_model)


def _name_random(result: dict[str, Any], random_model: str | None) -> None:
    if random_model is not None:
        result["model"] = f"{random_model} (random weights)"


def _numbers(kind: Callable[[str], Number], flag: str, text: str) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequestError([f"{flag} {text} should be numbers separated by commas"]) from None


def _rate(text: str) -> float | None:
    """Bits per second."""
    return None if text.strip() == "unlimited" else float(text) * 1e6


def _check_target(output: Path | None) -> None:
    """Before the measurement: it may take an hour."""
    if output is not None and (problems := target_problems(output)):
        raise InvalidRequestError(problems)


def _write(result: dict[str, Any], output: Path | None) -> None:
    """After everything is shown, so that a full disk loses no figure."""
    if output is not None:
        with _writing(output):
            write_text_whole(output, json.dumps(result, indent=1) + "\n")


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PipeditError(f"{output} could not be written: {error.strerror or error}") from error


def _generate_table(result: dict[str, Any]) -> Table:
    table = Table("", "pipedit", "diffusers", "ratio (min to max)", "bound", title=result["model"], box=None)
    for name, label in (("warm", "loaded, one video"), ("cold", "fresh process, one file")):
        if name in result:
            figures, ratio = result[name], result[name]["ratio"]
            seconds = [format_seconds(figures["seconds"][side]["median"]) for side in ("pipedit", "diffusers")]
            spread = f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"
            table.add_row(label, *seconds, spread, f"{figures['bound']:.2f}" if "bound" in figures else "-")
    return table


def _memory_table(result: dict[str, Any]) -> Table:
    table = Table("frames", "pipedit", "diffusers", "latents", title=f"peak memory, {result['model']}", box=None)
    for row in result["rows"]:
        peaks = [format_bytes(row["peak_bytes"][side]) for side in ("pipedit", "diffusers")]
        table.add_row(str(row["num_frames"]), *peaks, format_bytes(row["latent_bytes"]))
    return table
