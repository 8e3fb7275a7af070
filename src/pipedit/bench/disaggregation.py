"""`pipedit bench disaggregation`: a stream of prompts on the same workers, arranged in every way, round by round.

Each arrangement is an engine of its own that stays open; the others wait while one works. Beside the measured figures
stand the bound that the slower group sets (PipeDiT, section 3.2), what the simulator predicts from one calibration
run, and the largest difference from the videos of one worker.
"""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipedit.bench.environment import environment, load
from pipedit.bench.network import network
from pipedit.bench.sampling import Spread
from pipedit.core.errors import PipeditError
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.core.spans import Span
from pipedit.engine.engine import Engine
from pipedit.engine.placing import placement_of, policy_of
from pipedit.engine.updates import Failed, Finished, Frames
from pipedit.plan.durations import FETCH, HELP
from pipedit.plan.jobs import Work
from pipedit.plan.measured_durations import MeasuredDurations, gap_s
from pipedit.plan.pools import Pool, Service
from pipedit.plan.simulator import Arrival, simulate

REFERENCE, COLOCATED = "one worker", "colocated, spread decode"
APART = ("disaggregated", "disaggregated, aco auto", "disaggregated, aco on")
_LATER_S = 1e6  # when any stream is over
_PROMPTS = ("a red circle moves right", "a blue square grows", "a green triangle moves up", "a yellow circle shrinks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisaggregationBench:
    """`steps`: denoising steps of each mix, by its name. `settings`: the other fields of every request."""

    model: str
    settings: dict[str, Any]
    steps: Mapping[str, int]
    denoise_workers: int = 1
    decode_workers: int = 1
    prompts: int = 10
    rounds: int = 3
    device: str = "cpu"
    dtype: str = "float32"
    only: tuple[str, ...] = ()  # these arrangements, beside one worker; none: all

    @property
    def num_workers(self) -> int:
        return self.denoise_workers + self.decode_workers

    def variants(self) -> dict[str, dict[str, Any]]:
        """Engine settings of each arrangement."""
        split = {"denoise_workers": self.denoise_workers, "decode_workers": self.decode_workers, "encode_on": "decode"}
        colocated = {"num_workers": self.num_workers, "strategy": "colocated"}
        found: dict[str, dict[str, Any]] = {
            REFERENCE: {"num_workers": 1},
            COLOCATED: colocated,
            "colocated, serial decode": {**colocated, "decode": "serial"},
            "colocated, offloaded": {**colocated, "offload": True},
            "disaggregated": {**split, "aco": "off"},
            "disaggregated, aco auto": {**split, "aco": "auto"},
            "disaggregated, aco on": {**split, "aco": "on"},
        }
        return {name: found[name] for name in found if not self.only or name in (REFERENCE, COLOCATED, *self.only)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """One stream of prompts: when each video was done, in seconds from the first request, and what the ranks did."""

    done_s: tuple[float, ...]
    spans: tuple[Span, ...]
    videos: tuple["np.ndarray[Any, np.dtype[np.uint8]]", ...]

    @property
    def makespan_s(self) -> float:
        return self.done_s[-1]

    @property
    def interval_s(self) -> float:
        """From one video to the next once the pipeline is full."""
        return (self.done_s[-1] - self.done_s[0]) / (len(self.done_s) - 1)


def run(bench: DisaggregationBench) -> dict[str, Any]:
    """JSON-ready figures. Takes prompts x rounds x mixes x 7 videos."""
    before = load()
    return {
        "benchmark": "disaggregation",
        "model": bench.model,
        "settings": bench.settings,
        "workers": {"denoise": bench.denoise_workers, "decode": bench.decode_workers},
        "prompts": bench.prompts,
        "rounds": bench.rounds,
        "load_before": before,
        "mixes": {name: _mix(bench, steps) for name, steps in bench.steps.items()},
        "environment": environment(),
    }


def run_limited(bench: DisaggregationBench, rates: Sequence[float], *, timeout_s: float) -> list[dict[str, Any]]:
    """The same with less bandwidth between the workers, bits per second of all of them together. Needs root and
    iproute2, see network.requirement_problem."""
    results = []
    for rate in rates:
        with network(1) as place:
            place.limit_inside(0, rate)
            text = json.dumps(dataclasses.asdict(bench))
            command = [*place.enter(0), sys.executable, "-m", "pipedit.bench.peers.limited_streams", text]
            done = subprocess.run(command, stdout=subprocess.PIPE, timeout=timeout_s, check=False)
            if done.returncode:
                raise PipeditError(f"the workers on a limited link ended with exit code {done.returncode}")
            results.append({"bits_per_s": rate, **json.loads(done.stdout)})
    return results


def _mix(bench: DisaggregationBench, steps: int) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        engines = {
            name: stack.enter_context(Engine(bench.model, device=bench.device, dtype=bench.dtype, **settings))
            for name, settings in bench.variants().items()
        }
        requests = [
            VideoRequest(
                prompt=_PROMPTS[number % len(_PROMPTS)], seed=number, num_inference_steps=steps, **bench.settings
            )
            for number in range(bench.prompts)
        ]
        # The first stream warms up, settles what is tried out (head chunks, help), and calibrates the simulator.
        calibration = {name: stream(engine, requests) for name, engine in engines.items()}
        streams: dict[str, list[Stream]] = {name: [] for name in engines}
        for _ in range(bench.rounds):
            for name, engine in engines.items():
                streams[name].append(stream(engine, requests))
        works = {name: _work(engine, requests[0]) for name, engine in engines.items()}
        placements = {name: placement_of(engine.settings) for name, engine in engines.items()}
        peaks = {name: engine.peak_bytes for name, engine in engines.items()}
    alone = streams[REFERENCE]
    stages = {
        what: statistics.median(_stage_s(one.spans, what) for one in alone) for what in ("encode", "step", "decode")
    }
    bound_s = max(stages["step"] / bench.denoise_workers, (stages["decode"] + stages["encode"]) / bench.decode_workers)
    return {
        "num_inference_steps": steps,
        "one_worker_stage_s": stages,
        "bound_interval_s": bound_s,
        "variants": {
            name: {
                **_figures(streams[name], bound_s, placements[name]),
                "speedup_over_colocated": _ratios(streams[COLOCATED], streams[name]),
                "predicted": _predicted(engines[name], calibration[name], works[name], streams[name]),
                "largest_difference": _difference(streams[name][0], streams[REFERENCE][0]),
                "peak_bytes": {str(rank): held for rank, held in sorted(peaks[name].items())},
            }
            for name in engines
        },
    }


def stream(engine: Engine, requests: Sequence[VideoRequest]) -> Stream:
    """Hands in all requests at once and waits for all videos. Raises what a request fails with."""
    prepared = engine.prepare(requests)
    engine.start()
    first_span, start_s = len(engine.timeline().spans), time.perf_counter()
    ids = [engine.submit(request) for request in prepared]
    frames: dict[str, list[np.ndarray[Any, np.dtype[np.uint8]]]] = {request_id: [] for request_id in ids}
    done_s = []
    for update in engine.updates():
        match update:
            case Frames():
                frames[update.request_id].append(update.frames)
            case Finished():
                done_s.append(time.perf_counter() - start_s)
            case Failed():
                raise update.error
    return Stream(
        done_s=tuple(done_s),
        spans=engine.timeline().spans[first_span:],
        videos=tuple(np.concatenate(frames[request_id]) for request_id in ids),
    )


def _work(engine: Engine, request: VideoRequest) -> Work:
    (prepared,) = engine.prepare([request])
    return engine.work(prepared)


def _stage_s(spans: Sequence[Span], what: str) -> float:
    """Seconds of a stage for one request, where one worker does everything."""
    requests = {span.request_id for span in spans}
    return sum(span.duration_s for span in spans if span.what == what) / len(requests)


def _figures(streams: Sequence[Stream], bound_s: float, placement: Placement) -> dict[str, Any]:
    busy = [_busy_share(one, placement) for one in streams]
    return {
        "makespan_s": dataclasses.asdict(Spread.of([one.makespan_s for one in streams])),
        "first_video_s": dataclasses.asdict(Spread.of([one.done_s[0] for one in streams])),
        "interval_s": dataclasses.asdict(Spread.of([one.interval_s for one in streams])),
        "share_of_bound": dataclasses.asdict(Spread.of([bound_s / one.interval_s for one in streams])),
        "share_of_loaded_bound": dataclasses.asdict(Spread.of([max(one.values()) for one in busy])),
        "busy_share": {group: dataclasses.asdict(Spread.of([one[group] for one in busy])) for group in busy[0]},
        "helped_steps": sum(span.what == "help" for span in streams[0].spans),
    }


def _busy_share(one: Stream, placement: Placement) -> dict[str, float]:
    """Share of the steady state, between the first and the last finished video, in which a group's ranks do work of
    their own; waiting for inputs and helping are not. The larger one is the share of the bound for stages that take as
    long as they did in this very stream, where groups that work at the same time slow each other down."""
    ends = [span.end_s for span in one.spans]
    until_s = max(ends)
    from_s = until_s - (one.done_s[-1] - one.done_s[0])
    groups = {"denoise": placement.denoisers, "decode": placement.decoders}
    return {
        name: sum(
            max(min(span.end_s, until_s) - max(span.start_s, from_s), 0.0)
            for span in one.spans
            if span.rank in ranks and span.what not in (FETCH, HELP)
        )
        / (len(ranks) * (until_s - from_s))
        for name, ranks in groups.items()
    }


def _ratios(theirs: Sequence[Stream], ours: Sequence[Stream]) -> dict[str, float]:
    """How many times as fast, by makespan, pair by pair of the same round."""
    pairs = zip(theirs, ours, strict=True)
    return dataclasses.asdict(Spread.of([their.makespan_s / our.makespan_s for their, our in pairs]))


def _predicted(engine: Engine, calibration: Stream, work: Work, streams: Sequence[Stream]) -> dict[str, float]:
    durations = MeasuredDurations.of(calibration.spans)
    pool = Pool(
        placement=placement_of(engine.settings),
        services={"it": Service(work=work, durations=durations)},
        policy=policy_of(engine.settings),
    )
    # As in the measured engine, what is tried out (help) is settled by a stream before.
    count = len(calibration.done_s)
    arrivals = [Arrival(at_s=at_s, kind="it") for at_s in (0.0, _LATER_S) for _ in range(count)]
    outcome = simulate([pool], arrivals, round_trip_s=gap_s(calibration.spans))
    makespan_s = max(life.done_s for life in outcome.lives) - _LATER_S
    measured_s = statistics.median(one.makespan_s for one in streams)
    return {"makespan_s": makespan_s, "error": makespan_s / measured_s - 1}


def _difference(ours: Stream, reference: Stream) -> int:
    """In grey levels of 255."""
    return max(
        int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max())
        for a, b in zip(ours.videos, reference.videos, strict=True)
    )
