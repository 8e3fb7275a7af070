"""Many workers on the command line: flags and their other names, errors, what is said, and doctor's table."""

from pathlib import Path
from typing import Any, NoReturn

import pytest

from pipedit.cli.console import Terminal
from pipedit.cli.order import Job
from pipedit.cli.render import Result
from pipedit.cli.summary import Workers, peak_memory, summarize
from pipedit.core.errors import PipeditError, WorkerDiedError
from pipedit.core.messages import Command
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Placement, Role
from pipedit.core.request import VideoRequest
from pipedit.core.spans import Span
from pipedit.core.units import GIB
from pipedit.executor.simulated import SimulatedExecutor
from pipedit.media import read_metadata
from tests.cli.running import Cli

WAN_1B = "wan2.1-t2v-1.3b"


@pytest.fixture(autouse=True)
def _cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipedit.engine.settings.usable_cores", lambda: 64)


# -- generate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-workers", "2"], "2 workers: cfg 2 x ring 1 x ulysses 1\n"),
        (["--num-workers", "2", "--guidance-scale", "1"], "2 workers: cfg 1 x ring 1 x ulysses 2, PipeSP auto\n"),
        (["--num_gpus", "4", "--cfg_parallel_size", "1"], "4 workers: cfg 1 x ring 1 x ulysses 4, PipeSP auto\n"),
        (
            ["--num-workers", "8", "--ulysses-degree", "2", "--ring-degree", "2", "--pipesp-chunks", "2"],
            "8 workers: cfg 2 x ring 2 x ulysses 2, PipeSP 2\n",
        ),
        (["--num-workers", "4", "--ulysses_degree", "2", "--pipesp_chunks", "1"], "ulysses 2, PipeSP off\n"),
    ],
)
def test_flags_say_how_workers_share_and_the_summary_repeats_it(cli: Cli, flags: list[str], said: str) -> None:
    ran = cli.generate("x", "-o", "x.gif", *flags)
    assert (ran.code, ran.out) == (0, "x.gif\n")
    assert said in ran.err


def test_one_worker_is_not_worth_a_word(cli: Cli) -> None:
    ran = cli.generate("x", "-o", "x.gif", "--json")
    assert "workers" not in ran.err
    assert "note:" not in ran.err
    assert ran.document["results"][0]["parallel"]["num_workers"] == 1


def test_the_split_is_in_the_document_and_in_the_file(cli: Cli) -> None:
    ran = cli.generate("x", "-o", "x.gif", "--num-workers", "8", "--pipesp-chunks", "auto", "--json")
    split = {"cfg_degree": 2, "ring_degree": 1, "ulysses_degree": 4, "pipesp_chunks": "auto"}
    assert ran.document["results"][0]["parallel"] == {"num_workers": 8, **split}
    extra = read_metadata("x.gif").extra
    assert (extra["num_workers"], extra["parallel"]) == (8, split)


def test_workers_that_load_at_the_same_time_do_not_add_up(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [
        Span(request_id="", rank=rank, role="denoiser", what="load", start_s=0.0, end_s=60.0, index=None)
        for rank in range(2)
    ]
    monkeypatch.setattr(SimulatedExecutor, "start", lambda *_: spans)
    assert cli.generate("x", "-o", "x.gif", "--num-workers", "2", "--json").document["load_s"] < 60.0


def test_like_takes_the_video_and_not_the_workers(cli: Cli) -> None:
    cli.generate("x", "-o", "x.gif", "--num-workers", "6")
    ran = cli("generate", "--like", "x.gif", "-o", "y.gif", "--json", "--device", "cpu")
    assert ran.document["results"][0]["parallel"]["num_workers"] == 1


def test_more_workers_than_cores_are_noted(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipedit.engine.settings.usable_cores", lambda: 1)
    assert "note: 2 workers share 1 core:" in cli.generate("x", "-o", "x.gif", "--num-workers", "2").err


def test_impossible_degrees_are_refused_with_what_can_run(cli: Cli, tmp_path: Path) -> None:
    ran = cli.generate("x", "-o", "x.gif", "--num-workers", "8", "--ulysses-degree", "8")
    assert (ran.code, ran.out) == (2, "")
    assert ran.errors == [
        "ulysses_degree=8 cannot run on 8 workers: 4 heads cannot go round 8 Ulysses ranks (ring_degree is for the "
        "rest); nearest that can: cfg_degree=2, ring_degree=1, ulysses_degree=4"
    ]
    assert list(tmp_path.iterdir()) == []


def test_every_wrong_flag_is_told_at_once(cli: Cli) -> None:
    wrong = ["--cfg-degree", "3", "--ring-degree", "0", "--pipesp-chunks", "many", "--num-inference-steps", "0"]
    ran = cli.generate("", "-o", "x.gif", "--num-workers", "0", *wrong)
    assert ran.code == 2
    degrees = ("cfg_degree=3", "ring_degree=0", "pipesp_chunks='many'", "num_workers=0")
    for part in (*degrees, "prompt is empty", "num_inference_steps=0"):
        assert sum(part in error for error in ran.errors) == 1, part


def test_guidance_groups_without_guidance_are_refused_for_that_prompt(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "guidance_scale": 1.0}\n')
    ran = cli.generate("--prompt-file", str(file), "-o", "x.gif", "--num-workers", "2", "--cfg-degree", "2")
    (error,) = ran.errors
    assert error.startswith(f"{file}:2: cfg_degree=2 cannot run on 2 workers: cfg_degree 2 needs guidance")
    ran = cli.generate("--prompt-file", str(file), "-o", "x.gif", "--num-workers", "2")
    assert ran.code == 0
    for config in ("cfg 2 x ring 1 x ulysses 1", "cfg 1 x ring 1 x ulysses 2, PipeSP auto"):
        assert f"2 workers: {config}" in ran.err


def test_a_worker_that_died_is_named_and_no_traceback_is_offered(cli: Cli) -> None:
    def die(_: Command) -> None:
        raise WorkerDiedError("exit code 7", rank=1, doing="denoising", output=("its last words",))

    ran = cli.generate("x", "-o", "x.gif", "--num-workers", "2", failing=die)
    assert (ran.code, ran.out) == (1, "")
    assert "error: worker 1 died while it was denoising (exit code 7)" in ran.err
    assert "its last words" in ran.err
    assert "hint:" not in ran.err


def test_why_workers_died_is_told_even_where_fresh_ones_cannot_start(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    deaths: list[WorkerDiedError] = []

    def start(*_: Any) -> tuple[Span, ...]:
        if deaths:
            raise PipeditError("there are no fresh workers")
        return ()

    def receive(*_: Any) -> NoReturn:
        deaths.append(WorkerDiedError("exit code 7", rank=1, doing="encoding"))
        raise deaths[-1]

    monkeypatch.setattr(SimulatedExecutor, "start", start)
    monkeypatch.setattr(SimulatedExecutor, "receive", receive)
    ran = cli.generate("one", "two", "-o", "x.gif", "--num-workers", "2", "--json")
    assert ran.code == 1
    messages = ["x-1.gif: worker 1 died while it was encoding (exit code 7)", "x-2.gif: there are no fresh workers"]
    assert ran.errors == messages
    assert ran.document["error"]["messages"] == messages


# -- who does what --------------------------------------------------------------------------------------------------

TWO_GROUPS = ("--denoise-workers", "2", "--decode-workers", "1", "--encode-on", "decode")


def test_two_groups_are_told_with_how_often_one_has_helped(cli: Cli) -> None:
    ran = cli.generate("x", "y", "-o", "x.gif", *TWO_GROUPS, "--aco", "on", "--guidance-scale", "1", "--json")
    assert ran.code == 0
    (told,) = (line for line in ran.err.splitlines() if line.startswith("3 workers: "))
    assert told.startswith("3 workers: 2 denoise, 1 encodes and decodes; idle decode workers helped with ")
    assert told.endswith(" of 6 steps")
    assert " 0 of 6" not in told
    assert "2 denoise workers: cfg 1 x ring 1 x ulysses 2, PipeSP auto\n" in ran.err
    assert ran.document["placement"] == {
        "num_workers": 3, "strategy": "disaggregated", "denoise_workers": 2, "decode_workers": 1,
        "encode_on": "decode", "aco": "on",
    }  # fmt: skip


def test_help_that_cannot_be_had_is_noted(cli: Cli) -> None:
    ran = cli.generate("x", "-o", "x.gif", *TWO_GROUPS, "--aco", "on")
    assert "note: aco=on changes nothing with cfg 2 x ring 1 x ulysses 1: both guidance groups need" in ran.err
    assert "idle decode workers helped with 0 of 3 steps\n" in ran.err
    ran = cli.generate("x", "-o", "y.gif", *TWO_GROUPS, "--aco", "off")
    assert "3 workers: 2 denoise, 1 encodes and decodes\n" in ran.err
    assert "note:" not in ran.err


def test_other_ways_of_colocated_workers_are_told(cli: Cli) -> None:
    ran = cli.generate("x", "-o", "x.gif", "--num-workers", "2", "--decode", "serial", "--json")
    assert ran.err.count("2 workers do everything, one decodes\n") == 2  # before, as what was chosen, and at the end
    placement = {"num_workers": 2, "strategy": "colocated", "decode": "serial", "offload": False}
    assert ran.document["placement"] == placement
    ran = cli.generate("x", "-o", "y.gif", "--num-workers", "2", "--strategy", "colocated")
    assert "do everything" not in ran.err


def test_a_split_is_chosen_where_only_the_strategy_is_given(cli: Cli) -> None:
    ran = cli.generate("x", "y", "-o", "x.gif", "--num-workers", "4", "--strategy", "disaggregated", "--json")
    placement = ran.document["placement"]
    assert placement["denoise_workers"] + placement["decode_workers"] == 4
    assert placement["encode_on"] in ("denoise", "decode")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-workers", "3", "--strategy", "disaggregated", "--offload"], "offload needs strategy colocated"),
        (["--num-workers", "2", "--denoise-workers", "2"], "denoise_workers=2 leaves none of 2 workers to decode"),
        (["--decode-workers", "1"], "disaggregated needs at least 2 workers"),
        (["--num-workers", "3", "--hardware", "nowhere.json"], "nowhere.json is not a device file"),
        (["--denoise-workers", "19", "--decode-workers", "1"], "denoise_workers=19 is too many: the request has 18"),
    ],
)
def test_groups_that_cannot_be_are_refused(cli: Cli, flags: list[str], said: str) -> None:
    ran = cli.generate("x", "-o", "x.gif", *flags)
    assert (ran.code, ran.out) == (2, "")
    (error,) = ran.errors
    assert said in error


def test_peak_memory_is_told_by_kind_of_worker() -> None:
    placement = Placement.disaggregated(denoise=2, decode=1, encoder=Role.DECODER)
    peaks = {0: 3 * GIB, 1: 4 * GIB, 2: 2 * GIB}
    assert peak_memory(peaks, placement.roles) == "peak memory: 4.0 GiB a denoiser; 2.0 GiB an encoder and decoder"
    assert peak_memory(peaks, Placement.colocated(3).roles) == "peak memory: 4.0 GiB a worker"
    serial = peak_memory({0: 2 * GIB, 1: GIB}, Placement.serial_decode(2).roles)
    assert serial == "peak memory: 2.0 GiB an encoder, denoiser and decoder; 1.0 GiB an encoder and denoiser"
    assert peak_memory({0: 0}, placement.roles) == ""


def result(**seconds: float) -> Result:
    request = VideoRequest(prompt="x", num_frames=9, width=48, height=32, num_inference_steps=3, seed=1, fps=8)
    job = Job(number=1, of=1, request=request, output="x.gif")
    whole = {"encode": 1.0, "denoise": 50.0, "decode": 40.0, "write": 1.0, **seconds}
    return Result(job=job, request=request, parallel=ParallelConfig(), seconds=whole, num_frames=9, size_bytes=1)


def test_bringing_weights_is_a_stage_where_it_takes_time(capsys: pytest.CaptureFixture[str]) -> None:
    for results, shown in (([result(onload=8.0)], True), ([result(onload=8.0), result()], True), ([result()], False)):
        Terminal().say(summarize(results, load_s=0.0, workers=Workers()))
        assert ("onload" in capsys.readouterr().err) is shown
    Terminal().say(summarize([result(fetch=0.1), result(fetch=0.1)], load_s=0.0, workers=Workers()))
    assert "fetch" not in capsys.readouterr().err, "too little for a column"


# -- doctor -------------------------------------------------------------------------------------------------------


def test_doctor_lists_every_way_and_what_would_be_chosen(cli: Cli) -> None:
    ran = cli("doctor", "--model", cli.model, "--num-workers", "6")
    assert ran.code == 0
    rows = {tuple(line.split()[:4]): line for line in ran.out.splitlines()}
    assert ("chosen", "2", "3", "1") in rows  # a ring of three loses less than four heads on three ranks
    for expected in (("ok", "2", "1", "3"), ("ok", "1", "2", "3"), ("ok", "1", "3", "2"), ("ok", "1", "6", "1")):
        assert expected in rows
    assert "4 heads cannot go round 6 Ulysses ranks" in rows["no", "1", "1", "6"]
    assert "67 %" in rows["ok", "2", "1", "3"]
    command = f"--model {cli.model} --num-workers 6 --cfg-degree 2 --ring-degree 3 --ulysses-degree 1"
    assert f'pipedit generate "PROMPT" {command}' in ran.out
    assert "on 6 workers (cpu)" in ran.out


def test_doctors_command_runs_as_it_stands(cli: Cli) -> None:
    line = cli("doctor", "--model", cli.model, "--num-workers", "6", "--json").document["degrees"]["command"]
    flags = line.split(cli.model)[1].split()
    assert "6 workers: cfg 2 x ring 3 x ulysses 1" in cli.generate("x", "-o", "x.gif", *flags).err


def test_doctors_table_as_json_and_without_the_models_files(cli: Cli) -> None:
    ran = cli("doctor", "--model", WAN_1B, "--num-gpus", "8", "--json")
    assert ran.code == 1  # its weights are not here
    degrees = ran.document["degrees"]
    assert (degrees["heads"], degrees["tokens"], degrees["uses_guidance"]) == (12, 32_760, True)
    (chosen,) = [row for row in degrees["combinations"] if row["chosen"]]
    assert (chosen["cfg_degree"], chosen["ring_degree"], chosen["ulysses_degree"]) == (2, 1, 4)
    (uneven,) = [row for row in degrees["combinations"] if row["ulysses_degree"] == 8]
    assert (uneven["legal"], uneven["balance"], uneven["reason"]) == (True, 0.75, "")
    assert "75 % efficient" in uneven["note"]


def test_doctor_tells_of_two_groups(cli: Cli) -> None:
    assert "--strategy disaggregated" in cli("doctor", "--model", cli.model, "--num-workers", "2").out
    assert "--strategy" not in cli("doctor", "--model", cli.model, "--num-workers", "1").out


def test_doctor_without_a_number_has_no_table(cli: Cli) -> None:
    assert "degrees" not in cli("doctor", "--model", cli.model, "--json").document
    assert "degrees" not in cli("doctor", "--model", "no-such-model", "--num-workers", "2", "--json").document


def test_doctor_says_what_no_machine_has(cli: Cli) -> None:
    assert cli("doctor", "--num-workers", "0").errors == ["num_workers=0 must be at least 1"]
    assert "use at most 1024" in cli("doctor", "--num-workers", "1025").errors[0]


def test_doctor_checks_devices_and_cores(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipedit.engine.settings.usable_cores", lambda: 1)
    checks = cli("doctor", "--model", cli.model, "--num-workers", "2", "--json").document["checks"]
    (workers,) = [check for check in checks if check["name"] == "workers"]
    assert (workers["status"], workers["found"]) == ("warn", "2 workers share 1 core")
