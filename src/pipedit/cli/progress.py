"""What people see while videos are made: bars on a terminal, short lines in a log, nothing with --quiet."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.progress_bar import ProgressBar
from rich.text import Text

from pipedit.cli.console import Terminal
from pipedit.cli.order import Job
from pipedit.core.units import format_seconds
from pipedit.engine.updates import Progress

_LINE_EVERY_S = 10.0
_FOLLOWING = {"encode": "denoise", "denoise": "decode"}


class Display:
    """The silent one, and the contract. Use as a context manager; nothing else may write to the terminal inside,
    except below `paused`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def busy(self, doing: str) -> contextlib.AbstractContextManager[object]:
        """Around anything short that is not worth a line in a log."""
        return contextlib.nullcontext()

    def loading(self, model: str) -> contextlib.AbstractContextManager[object]:
        """Around the loading of weights."""
        return contextlib.nullcontext()

    def paused(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the terminal is free."""
        return contextlib.nullcontext()

    def begin(self, job: Job, num_chunks: int) -> None:
        """Work on the video begins; it will be decoded in `num_chunks` chunks."""

    def progress(self, job: Job, update: Progress) -> None:
        """Some units of "encode", "denoise" or "decode" are finished."""

    def again(self, job: Job, error: Exception) -> None:
        """The video begins again, because its workers were lost."""

    def end(self, job: Job) -> None:
        """The video is done or has failed."""


def make_display(terminal: Terminal) -> Display:
    if terminal.quiet:
        return Display()
    return BarDisplay(terminal) if terminal.is_live else LineDisplay(terminal)


def describe_job(job: Job) -> Text:
    """A title line: "[2/3] a red ball moves right · 33 frames of 64x64 · 30 steps · seed 7"."""
    request = job.request
    number = f"[{job.number}/{job.of}] " if job.of > 1 else ""
    prompt = "".join(c if c.isprintable() else " " for c in " ".join(request.prompt.split()))
    prompt = prompt if len(prompt) <= 100 else prompt[:99].rstrip() + "…"
    facts = (
        f"{request.num_frames} frame{'' if request.num_frames == 1 else 's'} of {request.width}x{request.height}",
        f"{request.num_inference_steps} steps",
        f"seed {request.seed}",
    )
    return Text.assemble((number, "dim"), (prompt, "bold"), (" · " + " · ".join(facts), "dim"))


def _begins_again(job: Job, error: Exception) -> Text:
    number = f"[{job.number}/{job.of}] " if job.of > 1 else ""
    return Text(f"{number}begins again on fresh workers: {str(error).splitlines()[0]}")


def _totals(job: Job, num_chunks: int) -> dict[str, int]:
    return {"encode": 1, "denoise": job.request.num_inference_steps or 1, "decode": num_chunks}


class LineDisplay(Display):
    """For logs and pipes: a line when a stage is done, and one every 10 seconds within it. Times are those of the work
    itself: between two units, workers may be busy with other videos."""

    def __init__(self, terminal: Terminal, clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal, self._clock = terminal, clock
        self._last_line_s = 0.0

    @contextlib.contextmanager
    def loading(self, model: str) -> Iterator[None]:
        start_s = self._clock()
        self._terminal.say(f"loading {model}")
        yield
        self._terminal.say(f"loaded in {format_seconds(self._clock() - start_s)}")

    def begin(self, job: Job, num_chunks: int) -> None:
        self._last_line_s = self._clock()
        self._terminal.say(describe_job(job))

    def progress(self, job: Job, update: Progress) -> None:
        finished = f"{update.stage} {update.done}" + ("" if update.total is None else f"/{update.total}")
        if update.done == update.total:
            self._say(job, f"{finished}, took {format_seconds(update.spent_s)}")
        elif self._clock() - self._last_line_s >= _LINE_EVERY_S:
            self._say(job, f"{finished}, {_left(update)}")

    def again(self, job: Job, error: Exception) -> None:
        self._terminal.say(_begins_again(job, error))

    def _say(self, job: Job, text: str) -> None:
        self._last_line_s = self._clock()
        self._terminal.say(f"[{job.number}/{job.of}] {text}" if job.of > 1 else text)


def _left(update: Progress) -> str:
    if update.total is None:
        return f"{format_seconds(update.spent_s)} so far"
    return f"{format_seconds(update.spent_s / update.done * (update.total - update.done))} left"


class BarDisplay(Display):
    """Bars of the videos under way, one a stage. They vanish when a video is done; its title stays."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._tasks: dict[int, dict[str, TaskID]] = {}
        # stdout stays as it is: rich would send what is printed there to stderr.
        self._bars = Bars(
            TextColumn("  {task.description:<8}"),
            _StillBarColumn(bar_width=32),
            MofNCompleteColumn(),
            _TimeColumn(),
            console=terminal.err,
            transient=True,
            redirect_stdout=False,
            speed_estimate_period=24 * 3600.0,  # a step of a large model may take minutes
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def busy(self, doing: str) -> contextlib.AbstractContextManager[object]:
        return self._terminal.err.status(Text(doing))

    def loading(self, model: str) -> contextlib.AbstractContextManager[object]:
        return self.busy(f"loading {model}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._bars.stop()
        yield
        if self._tasks:
            self._bars.start()

    def begin(self, job: Job, num_chunks: int) -> None:
        self._terminal.err.print(describe_job(job), soft_wrap=True)
        self._bars.start()  # no effect if they are there already
        self._tasks[job.number] = {
            stage: self._bars.add_task(stage, total=total, start=stage == "encode")
            for stage, total in _totals(job, num_chunks).items()
        }

    def progress(self, job: Job, update: Progress) -> None:
        tasks = self._tasks[job.number]
        self._bars.start_task(tasks[update.stage])  # blocks are decoded while others are denoised
        self._bars.update(tasks[update.stage], completed=update.done, total=update.total)
        if update.done == update.total and update.stage in _FOLLOWING:
            self._bars.start_task(tasks[_FOLLOWING[update.stage]])

    def again(self, job: Job, error: Exception) -> None:
        self._terminal.err.print(_begins_again(job, error), soft_wrap=True)
        for task in self._tasks[job.number].values():
            self._bars.update(task, completed=0)

    def end(self, job: Job) -> None:
        for task in self._tasks.pop(job.number, {}).values():
            self._bars.remove_task(task)


class _StillBarColumn(BarColumn):
    """A stage that has not begun is an empty bar; rich would let it pulse."""

    def render(self, task: Task) -> ProgressBar:
        bar = super().render(task)
        bar.pulse = False
        return bar


class _TimeColumn(ProgressColumn):
    """Time taken and time left: "4.2 s · 12.0 s left"."""

    def render(self, task: Task) -> Text:
        if task.elapsed is None:
            return Text()
        taken = format_seconds(task.finished_time if task.finished_time is not None else task.elapsed)
        if task.finished or task.time_remaining is None:
            return Text(taken, style="dim")
        return Text.assemble((taken, "dim"), f" · {format_seconds(task.time_remaining)} left")
