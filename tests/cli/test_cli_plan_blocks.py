"""`pipedit plan --strategy dualparal`: exact ways above the line, other videos below it, and the command."""

import json
import shlex
from typing import Any

import pytest

from tests.cli.running import Cli, Ran
from tests.cli.test_cli_plan import generate_flags

LONG = (
    "plan", "--model", "wan2.1-t2v-1.3b", "--gpu", "rtx4090", "--num-frames", "513", "--steps", "20", "--prompts", "1",
    "--strategy", "dualparal",
)  # fmt: skip
LARGE = tuple(word.replace("1.3b", "14b") for word in LONG)


def command_of(ran: Ran) -> list[str]:
    text = ran.out.partition("To run the first of the others")[2].partition(":\n")[2].partition("Predictions")[0]
    return shlex.split(text.replace("\\\n", " "))


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_line_between_the_same_video_and_others(cli: Cli, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    ran = cli(*LONG, "--gpus", "8", "--context", "4")
    assert ran.code == 0, ran.err
    words = " ".join(ran.out.split())
    for part in (
        "the same video as on one device", "one device", "Ulysses on 8", "Ring on 8", "fastest that fits",
        "another video: dualparal, blocks of 8, context 4", "prefix cache", "prefix rerun", "x as fast as Ulysses on 8",
        "instead of", "Decoding", "from stage to stage", "Predictions, not measurements",
    ):  # fmt: skip
        assert part in words, part
    assert words.index("Ring on 8") < words.index("another video") < words.index("prefix cache")
    assert all(len(line) <= int(columns) for line in ran.out.splitlines())
    command = command_of(ran)
    assert command[:2] == ["pipedit", "generate"]
    assert {word for word in command if word.startswith("--")} <= generate_flags()
    assert command[command.index("--strategy") + 1] == "dualparal"
    assert command[command.index("--context") + 1] == "4"


def test_rivals_that_do_not_fit_say_by_how_much_and_what_they_would_take(cli: Cli) -> None:
    ran = cli(*LARGE, "--gpus", "8")
    words = " ".join(ran.out.split())
    assert "GiB more than the 24.0 GiB that are there; if it fitted, it would take" in words
    assert "as fast as Ulysses on 8, if that fitted" in words
    document = cli(*LARGE, "--gpus", "8", "--json").document
    blocks = document["dualparal"]
    assert blocks["is_another_video"] is True
    for rival in blocks["rivals"]:
        assert rival["lacks_bytes"] == max(rival["peak_bytes"]) - document["machine"]["available_bytes"] > 0
        assert not rival["fits"]
        assert rival["times_longer"] == pytest.approx(rival["makespan_s"] / blocks["proposals"][0]["makespan_s"])


def test_json_holds_everything(cli: Cli) -> None:
    document = cli(*LONG, "--gpus", "4", "--context", "2", "--json").document
    blocks = document["dualparal"]
    assert [p["makespan_s"] for p in blocks["proposals"]] == sorted(p["makespan_s"] for p in blocks["proposals"])
    best = blocks["proposals"][0]
    assert (best["num_blocks"], best["block_size"], best["context"]) == (17, 8, 2)
    assert len(best["peak_bytes"]) == len(best["weight_bytes"]) == best["stages"] + best["decode_worker"]
    assert len(best["stage_s"]) == len(best["idle_s"]) == best["stages"]
    assert 0 < best["first_frames_s"] < best["makespan_s"]
    assert blocks["command"].endswith(shlex.join(best["flags"]))
    assert document["proposals"], "the exact ways are there as ever"
    assert "dualparal" not in document["command"]
    assert json.dumps(document)


def test_what_is_given_is_kept(cli: Cli) -> None:
    flags = ("--prefix", "rerun", "--block-size", "6", "--context", "6", "--dualparal-compat")
    document = cli(*LONG, "--gpus", "4", *flags, "--json").document
    proposals = document["dualparal"]["proposals"]
    assert {(p["prefix"], p["block_size"], p["context"], p["compat"]) for p in proposals} == {("rerun", 6, 6, True)}
    assert cli(*LONG, "--gpus", "4", "--dualparal-compat", "--json").document["dualparal"]["proposals"]
    stored = cli(*LONG, "--gpus", "4", "--context-storage", "host", "--json").document["dualparal"]["proposals"]
    assert {p["context_storage"] for p in stored} == {"host"}
    assert all(p["host_bytes"] for p in stored if p["prefix"] == "cache")


def test_nothing_fits(cli: Cli) -> None:
    ran = cli(*LONG, "--gpus", "2", "--memory", "4")
    assert ran.code == 0
    assert "Nothing of this can be made block by block" in ran.out
    assert "To run" not in ran.out
    assert cli(*LONG, "--gpus", "2", "--memory", "4", "--json").document["dualparal"]["command"] is None


def test_it_is_not_there_unasked(cli: Cli) -> None:
    plain = cli(*LONG[:-2], "--gpus", "8", "--json").document
    assert "dualparal" not in plain
    assert not any("dualparal" in proposal["flags"] for proposal in plain["proposals"])
    for strategy, kinds in (("colocated", {"colocated"}), ("disaggregated", {"disaggregated"})):
        document = cli(*LONG[:-1], strategy, "--gpus", "4", "--memory", "40", "--json").document
        assert {proposal["kind"].split("_")[0] for proposal in document["proposals"]} >= kinds
        assert all(
            (proposal["kind"] == "disaggregated") == (strategy == "disaggregated") for proposal in document["proposals"]
        )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--strategy", "dual"), ["--strategy 'dual' is unknown; use auto, colocated, disaggregated, dualparal"]),
        (("--block-size", "8", "--context", "9"), ["--block-size and --context needs --strategy dualparal"]),
        (("--strategy", "dualparal", "--block-size", "4", "--context", "9"), ["context=9 is more than block_size=4"]),
        (("--strategy", "dualparal", "--prefix", "x"), ["prefix='x' is unknown"]),
        (("--strategy", "dualparal", "--context-storage", "disk"), ["context_storage='disk' is unknown"]),
        (("--strategy", "dualparal", "--dualparal-compat", "--prefix", "cache"), ["needs prefix='rerun'"]),
        (("--strategy", "dualparal", "--model", "open-sora-plan-v1.3"), ["cannot be run block by block"]),
    ],
)
def test_wrong_questions(cli: Cli, flags: tuple[str, ...], said: list[str]) -> None:
    words: list[Any] = ["plan", "--gpu", "rtx4090", *(() if "--model" in flags else ("--model", "wan2.1-t2v-1.3b"))]
    ran = cli(*words, *flags)
    assert (ran.code, len(ran.errors)) == (2, len(said)), ran.err
    assert all(part in error for part, error in zip(said, ran.errors, strict=True))


def test_a_video_that_is_too_long_for_the_model_has_no_rivals(cli: Cli) -> None:
    endless = (
        "plan",
        "--model",
        "wan2.1-t2v-1.3b",
        "--gpu",
        "h100",
        "--gpus",
        "2",
        "--num-frames",
        "4801",
        "--steps",
        "3",
    )
    assert cli(*endless).errors == ["num_frames=4801 is more than this model has positions for: 4093"]
    ran = cli(*endless, "--prompts", "1", "--strategy", "dualparal")
    assert ran.code == 0, ran.err
    words = " ".join(ran.out.split())
    assert "cannot be: num_frames=4801 is more than" in words
    assert "Ulysses" not in words
    document = cli(*endless, "--prompts", "1", "--strategy", "dualparal", "--json").document
    assert (document["proposals"], document["command"], document["dualparal"]["rivals"]) == ([], None, [])
    assert document["dualparal"]["proposals"]
