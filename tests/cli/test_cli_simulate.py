"""`pipedit simulate`, and `pipedit trace --compare`: from files to figures, pictures and problems."""

import csv
import dataclasses
from pathlib import Path

import pytest

from pipedit.plan.trace_file import read_trace, write_trace
from tests.cli.running import Cli, lines, names_in

SMALL = "wan2.1-t2v-1.3b,480,352,33,5,4"
HEADING = "model,width,height,num_frames,num_inference_steps,count"
MACHINE = ("--gpu", "a6000", "--gpus", "4")


@pytest.fixture
def workload(tmp_path: Path) -> str:
    return lines(tmp_path / "work.csv", [HEADING, SMALL])


def test_figures_of_a_workload(cli: Cli, workload: str) -> None:
    ran = cli("simulate", workload, *MACHINE)
    assert (ran.code, ran.err) == (0, "")
    for word in ("wan2.1-t2v-1.3b", "makespan", "throughput", "latency", "idle", "NVIDIA RTX A6000"):
        assert word in ran.out
    document = cli("simulate", workload, *MACHINE, "--json").document
    assert document["requests"] == 4
    assert document["latency"]["max_s"] == pytest.approx(document["makespan_s"])
    assert document["engines"][0]["workers"] * document["engines"][0]["count"] == 4
    assert document["grain"] == 1


def test_a_cluster_file_and_flags(cli: Cli, workload: str, tmp_path: Path) -> None:
    cluster = lines(tmp_path / "c.json", ['{"device": "h100", "num_devices": 64, "price_per_hour": 3.6}'])
    flags = ("--denoise-workers", "3", "--decode-workers", "1", "--aco", "on", "--encode-on", "denoise", "--json")
    document = cli("simulate", workload, "--cluster", cluster, *flags).document
    (engines,) = document["engines"]
    assert (engines["count"], engines["denoisers"], engines["decoders"]) == (16, [0, 1, 2], [3])
    assert document["cost_per_video"] == pytest.approx(64 * 0.001 * document["makespan_s"] / 4)
    assert set(document["groups"]) == {"denoise", "decode"}


def test_a_trace_is_compared_with_itself_and_with_a_slower_one(cli: Cli, workload: str, tmp_path: Path) -> None:
    ran = cli("simulate", workload, *MACHINE, "--trace", "predicted.json", "--picture", "predicted.svg")
    assert ran.code == 0
    assert ran.err == "timeline in predicted.json\ndrawn in predicted.svg\n"
    assert cli("trace", "--compare", "predicted.json", "predicted.json", "--json").document["makespan_error"] == 0

    timeline = read_trace("predicted.json")
    slower = [dataclasses.replace(span, start_s=2 * span.start_s, end_s=2 * span.end_s) for span in timeline.spans]
    write_trace("measured.json", dataclasses.replace(timeline, spans=tuple(slower)))
    ran = cli("trace", "--compare", "predicted.json", "measured.json", "--picture", "both.svg")
    assert (ran.code, ran.err) == (0, "drawn in both.svg\n")
    rows = {line.split()[0]: line for line in ran.out.splitlines() if line.strip()}
    assert all("-50.0 %" in rows[what] for what in ("encode", "step", "decode", "makespan"))
    picture = Path("both.svg").read_text(encoding="utf-8")
    assert ">predicted<" in picture
    assert ">measured<" in picture
    assert names_in(tmp_path) == ["both.svg", "measured.json", "predicted.json", "predicted.svg", "work.csv"]


def test_videos_block_by_block(cli: Cli, tmp_path: Path) -> None:
    long = lines(tmp_path / "long.csv", [HEADING, "wan2.1-t2v-1.3b,480,352,161,5,1"])
    flags = ("--strategy", "dualparal", "--decode-workers", "1", "--block-size", "4", "--context", "2")
    ran = cli("simulate", long, *MACHINE, *flags, "--trace", "t.json", "--picture", "p.svg")
    assert ran.code == 0, ran.err
    assert "layers on 3 stages, 1 encodes and decodes" in ran.out
    spans = read_trace("t.json").spans
    assert {span.block for span in spans if span.what == "decode"} == set(range(11))
    assert {span.rank for span in spans if span.what == "step"} == {0, 1, 2}
    picture = Path("p.svg").read_text(encoding="utf-8")
    assert ">blocks<" in picture
    assert "block 10 · step 4" in picture
    assert cli("simulate", long, *MACHINE, "--block-size", "4").errors == [
        "replicas: block_size needs strategy dualparal"
    ]


def test_every_problem_at_once(cli: Cli, tmp_path: Path) -> None:
    bad = lines(tmp_path / "bad.csv", [HEADING, "wan2.1-t2v-1.3b,481,352,33,5,1", "wan2.1-t2v-1.3b,480,352,34,5,1"])
    ran = cli("simulate", bad, "--gpu", "a6001", "--trace", "no/t.json", "--picture", "x.bmp", "--grain", "-1")
    assert ran.code == 2
    starts = (
        "bad.csv:2: width=481",
        "bad.csv:3: num_frames=34",
        "device 'a6001'",
        "the folder no",
        "cannot draw x.bmp",
    )
    assert len(ran.errors) == len(starts) + 1
    for error, start in zip(ran.errors, starts, strict=False):
        assert error.startswith(start)
    assert ran.errors[-1] == "--grain -1 must be at least 0"
    assert names_in(tmp_path) == ["bad.csv"]


@pytest.mark.usefixtures("workload")
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "name a workload file"),
        (("work.csv",), "say on which machine"),
        (("work.csv", "--gpu", "a6000", "--cluster", "c.json"), "--gpu cannot be used here"),
        (("work.csv", *MACHINE, "-o", "x.csv"), "--output cannot be used here"),
        (("work.csv", "--cases", "c.csv", "--gpu", "a6000"), "WORKLOAD, --gpu cannot be used here"),
        (("gone.csv", *MACHINE), "gone.csv does not exist"),
        (("work.csv", "--gpu", "a6000", "--gpus", "0"), "--gpus 0 must be at least 1"),
        (("work.csv", *MACHINE, "--strategy", "both"), "strategy='both' is unknown"),
    ],
)
def test_flags_that_make_no_sense(cli: Cli, arguments: tuple[str, ...], problem: str) -> None:
    ran = cli("simulate", *arguments)
    assert (ran.code, len(ran.errors)) == (2, 1), ran.err
    assert problem in ran.errors[0]


def test_a_timeline_of_very_much_work_is_refused(cli: Cli, tmp_path: Path) -> None:
    many = lines(tmp_path / "many.csv", [HEADING, SMALL.replace(",5,4", ",5,100000")])
    ran = cli("simulate", many, "--gpu", "a6000", "--gpus", "256", "--picture", "x.svg")
    assert (ran.code, len(ran.errors)) == (2, 2)
    assert "the most to be written" in ran.errors[0]
    assert "too tall" in ran.errors[1]


def test_cases_gain_a_column(cli: Cli, tmp_path: Path) -> None:
    heading = "model,gpu,width,height,frames,steps,prompts,variant"
    cases = lines(tmp_path / "cases.csv", [heading, "HunyuanVideo,L40,480,352,65,10,10,pipedit"])
    ran = cli("simulate", "--cases", cases, "-o", "predicted.csv")
    assert (ran.code, ran.out, ran.err) == (0, "", "1 cases predicted in predicted.csv\n")
    (row,) = csv.DictReader(Path("predicted.csv").read_text(encoding="utf-8").splitlines())
    assert list(row) == [*heading.split(","), "predicted_s"]
    assert cli("simulate", "--cases", cases).out == Path("predicted.csv").read_text(encoding="utf-8")
    document = cli("simulate", "--cases", cases, "--json").document
    assert document["cases"][0]["predicted_s"] == pytest.approx(float(row["predicted_s"]), abs=0.1)


def test_bad_cases_are_listed_by_line(cli: Cli, tmp_path: Path) -> None:
    heading = "model,gpu,width,height,frames,steps,prompts,variant"
    cases = lines(
        tmp_path / "cases.csv", [heading, "x,L40,480,352,65,10,10,pipedit", "HunyuanVideo,L41,480,352,65,10,0,"]
    )
    ran = cli("simulate", "--cases", cases, "-o", "no/predicted.csv")
    assert ran.code == 2
    places = [error.partition(": ")[0] for error in ran.errors]
    assert places == ["cases.csv:2", "cases.csv:3", "cases.csv:3", "cases.csv:3", ran.errors[-1]]
    assert names_in(tmp_path) == ["cases.csv"]
