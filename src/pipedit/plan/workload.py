"""Workload files: which videos are asked for, and when. CSV with a heading, or JSON lines; one stream a line.

Knows no models: what a line says of a video is checked by whoever opens its model.
"""

import dataclasses
import enum
import os
import random
from collections.abc import Iterator

from pipedit.core.request import VideoRequest
from pipedit.plan.table_file import Column, Row, parse_row, raise_problems, read_table

MOST_REQUESTS = 10_000_000


class Pattern(enum.StrEnum):
    """How the requests of a stream come: all at once, evenly, or at random with a mean rate."""

    BURST = "burst"
    CONSTANT = "constant"
    POISSON = "poisson"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """`count` requests that are alike. They come from `arrival_s` on, `rate` of them a second (None in a burst).
    `seed` decides when exactly, in a Poisson process. Several streams make a mix. `source`: the line it stands in."""

    model: str
    request: VideoRequest
    count: int = 1
    arrival_s: float = 0.0
    arrivals: Pattern = Pattern.BURST
    rate: float | None = None
    seed: int = 0
    priority: int = 0
    source: str = ""

    def times_s(self) -> Iterator[float]:
        """When its requests come, in order."""
        chance, now_s = random.Random(self.seed), self.arrival_s
        for number in range(self.count):
            if self.rate is None:
                yield self.arrival_s
            elif self.arrivals is Pattern.CONSTANT:
                yield self.arrival_s + number / self.rate
            else:
                now_s += chance.expovariate(self.rate)
                yield now_s


_OF_REQUEST = {
    "width": Column(kind=int, least=1),
    "height": Column(kind=int, least=1),
    "num_frames": Column(kind=int, least=1),
    "num_inference_steps": Column(kind=int, least=1),
    "guidance_scale": Column(kind=float, least=0),
    "true_cfg_scale": Column(kind=float, least=0),
}
COLUMNS = {
    "model": Column(kind=str, is_required=True),
    **_OF_REQUEST,
    "count": Column(kind=int, least=1),
    "arrival_s": Column(kind=float, least=0),
    "arrivals": Column(kind=str, choices=tuple(Pattern)),
    "rate": Column(kind=float, above=0),
    "seed": Column(kind=int, least=0),
    "priority": Column(kind=int),
}


def read_workload(path: str | os.PathLike[str]) -> list[Stream]:
    """All streams of a file; without a seed, each has its own. Raises InvalidRequestError with every problem, each with
    its line."""
    streams, problems = [], []
    for number, row in enumerate(read_table(path).rows):
        stream = _stream(row, number)
        if isinstance(stream, Stream):
            streams.append(stream)
        else:
            problems += [f"{row.source}: {problem}" for problem in stream]
    total = sum(stream.count for stream in streams)
    if total > MOST_REQUESTS:
        problems.append(f"{path} asks for {total} requests; {MOST_REQUESTS} are the most")
    raise_problems(problems)
    return streams


def _stream(row: Row, number: int) -> Stream | list[str]:
    """The stream, or what is wrong with the line."""
    values, problems = parse_row(row, COLUMNS)
    is_timed = "rate" in row.values
    pattern = Pattern(values.get("arrivals", Pattern.POISSON if is_timed else Pattern.BURST))
    if "arrivals" in values and pattern is Pattern.BURST and is_timed:
        problems.append("a burst has no rate; leave it out, or take constant or poisson arrivals")
    if pattern is not Pattern.BURST and not is_timed:
        problems.append(f"{pattern} arrivals need a rate, in requests per second")
    if problems:
        return problems
    request = VideoRequest(prompt="", **{name: values.pop(name) for name in _OF_REQUEST if name in values})
    return Stream(request=request, source=row.source, **{"seed": number, **values, "arrivals": pattern})
