"""`--checkpoint` and `--resume` on the command line. The worker is in this process."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipedit.cli.app import run
from pipedit.cli.console import Session
from pipedit.cli.generate import open_engine
from tests.cli.running import SMALL, Cli, Ran

DUALPARAL = ("--strategy", "dualparal", "--block-size", "2", "--context", "1", "--num-workers", "1")


@pytest.fixture
def real(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def generate(*arguments: str) -> Ran:
        capsys.readouterr()
        code = run(("generate", *arguments), Session(open_engine=open_engine))
        captured = capsys.readouterr()
        return Ran(code=code, out=captured.out, err=captured.err)

    return generate


@pytest.fixture
def begin(cli: Cli, real: Callable[..., Ran]) -> Callable[..., Ran]:
    """A run that is saved in "run"."""

    def generate(*arguments: str) -> Ran:
        small = [*SMALL, "--num-frames", "17", "--seed", "3"]
        saving = ("--checkpoint", "run", "--checkpoint-every", "1")
        return real("--model", cli.model, *small, *DUALPARAL, *saving, *arguments)

    return generate


def test_the_file_of_a_run_that_goes_on_is_that_of_one_that_ran_through(
    begin: Callable[..., Ran], real: Callable[..., Ran]
) -> None:
    ran = begin("a red ball", "-o", "ball.npy")
    assert ran.code == 0 and ran.paths == ["ball.npy"]
    assert "if it is stopped, go on with: pipedit generate --resume run" in ran.err
    shutil.move("ball.npy", "whole.npy")
    Path("ball.npy.json").unlink()
    assert Path("run/6/complete.json").is_file()

    ran = real("--resume", "run")
    assert ran.code == 0 and ran.paths == ["ball.npy"], ran.err
    assert "going on after 6 steps of blocks, with" in ran.err
    assert np.array_equal(np.load("ball.npy"), np.load("whole.npy"))

    ran = real("--resume", "run")
    assert ran.code == 2 and "ball.npy exists" in ran.err
    ran = real("--resume", "run", "-o", "other.npy", "--json")
    assert ran.document["checkpoint"] == "run"
    assert ran.document["results"][0]["seconds"]["decode"] > 0
    assert np.array_equal(np.load("other.npy"), np.load("whole.npy"))


def test_flags_may_be_said_again_but_not_changed(begin: Callable[..., Ran], real: Callable[..., Ran]) -> None:
    begin("a red ball", "-o", "ball.npy")
    Path("prompts.txt").write_text("a red ball\n")
    ran = real("--resume", "run", "a red ball", *DUALPARAL, "--seed", "3", "--checkpoint", "./run", "-y")
    assert ran.code == 0, ran.err
    ran = real(
        "--resume", "run", "a blue ball", "--seed", "4", "--block-size", "3", "--prefix", "rerun", "--vae-use-tiling",
        "--checkpoint", "other", "--prompt-file", "prompts.txt", "--like", "ball.npy", "--guidance-scale-2", "3", "-y",
    )  # fmt: skip
    assert ran.code == 2
    assert ran.errors == [
        "--like cannot be combined with --resume, which says what is made",
        "--prompt-file cannot be combined with --resume, which says what is made",
        "with --resume run the run is saved there again; leave --checkpoint out",
        "the run to go on with is of the prompt 'a red ball'; leave the prompt out",
        "--seed 4 contradicts the run to go on with, which was begun with 3; leave it out",
        "--guidance-scale-2 3.0 contradicts the run to go on with, which was begun without it; leave it out",
        "--vae-use-tiling contradicts the run to go on with, which was begun without it; leave it out",
        "--block-size 3 contradicts the run to go on with, which was begun with 2; leave it out",
        "--prefix rerun contradicts the run to go on with, which was begun with cache; leave it out",
    ]


def test_what_cannot_be_saved_is_refused_at_once(cli: Cli, begin: Callable[..., Ran]) -> None:
    Path("run").mkdir()
    Path("run/thesis.txt").touch()
    ran = cli.generate("one", "two", "--checkpoint", "run", "--strategy", "colocated", "--checkpoint-every", "0")
    assert ran.code == 2
    assert ran.errors == [
        "--checkpoint-every 0 must be at least 1",
        "run is not empty; take a new folder for the checkpoint",
        "--checkpoint saves one video, and there are 2; give one prompt",
        "--checkpoint needs --strategy dualparal: other videos are made as a whole",
    ]
    assert cli.generate("one", "--checkpoint-every", "3").errors == [
        "--checkpoint-every needs --checkpoint, which says where"
    ]
    assert "the folder missing does not exist" in cli.generate("one", "--checkpoint", "missing/run").err
    shutil.rmtree("run")
    assert begin("a red ball").code == 0
    assert begin("a red ball").errors == [
        "run holds a run already: go on with it by --resume run, or take another folder"
    ]


def test_there_must_be_something_to_go_on_with(cli: Cli) -> None:
    ran = cli("generate", "--resume", "nowhere", "--seed", "4")
    assert ran.code == 2
    assert ran.errors == ["nowhere holds no run to go on with: nowhere/request.json is missing"]
