"""`pipedit bench generate`: end to end against the plain diffusers pipeline on the same weights, interleaved."""

import contextlib
import dataclasses
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipedit.bench.environment import environment
from pipedit.bench.processes import PEERS, Peer, time_command
from pipedit.bench.sampling import Spread, interleave, ratio
from pipedit.core.request import VideoRequest
from pipedit.engine.engine import Engine

# Both sides do the same arithmetic with the same kernels, so that equal time is the bound for a warm run.
WARM_BOUND = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateBench:
    """What to measure. `settings` are request fields; `cold_rounds` 0 leaves out the measurement of a fresh process."""

    model: str
    settings: dict[str, Any]
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 5
    cold_rounds: int = 5
    compile_layers: bool = False
    timeout_s: float = 1800.0


def run(bench: GenerateBench) -> dict[str, Any]:
    """JSON-ready figures: seconds of both sides, ratios ours / theirs, the bound, and where it was measured."""
    folder, settings = complete_settings(bench)
    result: dict[str, Any] = {
        "benchmark": "generate",
        "model": bench.model,
        "settings": settings,
        "device": bench.device,
        "dtype": bench.dtype,
        "compile_layers": bench.compile_layers,
        "warm": _warm(bench, folder, settings),
    }
    if bench.cold_rounds:
        result["cold"] = _cold(bench, folder, settings)
    return {**result, "environment": environment()}


def complete_settings(bench: GenerateBench, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """The model's folder, and the request with every default filled in, as plain values."""
    asked = {"prompt": "a red ball moves right", "seed": 0, **bench.settings, **changes}
    with Engine(bench.model, device=bench.device, dtype=bench.dtype) as engine:
        (request,) = engine.prepare([VideoRequest(**asked)])
        return engine.adapter.checkpoint.folder, {"prompt": request.prompt, **request.settings()}


def _peer_settings(bench: GenerateBench, settings: dict[str, Any]) -> dict[str, Any]:
    # flow_shift is the noise scheduler's in diffusers; both sides take the checkpoint's own here
    chosen = {k: v for k, v in settings.items() if k != "flow_shift"}
    precision = dataclasses.asdict(Engine(bench.model, device=bench.device, dtype=bench.dtype).precision)
    run = {"device": bench.device, "dtype": bench.dtype, "precision": precision, "compile": bench.compile_layers}
    return {**chosen, **run}


def _warm(bench: GenerateBench, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(_peer_settings(bench, settings))
    stages: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Peer("pipedit_engine.py", [str(folder), text], timeout_s=bench.timeout_s))
        theirs = stack.enter_context(
            Peer("diffusers_pipeline.py", ["serve", str(folder), text], timeout_s=bench.timeout_s)
        )

        def run_ours() -> float:
            answer = ours.run()
            stages.append(answer["stages"])
            return float(answer["seconds"])

        seconds = interleave(
            {"pipedit": run_ours, "diffusers": lambda: float(theirs.run()["seconds"])}, rounds=bench.rounds
        )
    return {
        **_figures(seconds),
        "bound": WARM_BOUND,
        "stages_s": {name: dataclasses.asdict(Spread.of([s[name] for s in stages[1:]])) for name in stages[0]},
    }


def _cold(bench: GenerateBench, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A fresh process each: imports, loading, one video, the file on disk."""
    with tempfile.TemporaryDirectory() as scratch:
        commands = fresh_processes(bench, folder, settings, Path(scratch))
        seconds = interleave(
            {name: functools.partial(time_command, c, timeout_s=bench.timeout_s) for name, c in commands.items()},
            rounds=bench.cold_rounds,
        )
    return _figures(seconds)


def fresh_processes(
    bench: GenerateBench, folder: Path, settings: dict[str, Any], scratch: Path
) -> dict[str, list[str]]:
    """Command lines that make the same video in a process of their own: `pipedit generate`, and a minimal script."""
    flags = []
    for name, value in settings.items():
        if name != "prompt":
            flags += [f"--{name.replace('_', '-')}", str(value)]
    where = ["--device", bench.device, "--dtype", bench.dtype, "--overwrite", "-o", str(scratch / "ours.mp4")]
    text = json.dumps(_peer_settings(bench, settings))
    peer = [sys.executable, str(PEERS / "diffusers_pipeline.py"), "once", str(folder), text, str(scratch / "peer.mp4")]
    ours = [sys.executable, "-m", "pipedit", "generate", settings["prompt"], "--model", str(folder), *flags, *where]
    return {"pipedit": ours, "diffusers": peer}


def _figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "rounds": len(seconds["pipedit"]),
        "seconds": {name: dataclasses.asdict(Spread.of(values)) for name, values in seconds.items()},
        "ratio": dataclasses.asdict(ratio(seconds["pipedit"], seconds["diffusers"])),
    }
