"""`pipedit plan`: the tables, the command that it hands out, JSON, and what is wrong with a question."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from pipedit.cli.app import app
from pipedit.plan.hardware import make_cluster, write_cluster
from tests.cli.running import Cli, Ran

HUNYUAN = (
    "plan", "--model", "hunyuanvideo", "--gpu", "a6000", "--width", "1024", "--height", "576", "--num-frames", "129",
)  # fmt: skip
WAN = ("plan", "--model", "wan2.1-t2v-1.3b", "--gpu", "a6000", "--gpus", "2", "--prompts", "2")


def command_of(ran: Ran) -> list[str]:
    text = ran.out.partition("To run the first:")[2].partition("Predictions")[0]
    return shlex.split(text.replace("\\\n", " "))


def generate_flags() -> set[str]:
    group = typer.main.get_command(app)
    command = group.commands["generate"]  # type: ignore[attr-defined]
    return {name for parameter in command.params for name in parameter.opts}


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_best_the_refused_and_the_command(cli: Cli, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    ran = cli(*HUNYUAN, "--gpus", "8", "--link", "nvlink-bridge", "--steps", "50", "--prompts", "10")
    assert ran.code == 0
    words = " ".join(ran.out.split())
    for part in (
        "8 x NVIDIA RTX A6000", "10 videos of 1024x576", "disaggregated 7+1,", "idle %", "x as fast as colocated",
        "cannot run", "GiB of it weights", "needs guidance", "Predictions, not measurements",
    ):  # fmt: skip
        assert part in words, part
    assert all(len(line) <= int(columns) for line in ran.out.splitlines())
    command = command_of(ran)
    assert command[:2] == ["pipedit", "generate"]
    assert {word for word in command if word.startswith("--")} <= generate_flags()


def test_json_holds_everything(cli: Cli) -> None:
    ran = cli(*HUNYUAN, "--gpus", "8", "--prompts", "4", "--json")
    document = ran.document
    assert document["kind"] == "prediction"
    assert document["machine"]["num_devices"] == 8
    proposals = document["proposals"]
    assert {proposal["kind"] for proposal in proposals} == {"disaggregated", "offloaded", "offloaded_serial"}
    best = proposals[0]
    assert len(best["peak_bytes"]) == best["num_workers"]
    assert set(best["idle_share"]) == ({"denoise", "decode"} if best["kind"] == "disaggregated" else {"all"})
    assert best["makespan_s"] == pytest.approx(4 * best["seconds_each"])
    assert document["command"].endswith(shlex.join(best["flags"]))
    price = document["machine"]["price_per_hour"]
    assert best["cost_per_video"] == pytest.approx(price * 8 * best["seconds_each"] / 3600)
    assert any("GiB of it weights" in refusal["reason"] for refusal in document["refusals"])
    assert json.dumps(document)


def test_one_video_is_made_by_all_together(cli: Cli) -> None:
    ran = cli(*WAN, "--prompts", "1", "--gpus", "4")
    command = command_of(ran)
    assert command[2] == "PROMPT"
    assert command[command.index("--strategy") + 1] == "colocated"
    assert command[command.index("--num-workers") + 1] == "4"


def test_less_memory_changes_what_is_proposed(cli: Cli) -> None:
    def kinds(memory: str) -> set[str]:
        return {proposal["kind"] for proposal in cli(*WAN, "--memory", memory, "--json").document["proposals"]}

    assert "colocated" in kinds("48")
    assert "colocated" not in kinds("14")
    nothing = cli(*WAN, "--memory", "2")
    assert nothing.code == 0
    assert "Nothing of this can run" in nothing.out
    assert "the weights alone do not fit" in nothing.out
    assert "To run the first" not in nothing.out
    assert cli(*WAN, "--memory", "2", "--json").document["command"] is None


def test_guidance_allows_two_halves(cli: Cli) -> None:
    def degrees(scale: str) -> set[int]:
        document = cli(*WAN, "--guidance-scale", scale, "--json").document
        return {proposal["parallel"][0]["cfg_degree"] for proposal in document["proposals"]}

    assert degrees("5") == {1, 2}
    assert degrees("1") == {1}


def test_what_would_fit_is_said(cli: Cli) -> None:
    advice = cli(*HUNYUAN, "--gpus", "1", "--memory", "34", "--json").document["advice"]
    found = re.search(r"would fit: (\d+) frames of this size, or 129 frames of (\d+x\d+)", advice)
    assert found is not None
    frames, size = found.groups()
    assert int(frames) < 129
    width, _, height = size.partition("x")
    for smaller in (("--num-frames", frames), ("--width", width, "--height", height)):
        assert cli(*HUNYUAN, *smaller, "--gpus", "1", "--memory", "34", "--json").document["proposals"]


def test_several_engines_beside_each_other_are_mentioned(cli: Cli) -> None:
    document = cli(*WAN, "--prompts", "8", "--gpus", "4", "--json").document
    beside, best = document["replicas"], document["proposals"][0]
    assert beside["engines"] * beside["each"]["num_workers"] <= 4
    assert beside["each"]["first_video_s"] > best["first_video_s"]
    assert beside["videos_per_hour"] == pytest.approx(3600 * 8 / beside["makespan_s"])
    assert cli(*WAN, "--prompts", "1", "--json").document["replicas"] is None


def test_a_model_that_can_only_be_planned_for(cli: Cli) -> None:
    ran = cli("plan", "--model", "open-sora-plan-v1.3", "--gpu", "l40", "--num-frames", "65")
    assert ran.code == 0
    assert "not run it yet" in ran.out
    assert "To run the first" not in ran.out


def test_top_limits_the_rows_but_keeps_a_row_of_each_kind(cli: Cli) -> None:
    few = cli(*WAN, "--top", "1", "--gpus", "4").out
    many = cli(*WAN, "--top", "9", "--gpus", "4").out
    assert len(few.splitlines()) < len(many.splitlines())
    for kind in ("colocated 4, offloaded", "disaggregated"):
        assert kind in few


def test_a_cluster_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "cluster.json"
    file.write_text(json.dumps({"device": "l40", "num_devices": 2}))
    plain = ("plan", "--model", "wan2.1-t2v-1.3b", "--prompts", "2", "--cluster", str(file))
    machine = cli(*plain, "--json").document["machine"]
    assert (machine["device"], machine["num_devices"], machine["link"]) == ("l40", 2, "pcie4")
    assert cli(*plain, "--gpus", "4", "--json").document["machine"]["num_devices"] == 4
    assert cli(*plain, "--gpu", "h100", "--link", "x").errors == ["--cluster says that too; leave --gpu and --link out"]
    for broken in ("{", "[]", '{"device": "l40"}', '{"kind": "cluster"}'):
        file.write_text(broken)
        assert cli(*plain).code == 2


def test_what_profile_writes_is_a_cluster(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    write_cluster(make_cluster("l40", num_devices=2), file)
    plain = ("plan", "--model", cli.model, "--cluster", str(file), "--json")
    machine = cli(*plain).document["machine"]
    assert (machine["device"], machine["num_devices"]) == ("l40", 2)
    assert cli(*plain, "--gpus", "3").document["machine"]["num_devices"] == 3


def test_workers_on_a_cpu_share_its_memory_and_offload_nothing(cli: Cli) -> None:
    plain = ("plan", "--model", cli.model, "--gpu", "cpu", "--json")
    one, four = (cli(*plain, "--gpus", str(count)).document for count in (1, 4))
    assert one["machine"]["available_bytes"] == 4 * four["machine"]["available_bytes"]
    assert not any(proposal["offload"] for proposal in four["proposals"])


def test_a_model_in_a_folder(cli: Cli) -> None:
    ran = cli("plan", "--model", cli.model, "--gpu", "a6000", "--gpus", "2", "--json")
    assert ran.code == 0
    assert ran.document["proposals"]


def test_everything_that_is_wrong_is_said_at_once(cli: Cli) -> None:
    ran = cli(
        "plan",
        "--model",
        "hunyuanvide",
        "--gpu",
        "a600",
        "--gpus",
        "0",
        "--prompts",
        "0",
        "--memory",
        "-1",
        "--top",
        "0",
    )
    assert ran.code == 2
    assert len(ran.errors) == 6
    for part in ("did you mean hunyuanvideo?", "did you mean a6000?", "--gpus 0", "--prompts 0", "--memory", "--top 0"):
        assert any(part in error for error in ran.errors), part


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan",), ["--gpu is missing", "--model is missing"]),
        ((*WAN, "--width", "839"), ["width=839 is not a multiple of 16"]),
        ((*WAN, "--true-cfg-scale", "2"), ["true_cfg_scale is only for HunyuanVideo"]),
    ],
)
def test_wrong_questions(cli: Cli, arguments: Any, said: list[str]) -> None:
    ran = cli(*arguments)
    assert ran.code == 2
    assert len(ran.errors) == len(said)
    assert all(part in error for part, error in zip(said, ran.errors, strict=True))


def test_no_torch_is_imported(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli(*WAN).code == 0
