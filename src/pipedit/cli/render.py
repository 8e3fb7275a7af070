"""Drives an engine over the jobs of one command: every video goes into its file while it is decoded.

A file is there when its video is whole. Whatever ends the run early, an error or Ctrl-C, leaves no part of one.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipedit.cli.order import Job
from pipedit.cli.progress import Display
from pipedit.core.errors import CancelledError, PipeditError
from pipedit.core.parallel import ParallelConfig
from pipedit.core.request import VideoRequest
from pipedit.core.spans import Span
from pipedit.engine.engine import Engine
from pipedit.engine.saved_run import SavedRun
from pipedit.engine.updates import Cancelled, Failed, Finished, Frames, Progress, Restarted, Update
from pipedit.media import FrameWriter, open_writer

# In the order of work; some may be missing.
STAGES = ("encode", "fetch", "onload", "denoise", "decode", "save", "write")
_STAGE_OF = {"step": "denoise"}  # kinds of spans that people know by another name
_CONTROLLER = -1  # the rank of the process that drives the workers: it writes the files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A video that is in its file. `parallel`: how the workers shared it; `seconds`: time per stage (see STAGES)."""

    job: Job
    request: VideoRequest
    parallel: ParallelConfig
    seconds: dict[str, float]
    num_frames: int
    size_bytes: int

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "file": self.job.output,
            "prompt": self.request.prompt,
            "seed": self.request.seed,
            "settings": self.request.settings(),
            "parallel": {"num_workers": self.parallel.world_size, **dataclasses.asdict(self.parallel)},
            "seconds": self.seconds,
            "total_s": self.total_s,
            "num_frames": self.num_frames,
            "size_bytes": self.size_bytes,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A video that could not be made, while others may be."""

    job: Job
    error: Exception


@dataclasses.dataclass(kw_only=True)
class _Open:
    """A video under way."""

    job: Job
    writer: FrameWriter
    write_s: float = 0.0
    num_writes: int = 0
    has_begun: bool = False


class Rendering:
    """`run` it once. `spans` then holds the time that writing took, for the trace."""

    def __init__(
        self,
        engine: Engine,
        jobs: Sequence[Job],
        display: Display,
        *,
        run: SavedRun | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`run`: of the only job."""
        assert run is None or len(jobs) == 1, jobs
        self._engine, self._jobs, self._display, self._saved, self._clock = engine, jobs, display, run, clock
        self._open: dict[str, _Open] = {}
        self.spans: list[Span] = []

    def run(self) -> Iterator[Result | Failure]:
        """Results and failures as they come. Raises PipeditError where a file cannot be written."""
        with contextlib.ExitStack() as half_written:
            for job in self._jobs:
                writer = self._writer(job)
                half_written.callback(writer.abort)  # no effect on a file that is whole
                request_id = self._engine.submit(job.request, run=self._saved)
                self._open[request_id] = _Open(job=job, writer=writer)
                for frames in () if self._saved is None else self._saved.frames():
                    with self._writing(request_id):
                        writer.write(frames)
            self._begin_next()
            for update in self._engine.updates():
                if (ending := self._take(update)) is not None:
                    yield ending
                    self._begin_next()

    @property
    def unfinished(self) -> list[Job]:
        """Videos that have neither a result nor a failure, oldest first."""
        return [video.job for video in self._open.values()]

    def _writer(self, job: Job) -> FrameWriter:
        """Touches no disk before the first frame."""
        request = job.request
        assert request.width and request.height and request.fps
        return open_writer(
            job.output,
            width=request.width,
            height=request.height,
            fps=request.fps,
            num_frames=self._engine.num_frames(request),
            metadata=self._engine.metadata(request),
            replace=job.replace,
            series=job.series,
        )

    def _take(self, update: Update) -> Result | Failure | None:
        video = self._open[update.request_id]
        match update:
            case Progress():
                self._begin(video)
                self._display.progress(video.job, update)
            case Restarted():
                self._display.again(video.job, update.error)
            case Frames():
                with self._writing(update.request_id):
                    video.writer.write(update.frames)
            case Finished():
                with self._writing(update.request_id):
                    video.writer.close()
                return self._end(update, _ending(video, update, self._engine.sharing(update.request)))
            case Failed():
                return self._end(update, Failure(job=video.job, error=update.error))
            case Cancelled():
                error = CancelledError(f"{video.job.output} was cancelled")
                return self._end(update, Failure(job=video.job, error=error))
        return None

    def _end(self, update: Update, ending: Result | Failure) -> Result | Failure:
        video = self._open.pop(update.request_id)
        video.writer.abort()
        self._display.end(video.job)
        return ending

    def _begin_next(self) -> None:
        """Shows the video that is worked on next before the engine has any news of it."""
        if self._open:
            self._begin(next(iter(self._open.values())))

    def _begin(self, video: _Open) -> None:
        if not video.has_begun:
            video.has_begun = True
            self._display.begin(video.job, self._engine.num_decode_chunks(video.job.request))

    @contextlib.contextmanager
    def _writing(self, request_id: str) -> Iterator[None]:
        """Times the block, and says which file it was about if the disk refuses."""
        video, start_s = self._open[request_id], self._clock()
        try:
            yield
        except OSError as error:
            raise PipeditError(f"{video.job.output} could not be written: {error.strerror or error}") from error
        end_s = self._clock()
        self.spans.append(
            Span(
                request_id=request_id,
                rank=_CONTROLLER,
                role="writer",
                what="write",
                start_s=start_s,
                end_s=end_s,
                index=video.num_writes,
            )
        )
        video.write_s += end_s - start_s
        video.num_writes += 1


def _ending(video: _Open, update: Finished, parallel: ParallelConfig) -> Result | Failure:
    """A file that appeared in the meantime is never replaced unasked: the video lies beside it. That is what numbers
    are for where the name was ours, but no success where somebody gave it."""
    wanted, written = video.job.output, video.writer.target
    if written == wanted:
        return _result(video, update, parallel)
    if video.job.series is None:
        said = f"{wanted} appeared while the video was made and is left as it was; the video is in {written}"
        return Failure(job=video.job, error=PipeditError(said))
    video.job = dataclasses.replace(video.job, output=written)
    return _result(video, update, parallel)


def _result(video: _Open, update: Finished, parallel: ParallelConfig) -> Result:
    seconds = {_STAGE_OF.get(what, what): spent_s for what, spent_s in update.seconds.items()}
    return Result(
        job=video.job,
        request=update.request,
        parallel=parallel,
        seconds={**seconds, "write": video.write_s},
        num_frames=video.writer.num_written,
        size_bytes=sum(path.stat().st_size for path in video.writer.paths),
    )
