"""The frame around the commands: exit codes, what wrong command lines say, how fast they say it, real terminals."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipedit.cli import errors
from pipedit.cli.app import run
from pipedit.cli.console import Session
from pipedit.core import errors as core_errors
from pipedit.core.version import __version__
from pipedit.engine.engine import Engine
from pipedit.engine.settings import EngineSettings
from tests.cli.running import SMALL, Cli, names_in

TIMEOUT_S = 60
HEAVY = {"torch", "diffusers", "transformers"}
GENERATE_IN_TERMINAL = """
import sys
from pipedit.cli.app import run
from pipedit.cli.console import Session
from pipedit.engine.engine import Engine
from pipedit.executor.simulated import SimulatedExecutor
session = Session(open_engine=lambda s: Engine(s.model, device=s.device, executor=SimulatedExecutor()))
sys.exit(run(sys.argv[1:], session))
"""


def test_the_version(cli: Cli) -> None:
    assert cli("--version").out == f"pipedit {__version__}\n"


@pytest.mark.parametrize("command", [[], ["generate"], ["models"], ["trace"], ["doctor"]])
def test_every_command_explains_itself(cli: Cli, command: list[str]) -> None:
    ran = cli(*command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert "Usage: pipedit" in ran.out
    assert "<bool>" not in ran.out


def test_without_a_command_the_help_comes_on_stderr(cli: Cli) -> None:
    ran = cli()
    assert (ran.code, ran.out) == (2, "")
    assert "Usage: pipedit" in ran.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["genrate", "x"], "did you mean 'generate'"),
        (["generate", "x", "--num-frame", "9"], "--num-frames"),
        (["generate", "x", "--num-frames", "many"], "--num-frames"),
        (["generate", "x", "--seed"], "--seed"),
        (["trace"], "file"),
    ],
)
def test_a_wrong_command_line_is_wrong_input(cli: Cli, arguments: list[str], said: str) -> None:
    ran = cli(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert len(ran.errors) == 1
    assert said.lower() in ran.errors[0].lower()
    assert "hint: see pipedit" in ran.err
    assert "Traceback" not in ran.err


def test_a_group_needs_a_command(cli: Cli) -> None:
    ran = cli("bench")
    assert (ran.code, ran.errors) == (2, ["pipedit bench needs a command"])


def test_a_wrong_command_line_with_json_is_a_document(cli: Cli) -> None:
    ran = cli("generate", "x", "--json", "--no-such-flag")
    assert ran.code == 2
    assert ran.document["error"]["kind"] == "bad_input"
    assert ran.document["error"]["hints"] == ["see pipedit generate --help"]


def test_flags_may_be_spelled_with_underscores(cli: Cli) -> None:
    ran = cli("generate", "x", "--model", cli.model, "--num_frames", "10", "--num_inference_steps=0", "-o", "x.gif")
    assert any("num_frames=10" in error for error in ran.errors)
    assert any("num_inference_steps=0" in error for error in ran.errors)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (core_errors.InvalidRequestError(["a", "b"]), "bad_input", 2),
        (core_errors.InsufficientMemoryError("too large"), "memory", 1),
        (core_errors.CheckpointError("no weights"), "checkpoint", 1),
        (core_errors.CancelledError("cancelled"), "cancelled", 1),
        (core_errors.WorkerError("broke", rank=0, doing="denoising"), "worker", 1),
        (core_errors.PipeditError("disk full"), "failure", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (errors.StoppedError(15), "interrupted", 143),
        (ZeroDivisionError("by zero"), "unexpected", 1),
    ],
)
def test_every_error_has_its_kind_and_exit_code(error: BaseException, kind: str, code: int) -> None:
    problem = errors.describe(error)
    assert (problem.kind, problem.exit_code) == (kind, code)
    assert problem.messages
    assert json.dumps(problem.as_json())


def test_the_unexpected_is_a_sentence_and_no_traceback(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    def open_engine(settings: EngineSettings) -> Engine:
        raise ZeroDivisionError(settings.model)

    code = run(["generate", "x", "-m", cli.model, *SMALL, "-o", "x.gif"], Session(open_engine=open_engine))
    err = capsys.readouterr().err
    assert code == 1
    assert f"error: ZeroDivisionError: {cli.model}" in err
    assert "hint: pipedit --debug" in err
    assert "Traceback" not in err


# -- in processes of their own ------------------------------------------------------------------------------------


def test_wrong_input_is_answered_without_torch(cli: Cli) -> None:
    arguments = ["generate", "x", "--model", cli.model, "--num-frames", "10"]
    command = [sys.executable, "-X", "importtime", "-m", "pipedit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 2
    assert "error: num_frames=10" in done.stderr
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, flags=re.MULTILINE))
    assert "pipedit.cli.order" in imported
    assert not imported & HEAVY


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_bars_while_stdout_stays_clean(cli: Cli, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = ["generate", "a red ball", "a blue one", "-m", cli.model, *SMALL, "-o", "x.gif"]
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, "-c", GENERATE_IN_TERMINAL, *arguments],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    shown = read_until_closed(ours)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert out.decode().splitlines() == ["x-1.gif", "x-2.gif"]
    for part in ("[1/2]", "denoise", "━", "\x1b[?25l", "\x1b[?25h"):  # the cursor goes, and comes back
        assert part in shown
    assert names_in(tmp_path) == ["x-1.gif", "x-2.gif"]


def read_until_closed(descriptor: int) -> str:
    """Everything that was written to a pseudo-terminal until its last writer closed it."""
    pieces = []
    try:
        while piece := os.read(descriptor, 65536):
            pieces.append(piece)
    except OSError:  # how Linux says that the other side has gone
        pass
    finally:
        os.close(descriptor)
    return b"".join(pieces).decode()


def test_a_reader_that_goes_away_gets_no_complaint() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pipedit", "models", "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_prompt_that_begins_with_a_dash_is_explained(cli: Cli) -> None:
    ran = cli("generate", "-10 degrees")
    assert ran.code == 2
    assert 'hint: put -- before a prompt that begins with a dash: pipedit generate -- "-10 degrees"' in ran.err
    assert "begins with a dash" not in cli("generate", "--sead", "1").err


def test_closed_streams_are_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):  # an open number below 3 cannot be handed on to workers
        monkeypatch.setattr(sys, name, None)
    assert run(["generate", "", "-o", "x.mp5"]) == 2
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        assert stream.name == os.devnull
        stream.close()
