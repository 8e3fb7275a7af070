"""`pipedit bench long-video`: one long video by whole-sequence strategies and block by block, on the same workers.

Every measurement is an engine in a process of its own, so that peaks of memory are its own. Measured is what a person
waits for: from the request to the first frames, and to the closed file, with decoding and writing in it; loading is
shown apart.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipedit.bench.environment import environment, load
from pipedit.bench.processes import answer_of
from pipedit.bench.sampling import Spread
from pipedit.core.blocks import BlockPlan
from pipedit.core.request import VideoRequest
from pipedit.core.spans import Span
from pipedit.engine.engine import Engine
from pipedit.engine.updates import Failed, Finished, Frames
from pipedit.media import open_writer

ONE, ULYSSES, PUBLISHED, OURS = "one worker, whole", "ulysses, whole", "dualparal, published", "dualparal"
_STEP, _DECODE = "step", "decode"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongVideoBench:
    """`settings`: of the request, without num_frames. `frames`: lengths to measure; whole-sequence variants run at
    those up to `whole_frames` only. `blocks`: block_size, context and the like of dualparal."""

    model: str
    settings: dict[str, Any]
    frames: tuple[int, ...]
    workers: tuple[int, ...] = (1, 2)
    blocks: dict[str, Any] = dataclasses.field(default_factory=dict)
    whole_frames: int | None = None
    rounds: int = 3
    device: str = "cpu"
    dtype: str = "float32"
    timeout_s: float = 1800.0

    def variants(self) -> dict[str, dict[str, Any]]:
        """Engine settings by name."""
        published = {**self.blocks, "prefix": "rerun", "dualparal_compat": True, "context_storage": "device"}
        found: dict[str, dict[str, Any]] = {ONE: {"num_workers": 1, "strategy": "colocated"}}
        for count in self.workers:
            if count > 1:
                found[f"{ULYSSES}, {count} workers"] = {"num_workers": count, "strategy": "colocated"}
            for name, blocks in ((PUBLISHED, published), (OURS, self.blocks)):
                label = f"{name}, {count} worker{'s' if count > 1 else ''}"
                found[label] = {"num_workers": count, "strategy": "dualparal", **blocks}
        return found

    def runs(self, frames: int) -> dict[str, dict[str, Any]]:
        """The variants that are measured at this length."""
        skips_whole = self.whole_frames is not None and frames > self.whole_frames
        return {
            name: settings
            for name, settings in self.variants().items()
            if settings["strategy"] == "dualparal" or not skips_whole
        }


def run(bench: LongVideoBench) -> dict[str, Any]:
    """JSON-ready figures. Takes rounds x lengths x variants videos."""
    before = load()
    lengths = {}
    for frames in bench.frames:
        measured: dict[str, list[dict[str, Any]]] = {}
        for _ in range(bench.rounds):
            for name, settings in bench.runs(frames).items():
                measured.setdefault(name, []).append(_measure(bench, settings, frames))
        lengths[str(frames)] = {name: _figures(found) for name, found in measured.items()}
    return {
        "benchmark": "long-video",
        "model": bench.model,
        "settings": bench.settings,
        "blocks": bench.blocks,
        "rounds": bench.rounds,
        "load_before": before,
        "lengths": lengths,
        "environment": environment(),
    }


def _measure(bench: LongVideoBench, settings: Mapping[str, Any], frames: int) -> dict[str, Any]:
    """In a process of its own."""
    request = {"prompt": "a red ball moves right", "seed": 0, **bench.settings, "num_frames": frames}
    engine = {"model": bench.model, "device": bench.device, "dtype": bench.dtype, **settings}
    command = [
        sys.executable,
        "-m",
        "pipedit.bench.peers.long_video",
        json.dumps({"engine": engine, "request": request}),
    ]
    return answer_of(command, timeout_s=bench.timeout_s)


def measure(engine: Engine, request: VideoRequest) -> dict[str, Any]:
    """One video into a file that is thrown away."""
    (prepared,) = engine.prepare([request])
    load_s = -time.perf_counter()
    engine.start()
    load_s += time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seconds = _into_file(engine, prepared, Path(folder) / "video.mp4")
    spans = engine.timeline().spans
    return {
        "load_s": load_s,
        **seconds,
        "peak_bytes": {str(rank): held for rank, held in sorted(engine.peak_bytes.items())},
        "busy_share": busy_shares(spans, engine.work(prepared).blocks),
    }


def _into_file(engine: Engine, request: VideoRequest, path: Path) -> dict[str, Any]:
    assert request.width and request.height and request.fps
    writer = open_writer(path, width=request.width, height=request.height, fps=request.fps)
    start_s, first_s, count = time.perf_counter(), None, 0
    engine.submit(request)
    for update in engine.updates():
        match update:
            case Frames():
                writer.write(update.frames)
                count += len(update.frames)
                first_s = first_s if first_s is not None else time.perf_counter() - start_s
            case Finished():
                writer.close()
            case Failed():
                raise update.error
    return {"seconds": time.perf_counter() - start_s, "first_frames_s": first_s, "num_frames": count}


def busy_shares(spans: Sequence[Span], plan: BlockPlan | None) -> dict[str, float]:
    """By rank, the share of the steady state in which a stage computed or decoded. The steady state of a block video
    is from its first finished block to the last one's first step; of another, from the first to the last step."""
    steps = [span for span in spans if span.what == _STEP]
    window = _steady(steps, plan)
    if window is None:
        return {}
    from_s, to_s = window
    return {
        str(rank): sum(
            max(min(span.end_s, to_s) - max(span.start_s, from_s), 0.0)
            for span in spans
            if span.rank == rank and span.what in (_STEP, _DECODE)
        )
        / (to_s - from_s)
        for rank in sorted({span.rank for span in steps})
    }


def _steady(steps: Sequence[Span], plan: BlockPlan | None) -> tuple[float, float] | None:
    """None if there is no such time: the video is too short."""
    if plan is None:
        return min(span.start_s for span in steps), max(span.end_s for span in steps)
    assert plan.num_blocks is not None
    from_s = max(span.end_s for span in steps if (span.block, span.index) == (0, plan.num_steps - 1))
    to_s = min(span.start_s for span in steps if (span.block, span.index) == (plan.num_blocks - 1, 0))
    return (from_s, to_s) if to_s > from_s else None


def _figures(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def spread(name: str) -> dict[str, float]:
        return dataclasses.asdict(Spread.of([one[name] for one in found]))

    shares = [list(one["busy_share"].values()) for one in found if one["busy_share"]]
    return {
        "seconds": spread("seconds"),
        "first_frames_s": spread("first_frames_s"),
        "load_s": spread("load_s"),
        "num_frames": found[0]["num_frames"],
        "peak_bytes": found[-1]["peak_bytes"],
        "largest_peak_bytes": max(found[-1]["peak_bytes"].values()),
        "busiest_share": dataclasses.asdict(Spread.of([max(each) for each in shares])) if shares else None,
        "least_busy_share": dataclasses.asdict(Spread.of([min(each) for each in shares])) if shares else None,
    }
