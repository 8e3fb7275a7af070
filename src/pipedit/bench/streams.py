"""A stream of prompts through an engine, measured: when each video was done, and what every rank did meanwhile.

Knows nothing of how streams are compared.
"""

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.core.spans import Span
from pipedit.engine.engine import Engine
from pipedit.engine.updates import Failed, Finished, Frames
from pipedit.plan.durations import FETCH, HELP

Video = np.ndarray[Any, np.dtype[np.uint8]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """One stream of prompts: when each video was done, in seconds from the first request, and what the ranks did."""

    done_s: tuple[float, ...]
    spans: tuple[Span, ...]
    videos: tuple[Video, ...] = ()

    @property
    def makespan_s(self) -> float:
        return self.done_s[-1]

    @property
    def interval_s(self) -> float:
        """From one video to the next once the pipeline is full. Needs two videos."""
        return (self.done_s[-1] - self.done_s[0]) / (len(self.done_s) - 1)

    def busy_share(self, placement: Placement) -> dict[str, float]:
        """Share of a group's steady state, from when it is done with its first video until it is with its last one, in
        which its ranks do work of their own; waiting for inputs and helping are not. Needs two videos."""
        groups = {"denoise": placement.denoisers, "decode": placement.decoders}
        return {
            name: _busy_share([s for s in self.spans if s.rank in ranks and s.what not in (FETCH, HELP)], len(ranks))
            for name, ranks in groups.items()
        }


def _busy_share(spans: Sequence[Span], ranks: int) -> float:
    ends_s: dict[str, float] = {}
    for span in spans:
        ends_s[span.request_id] = max(span.end_s, ends_s.get(span.request_id, span.end_s))
    from_s, until_s = min(ends_s.values()), max(ends_s.values())
    busy_s = sum(max(min(span.end_s, until_s) - max(span.start_s, from_s), 0.0) for span in spans)
    return busy_s / (ranks * (until_s - from_s))


def stream(engine: Engine, requests: Sequence[VideoRequest]) -> Stream:
    """Hands in all requests at once and waits for all videos. Raises what a request fails with."""
    prepared = engine.prepare(requests)
    engine.start()
    first_span, start_s = len(engine.timeline().spans), time.perf_counter()
    ids = [engine.submit(request) for request in prepared]
    frames: dict[str, list[Video]] = {request_id: [] for request_id in ids}
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


def streams_beside_each_other(
    engines: Sequence[Engine], requests: Sequence[VideoRequest], *, stagger_s: float = 0.0
) -> list[Stream]:
    """The same stream through each of these engines at the same time, each driven by a thread and begun `stagger_s`
    after the one before it."""

    def begin(number: int) -> Stream:
        time.sleep(number * stagger_s)
        return stream(engines[number], requests)

    for engine in engines:
        engine.start()
    with ThreadPoolExecutor(len(engines)) as threads:
        return list(threads.map(begin, range(len(engines))))
