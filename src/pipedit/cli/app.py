"""The commands together, and the frame around each of them: errors become exit codes, --json becomes one document."""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from pipedit.cli import errors
from pipedit.cli.bench import bench
from pipedit.cli.console import Session, replace_closed_streams, session_of
from pipedit.cli.doctor import doctor
from pipedit.cli.generate import EPILOG, generate, open_engine
from pipedit.cli.models import models
from pipedit.cli.options import Command, Group, switch
from pipedit.cli.plan import EPILOG as PLAN_EPILOG
from pipedit.cli.plan import plan
from pipedit.cli.profile import profile
from pipedit.cli.simulate import EPILOG as SIMULATE_EPILOG
from pipedit.cli.simulate import simulate
from pipedit.cli.trace import trace
from pipedit.core.version import __version__

app = typer.Typer(
    name="pipedit",
    cls=Group,
    help="Video from diffusion transformers on one to many GPUs.",
    epilog="[dim]Start with:[/dim] pipedit generate [green]'a red ball moves right'[/green]",
    rich_markup_mode="rich",
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # xDiT and Python spell --num_frames; both spellings are the same flag.
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
app.command(cls=Command, epilog=EPILOG)(generate)
app.command(cls=Command)(models)
app.command(cls=Command, epilog=PLAN_EPILOG)(plan)
app.command(cls=Command, epilog=SIMULATE_EPILOG)(simulate)
app.command(cls=Command)(profile)
app.command(cls=Command)(trace)
app.command(cls=Command)(doctor)
app.add_typer(bench, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pipedit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback does the work
        bool, switch("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, switch("--debug", help="Show the traceback when something fails.")] = False,
) -> None:
    session_of(context).debug = debug
    if context.invoked_subcommand is None:
        with contextlib.redirect_stdout(sys.stderr):  # typer prints it itself
            context.get_help()
        raise typer.Exit(errors.BAD_INPUT)


def run(arguments: Sequence[str], session: Session | None = None) -> int:
    """Runs one command line and returns the exit code. Nothing escapes but SystemExit of shell completion."""
    replace_closed_streams()
    if session is None:
        session = Session(open_engine=open_engine)
    session.as_json = "--json" in arguments  # known before the command line is understood, so that this can fail too
    try:
        with errors.stopping_on_signals():
            code = _invoke(arguments, session)
        if session.as_json and session.report:
            session.terminal.document(session.report)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (`| head`): no error to tell, and the interpreter must not trip over it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.FAILED
    return code


def _invoke(arguments: Sequence[str], session: Session) -> int:
    command = typer.main.get_command(app)
    try:
        code = command.main(list(arguments), prog_name="pipedit", standalone_mode=False, obj=session)
        if code == errors.INTERRUPTED:  # how typer hands on a KeyboardInterrupt
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt, errors.StoppedError) as error:  # noqa: BLE001 - the outermost frame
        problem = errors.describe(error)
        if session.debug:
            errors.show_traceback(error, session)
        errors.tell(problem, session)
        return problem.exit_code
    return code if isinstance(code, int) else errors.DONE
