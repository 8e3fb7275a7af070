"""What the slower group of a pipeline allows (PipeDiT, section 3.2): `max(T_denoise / A, (T_decode + T_encode) / B)`
seconds a video, from stage times of workers that do everything.

Stage times of a worker that has the machine to itself make a bound that nothing can beat, nor always reach: cores that
are all busy slow each other down. So there is a second one, from workers that work beside each other.
"""

import contextlib
import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from pipedit.bench.sampling import Spread
from pipedit.bench.streams import Stream
from pipedit.core.errors import PipeditError
from pipedit.core.placement import Placement
from pipedit.core.spans import Span
from pipedit.engine.engine import Engine
from pipedit.executor.local_processes import WORKER_PROGRAM, LocalProcessExecutor, worker_environment
from pipedit.plan.durations import DECODE, ENCODE, STEP
from pipedit.worker.device import worker_devices
from pipedit.worker.settings import WorkerSettings

_THREADS = "OMP_NUM_THREADS"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Seconds that one worker is at each stage of one video; `step` is that of all steps."""

    encode: float
    step: float
    decode: float

    def bound_s(self, *, denoise_workers: int, decode_workers: int) -> float:
        """Seconds from one video to the next in a pipeline whose groups never wait. Decoders encode, too."""
        return max(self.step / denoise_workers, (self.decode + self.encode) / decode_workers)

    @classmethod
    def alone(cls, stream: Stream) -> "StageTimes":
        """Of a single worker's stream."""
        return cls._mean(_by_request(stream.spans).values())

    @classmethod
    def beside_each_other(cls, streams: Sequence[Stream]) -> "StageTimes":
        """Of the requests that all other workers were busy beside, from beginning to end: not the first and the last
        ones. Raises PipeditError if there were none."""
        from_s = max(min(span.start_s for span in one.spans) for one in streams)
        until_s = min(max(span.end_s for span in one.spans) for one in streams)
        requests = [
            spans
            for one in streams
            for spans in _by_request(one.spans).values()
            if from_s <= min(span.start_s for span in spans) and max(span.end_s for span in spans) <= until_s
        ]
        if not requests:
            raise PipeditError("the streams beside each other hardly met; give more prompts")
        return cls._mean(requests)

    @classmethod
    def _mean(cls, requests: Iterable[Sequence[Span]]) -> "StageTimes":
        seconds = [
            {what: sum(span.duration_s for span in spans if span.what == what) for what in (ENCODE, STEP, DECODE)}
            for spans in requests
        ]
        means = {what: statistics.fmean(one[what] for one in seconds) for what in (ENCODE, STEP, DECODE)}
        return cls(encode=means[ENCODE], step=means[STEP], decode=means[DECODE])


def spreads(rounds: Sequence[StageTimes]) -> dict[str, dict[str, float]]:
    """Of each stage, over the rounds, for JSON."""
    return {
        field.name: dataclasses.asdict(Spread.of([getattr(times, field.name) for times in rounds]))
        for field in dataclasses.fields(StageTimes)
    }


@contextlib.contextmanager
def workers_beside_each_other(model: str, count: int, *, device: str, dtype: str) -> Iterator[list[Engine]]:
    """So many engines of one worker, each with the device or the share of the cores that it has among so many."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(_one_worker(model, count, device=own, dtype=dtype))
            for own in worker_devices(device, count)
        ]


def _one_worker(model: str, count: int, *, device: str, dtype: str) -> Engine:
    """In a process of its own: beside others in this one it would wait for Python, which no worker of a group does."""
    plain = Engine(model, num_workers=1, device=device, dtype=dtype)
    plain.fetch()
    executor = LocalProcessExecutor(
        model=plain.adapter.checkpoint.name,
        settings=WorkerSettings(device=plain.device, precision=plain.precision),
        placement=Placement.colocated(1),
        # Else it would take all cores for its own.
        program=("env", f"{_THREADS}={worker_environment(count)[_THREADS]}", *WORKER_PROGRAM),
    )
    return Engine.of(plain.settings, executor)


def _by_request(spans: Iterable[Span]) -> dict[str, list[Span]]:
    found: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        found[span.request_id].append(span)
    return found
