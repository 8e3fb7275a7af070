"""`pipedit bench disaggregation`: a stream of prompts on the same workers, arranged in every way, round by round.

Each arrangement is an engine of its own that stays open; the others wait while one works. Beside the measured figures
stand two bounds that the slower group sets (see pipeline_bound), what the simulator predicts (see stream_prediction),
and the largest difference from the videos of one worker.
"""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipedit.bench.environment import environment, load
from pipedit.bench.network import network
from pipedit.bench.pipeline_bound import StageTimes, spreads, workers_beside_each_other
from pipedit.bench.sampling import Spread
from pipedit.bench.stream_prediction import predict, rounds_used
from pipedit.bench.streams import Stream, stream, streams_beside_each_other
from pipedit.core.errors import PipeditError
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.engine.engine import Engine
from pipedit.engine.placing import placement_of, policy_of
from pipedit.plan.durations import HELP
from pipedit.plan.jobs import Work

REFERENCE, COLOCATED = "one worker", "colocated, spread decode"
APART = ("disaggregated", "disaggregated, aco auto", "disaggregated, aco on")
_PROMPTS = ("a red circle moves right", "a blue square grows", "a green triangle moves up", "a yellow circle shrinks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisaggregationBench:
    """`steps`: denoising steps of each mix, by its name. `settings`: the other fields of every request. At least two
    prompts (else there is no steady state) and two rounds (see stream_prediction)."""

    model: str
    settings: dict[str, Any]
    steps: Mapping[str, int]
    denoise_workers: int = 1
    decode_workers: int = 1
    prompts: int = 10
    rounds: int = 4
    device: str = "cpu"
    dtype: str = "float32"
    only: tuple[str, ...] = ()  # these arrangements, beside one worker; none: all

    def __post_init__(self) -> None:
        assert self.prompts >= 2 and self.rounds >= 2, self

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

    def requests(self, steps: int) -> list[VideoRequest]:
        return [
            VideoRequest(
                prompt=_PROMPTS[number % len(_PROMPTS)], seed=number, num_inference_steps=steps, **self.settings
            )
            for number in range(self.prompts)
        ]

    def bound_s(self, times: StageTimes) -> float:
        return times.bound_s(denoise_workers=self.denoise_workers, decode_workers=self.decode_workers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Measured:
    """What the rounds of a mix brought. `streams` by arrangement, round by round; `alone` and `loaded` are stage times
    of each round."""

    streams: dict[str, list[Stream]]
    alone: list[StageTimes]
    loaded: list[StageTimes]


def run(bench: DisaggregationBench) -> dict[str, Any]:
    """JSON-ready figures. Takes prompts x (1 + rounds) x mixes x (7 arrangements + as many videos as workers)."""
    before = load()
    return {
        "benchmark": "disaggregation",
        "model": bench.model,
        "settings": bench.settings,
        "workers": {"denoise": bench.denoise_workers, "decode": bench.decode_workers},
        "prompts": bench.prompts,
        "rounds": bench.rounds,
        "prediction": rounds_used(bench.rounds),
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
    requests = bench.requests(steps)
    with contextlib.ExitStack() as stack:
        engines = {
            name: stack.enter_context(Engine(bench.model, device=bench.device, dtype=bench.dtype, **settings))
            for name, settings in bench.variants().items()
        }
        crowd = stack.enter_context(
            workers_beside_each_other(bench.model, bench.num_workers, device=bench.device, dtype=bench.dtype)
        )
        measured = _measure(engines, crowd, requests, rounds=bench.rounds)
        works = {name: _work(engine, requests[0]) for name, engine in engines.items()}
        peaks = {name: engine.peak_bytes for name, engine in engines.items()}
    streams = measured.streams
    return {
        "num_inference_steps": steps,
        "one_worker_stage_s": spreads(measured.alone),
        "bound_interval_s": statistics.median(map(bench.bound_s, measured.alone)),
        "loaded_stage_s": spreads(measured.loaded),
        "loaded_bound_interval_s": statistics.median(map(bench.bound_s, measured.loaded)),
        "variants": {
            name: {
                **_figures(bench, measured, name, placement_of(engine.settings)),
                "speedup_over_colocated": _ratios(streams[COLOCATED], streams[name]),
                "predicted": dataclasses.asdict(
                    predict(placement_of(engine.settings), policy_of(engine.settings), works[name], streams[name])
                ),
                "largest_difference": _difference(streams[name][0], streams[REFERENCE][0]),
                "peak_bytes": {str(rank): held for rank, held in sorted(peaks[name].items())},
            }
            for name, engine in engines.items()
        },
    }


def _measure(
    engines: Mapping[str, Engine], crowd: Sequence[Engine], requests: Sequence[VideoRequest], *, rounds: int
) -> _Measured:
    """The first stream of each warms up and settles what is tried out (head chunks, help). The crowd's workers are so
    far apart that one decodes while another denoises, as groups of a pipeline do."""
    for engine in engines.values():
        stream(engine, requests)
    stagger_s = streams_beside_each_other(crowd, requests)[0].interval_s / len(crowd)
    measured = _Measured(streams={name: [] for name in engines}, alone=[], loaded=[])
    for _ in range(rounds):
        for name, engine in engines.items():
            measured.streams[name].append(stream(engine, requests))
        together = streams_beside_each_other(crowd, requests, stagger_s=stagger_s)
        measured.alone.append(StageTimes.alone(measured.streams[REFERENCE][-1]))
        measured.loaded.append(StageTimes.beside_each_other(together))
    return measured


def _work(engine: Engine, request: VideoRequest) -> Work:
    (prepared,) = engine.prepare([request])
    return engine.work(prepared)


def _figures(bench: DisaggregationBench, measured: _Measured, name: str, placement: Placement) -> dict[str, Any]:
    """Shares of a bound are those of the same round: a machine that drifts drifts for both."""
    streams = measured.streams[name]
    intervals_s = [one.interval_s for one in streams]
    busy = [one.busy_share(placement) for one in streams]
    return {
        "makespan_s": _spread([one.makespan_s for one in streams]),
        "first_video_s": _spread([one.done_s[0] for one in streams]),
        "interval_s": _spread(intervals_s),
        "share_of_bound": _shares(map(bench.bound_s, measured.alone), intervals_s),
        "share_of_loaded_bound": _shares(map(bench.bound_s, measured.loaded), intervals_s),
        "busiest_group_busy_share": _spread([max(one.values()) for one in busy]),
        "busy_share": {group: _spread([one[group] for one in busy]) for group in busy[0]},
        "helped_steps": sum(span.what == HELP for span in streams[0].spans),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return dataclasses.asdict(Spread.of(values))


def _shares(bounds_s: Iterable[float], intervals_s: Sequence[float]) -> dict[str, float]:
    return _spread([bound_s / interval_s for bound_s, interval_s in zip(bounds_s, intervals_s, strict=True)])


def _ratios(theirs: Sequence[Stream], ours: Sequence[Stream]) -> dict[str, float]:
    """How many times as fast, by makespan, pair by pair of the same round."""
    return _spread([their.makespan_s / our.makespan_s for their, our in zip(theirs, ours, strict=True)])


def _difference(ours: Stream, reference: Stream) -> int:
    """In grey levels of 255."""
    return max(
        int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max())
        for a, b in zip(ours.videos, reference.videos, strict=True)
    )
