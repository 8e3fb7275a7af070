"""From a plan to files and a report: opens the engine, makes the videos, tells how it went."""

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Sequence

import typer

from pipedit.cli import errors, garbage
from pipedit.cli.console import Session
from pipedit.cli.order import Plan
from pipedit.cli.progress import Display, make_display
from pipedit.cli.render import Failure, Rendering, Result
from pipedit.cli.summary import describe_workers, peak_memory, placement_as_json, summarize, try_next
from pipedit.core.errors import PipeditError
from pipedit.engine.engine import Engine
from pipedit.engine.saved_run import SavedRun
from pipedit.models.registry import EMBEDDED
from pipedit.plan.timeline import Timeline
from pipedit.plan.trace_file import write_trace


def fulfil(session: Session, plan: Plan, *, like: str | None, trace: str | None) -> None:
    """Makes every video of the plan. Raises typer.Exit where some of them, but not all the rest, failed."""
    start_s = time.perf_counter()
    report = session.report
    report.update(model=plan.settings.model, results=[])
    display = make_display(session.terminal)
    with contextlib.ExitStack() as endings:
        engine = endings.enter_context(session.open_engine(plan.settings))
        with display.busy("getting ready"):
            # They were checked; this finds out whether they fit.
            notes = engine.notes(engine.prepare([job.request for job in plan.jobs]))
        if engine.placing:
            session.terminal.say(engine.placing)
        for note in notes:
            session.terminal.note(note)
        if like is not None:
            _note_other_precision(session, plan, engine, like)
        engine.fetch()  # before there are bars: downloads show their own
        if plan.run is not None:
            endings.enter_context(engine.claim(plan.run))
            _tell_run(session, plan.run)
        with display:
            load_start_s = time.perf_counter()
            with display.loading(plan.settings.model):
                engine.start()
            load_s = time.perf_counter() - load_start_s  # as people wait for it: workers load at the same time
            garbage.begin()
            rendering = Rendering(engine, plan.jobs, display, run=plan.run)
            results, failures = _run(session, rendering, display)
        timeline = _timeline(engine, rendering, plan)
        memory = peak_memory(engine.peak_bytes, engine.roles)
        workers = describe_workers(engine.settings, engine.division, timeline.spans, memory)
        report["placement"] = placement_as_json(engine.settings)
        report["peak_bytes"] = {str(rank): held for rank, held in engine.peak_bytes.items()}
    report.update(load_s=load_s, total_s=time.perf_counter() - start_s)
    if results:
        session.terminal.say(summarize(results, load_s=load_s, workers=workers))
    if trace is not None:  # after the summary, so that a full disk does not take that away too
        _write_trace(session, trace, timeline)
    if results and plan.settings.model == EMBEDDED:
        session.terminal.say(try_next())
    if failures:
        raise typer.Exit(_tell_failures(session, failures, num_jobs=len(plan.jobs)))


def _tell_run(session: Session, run: SavedRun) -> None:
    """While the way out is open: a process that is killed tells nothing."""
    session.report["checkpoint"] = str(run.folder)
    if run.goes_on:
        steps = 0 if run.snapshot is None else run.snapshot.at
        session.terminal.say(f"going on after {steps} steps of blocks, with {run.num_frames} frames that are there")
    session.terminal.say(f"if it is stopped, go on with: pipedit generate --resume {shlex.quote(str(run.folder))}")


def _run(session: Session, rendering: Rendering, display: Display) -> tuple[list[Result], list[Failure]]:
    """What ends the whole run is raised, unless a video has failed before it: that may be the reason, so it is told
    first."""
    results: list[Result] = []
    failures: list[Failure] = []
    try:
        for ending in rendering.run():
            if isinstance(ending, Failure):
                failures.append(ending)
                session.terminal.say(f"failed: {ending.job.output}")  # why is said at the end
            else:
                results.append(ending)
                _tell_result(session, ending, display)
    except PipeditError as error:
        if not failures:
            raise
        failures.append(Failure(job=rendering.unfinished[0], error=error))
    return results, failures


def _tell_result(session: Session, result: Result, display: Display) -> None:
    """Paths are printed as soon as their files are whole, so that a script can go on with them."""
    session.report["results"].append(result.as_json())
    with display.paused():
        if not session.as_json:
            session.terminal.data(result.job.output)
        if session.as_json or not session.terminal.shows_data:
            session.terminal.say(f"wrote {result.job.output}")


def _timeline(engine: Engine, rendering: Rendering, plan: Plan) -> Timeline:
    """What the workers did, and the writing of files."""
    timeline = engine.timeline()
    prompts = [job.request.prompt for job in plan.jobs]
    title = prompts[0] if len(prompts) == 1 else f"{len(prompts)} prompts"
    return Timeline(
        spans=(*timeline.spans, *rendering.spans), metadata={"title": title, "prompts": prompts, **timeline.metadata}
    )


def _write_trace(session: Session, trace: str, timeline: Timeline) -> None:
    try:
        write_trace(trace, timeline)
    except OSError as error:
        raise PipeditError(f"{trace} could not be written: {error.strerror or error}") from error
    session.report["trace"] = trace
    session.terminal.say(f"timeline in {trace}: open it at ui.perfetto.dev, or draw it with: pipedit trace {trace}")


def _tell_failures(session: Session, failures: Sequence[Failure], *, num_jobs: int) -> int:
    """One problem out of all failures; with several videos, each names its own. Returns the exit code."""
    problems = []
    for failure in failures:
        problem = errors.describe(failure.error)
        if session.debug:
            errors.show_traceback(failure.error, session)
        if num_jobs > 1:
            messages = tuple(f"{failure.job.output}: {message}" for message in problem.messages)
            problem = dataclasses.replace(problem, messages=messages)
        problems.append(problem)
    whole = errors.together(problems)
    errors.tell(whole, session)
    return whole.exit_code


def _note_other_precision(session: Session, plan: Plan, engine: Engine, like: str) -> None:
    made_with = plan.like.extra.get("dtype") if plan.like is not None else None
    here = dataclasses.asdict(engine.precision)
    if isinstance(made_with, dict) and made_with != here:
        before, now = (", ".join(f"{part} {dtype}" for part, dtype in types.items()) for types in (made_with, here))
        session.terminal.note(f"{like} was made in {before}; here it is {now}, so that pixels will differ a little")
