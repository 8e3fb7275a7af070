"""`pipedit generate` from the command line to the files, over the simulated executor; once over a real tiny model."""

import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipedit.cli.app import run
from pipedit.core import messages
from pipedit.media import read_frames, read_metadata
from pipedit.plan.trace_file import read_trace
from tests.cli.running import SMALL, Cli, lines, names_in

Failing = Callable[[messages.Command], None]


def at_chunk(chunk: int, act: Callable[[], None], *, request_id: str = "request-1") -> Failing:
    """Acts when the simulated worker gets the command to decode that chunk of that request."""

    def failing(command: messages.Command) -> None:
        if isinstance(command, messages.Decode) and (command.request_id, command.chunk) == (request_id, chunk):
            act()

    return failing


def interrupt() -> None:
    raise KeyboardInterrupt


def appearing(path: Path) -> Callable[[], None]:
    """Another run writes a file."""

    def write() -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text("of another run")

    return write


def fail() -> None:
    raise RuntimeError("no luck")


# -- what comes out -----------------------------------------------------------------------------------------------


def test_a_prompt_becomes_a_file_and_stdout_holds_its_path_alone(cli: Cli, tmp_path: Path) -> None:
    ran = cli.generate("a red ball", "-o", "ball.mp4", "--seed", "5")
    assert (ran.code, ran.out) == (0, "ball.mp4\n")
    assert read_frames("ball.mp4").shape == (9, 32, 48, 3)
    metadata = read_metadata("ball.mp4")
    assert (metadata.prompt, metadata.settings["seed"]) == ("a red ball", 5)
    for word in ("encode", "denoise", "decode", "write", "total", "seed 5", "wrote ball.mp4"):
        assert word in ran.err
    assert "\x1b" not in ran.out + ran.err
    assert names_in(tmp_path) == ["ball.mp4"]


@pytest.mark.parametrize("ending", [".gif", ".npy", ".png"])
def test_the_ending_decides_the_format(cli: Cli, ending: str) -> None:
    ran = cli.generate("x", "-o", f"clip{ending}")
    assert (ran.code, ran.paths) == (0, [f"clip{ending}"])
    assert read_frames(f"clip{ending}").shape == (9, 32, 48, 3)


def test_without_a_name_the_prompt_gives_it_and_nothing_is_replaced(cli: Cli) -> None:
    names = [cli.generate("A red ball, moving!").out.strip() for _ in range(2)]
    assert names == ["a-red-ball-moving.mp4", "a-red-ball-moving-2.mp4"]


def test_several_prompts_are_numbered(cli: Cli, tmp_path: Path) -> None:
    ran = cli.generate("one", "two", "-o", "out.gif")
    assert ran.paths == ["out-1.gif", "out-2.gif"]
    assert [read_metadata(path).prompt for path in ran.paths] == ["one", "two"]
    assert len({read_metadata(path).settings["seed"] for path in ran.paths}) == 2
    assert names_in(tmp_path) == ["out-1.gif", "out-2.gif"]


def test_placeholders_hold_number_and_seed(cli: Cli) -> None:
    assert cli.generate("one", "-o", "v{index}-{seed}.gif", "--seed", "7").paths == ["v1-7.gif"]
    assert cli.generate("a", "b", "-o", "{index}.gif", "--seed", "7").paths == ["1.gif", "2.gif"]


def test_json_is_one_document_with_everything(cli: Cli) -> None:
    ran = cli.generate("one", "two", "-o", "out.gif", "--seed", "3", "--json", "--trace", "t.json")
    assert ran.code == 0
    document = ran.document
    assert set(document) == {"model", "results", "load_s", "total_s", "trace", "placement", "peak_bytes"}
    assert [result["file"] for result in document["results"]] == ["out-1.gif", "out-2.gif"]
    result = document["results"][0]
    assert set(result) == {
        "file", "prompt", "seed", "settings", "parallel", "seconds", "total_s", "num_frames", "size_bytes",
    }  # fmt: skip
    assert set(result["seconds"]) == {"encode", "denoise", "decode", "write"}
    assert result["total_s"] == pytest.approx(sum(result["seconds"].values()))
    assert (result["prompt"], result["seed"], result["num_frames"]) == ("one", 3, 9)
    assert result["size_bytes"] == Path("out-1.gif").stat().st_size
    assert result["settings"]["num_inference_steps"] == 3


def test_quiet_says_nothing_on_stderr(cli: Cli) -> None:
    ran = cli.generate("x", "-o", "x.gif", "-q")
    assert (ran.code, ran.out, ran.err) == (0, "x.gif\n", "")
    assert cli.generate("x", "-o", "x.gif", "-q").err.startswith("error: x.gif exists")


def test_the_trace_holds_the_work_and_the_writing(cli: Cli) -> None:
    cli.generate("a red ball", "-o", "x.gif", "--trace", "t.json")
    timeline = read_trace("t.json")
    assert {span.what for span in timeline.spans} == {"encode", "step", "decode", "write"}
    assert {span.rank for span in timeline.spans if span.what == "write"} == {-1}
    assert timeline.metadata["title"] == "a red ball"


def test_colours_can_be_forced_on_a_pipe_but_bars_cannot(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    ran = cli.generate("x", "-o", "x.gif")
    assert ran.out == "x.gif\n"
    assert "\x1b[1m" in ran.err  # bold
    assert "\x1b[?25l" not in ran.err  # a hidden cursor, which bars need
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in cli.generate("", "-o", "y.gif").err  # a colour


def test_words_without_quotes_are_pointed_out(cli: Cli) -> None:
    assert "put quotes" in cli.generate("a", "red", "ball", "-o", "{index}.gif").err
    assert "put quotes" not in cli.generate("a red ball", "b", "c", "-o", "x{index}.gif").err


# -- wrong input --------------------------------------------------------------------------------------------------


def test_everything_wrong_comes_in_one_report(cli: Cli, tmp_path: Path) -> None:
    file = lines(tmp_path / "p.jsonl", ['{"prompt": "x", "num_frame": 9}', "{", '{"prompt": "y", "seed": -1}'])
    arguments = ["--prompt-file", file, "--like", "gone.mp4", "--num-frames", "10", "--height", "33", "--dtype", "int3"]
    more = ["--num-inference-steps", "-2", "--num-workers", "2", "--ulysses-degree", "3"]
    files = ["-o", "gone/x.mp5", "--trace", "gone/t.json"]
    ran = cli("generate", "", "--model", cli.model, *arguments, *more, *files)
    assert (ran.code, ran.out) == (2, "")
    expected = (
        "gone.mp4 does not exist",
        f"{file}:1: unknown setting num_frame; did you mean num_frames?",
        f"{file}:2: not JSON",
        "int3",
        "3 does not divide 2",
        "prompt 1: the prompt is empty",
        f"{file}:3: seed=-1",
        "num_frames=10 is not 4n+1; the nearest are 9 and 13",
        "height=33",
        "num_inference_steps=-2",
        "cannot write gone/x.mp5",
        "the folder gone does not exist",
    )
    for part in expected:
        assert sum(part in error for error in ran.errors) == 1, part
    assert names_in(tmp_path) == ["p.jsonl"]


def test_an_unknown_model_hides_no_other_problem(cli: Cli) -> None:
    ran = cli("generate", " ", "--model", "tinny", "--seed", "-1", "--fps", "0", "-o", "x.mp5", "--device", "tpu")
    assert ran.code == 2
    for part in ("did you mean tiny?", "prompt is empty", "seed=-1", "fps=0", "x.mp5", "tpu"):
        assert any(part in error for error in ran.errors), part


def test_wrong_input_with_json_is_a_document_too(cli: Cli) -> None:
    ran = cli.generate("", "--json", "-o", "x.mp5")
    assert ran.code == 2
    assert set(ran.document) == {"error"}
    error = ran.document["error"]
    assert (error["kind"], error["exit_code"]) == ("bad_input", 2)
    assert error["messages"] == ran.errors
    assert len(ran.errors) == 2


def test_what_is_wrong_with_every_prompt_is_said_once(cli: Cli) -> None:
    ran = cli.generate("one", "two", "three", "--num-frames", "10", "-o", "gone/x.mp4")
    assert ran.errors == [
        "num_frames=10 is not 4n+1; the nearest are 9 and 13",
        "the folder gone does not exist; create it or choose another",
    ]


def test_bytes_that_are_no_text_are_wrong_input(cli: Cli) -> None:
    ran = cli.generate("a \udcff ball", "-o", "x\udcff.mp4", "--negative-prompt", "\udcff")
    assert (ran.code, len(ran.errors)) == (2, 3)


def test_no_prompt_is_an_error(cli: Cli) -> None:
    ran = cli.generate()
    assert ran.code == 2
    assert ran.errors == ["there is no prompt; give one in quotes, or use --prompt-file"]


def test_files_that_exist_are_replaced_on_request_only(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "x.gif").write_text("dear to me")
    (tmp_path / "t.json").write_text("dear too")
    ran = cli.generate("x", "-o", "x.gif", "--trace", "t.json")
    assert ran.code == 2
    assert [error.split(";")[0] for error in ran.errors] == ["x.gif exists", "t.json exists"]
    assert (tmp_path / "x.gif").read_text() == "dear to me"
    assert cli.generate("x", "-o", "x.gif", "--trace", "t.json", "--overwrite").code == 0
    assert len(read_frames("x.gif")) == 9


def test_a_name_from_the_prompt_that_is_taken_meanwhile_gets_the_next_number(cli: Cli, tmp_path: Path) -> None:
    other = at_chunk(2, appearing(tmp_path / "a-ball.mp4"))
    ran = cli.generate("a ball", "--json", failing=other)
    assert (ran.code, ran.document["results"][0]["file"]) == (0, "a-ball-2.mp4")
    assert (tmp_path / "a-ball.mp4").read_text() == "of another run"
    assert len(read_frames("a-ball-2.mp4")) == 9
    assert names_in(tmp_path) == ["a-ball-2.mp4", "a-ball.mp4"]


@pytest.mark.parametrize(
    ("output", "taken", "kept"),
    [("x.gif", "x.gif", "x-2.gif"), ("x.npy", "x.npy.json", "x-2.npy"), ("f/", "f/frame_0003.png", "f-2/")],
)
def test_a_chosen_name_that_is_taken_meanwhile_is_an_error_and_nothing_is_lost(
    cli: Cli, tmp_path: Path, output: str, taken: str, kept: str
) -> None:
    ran = cli.generate("a ball", "-o", output, failing=at_chunk(2, appearing(tmp_path / taken)))
    assert (ran.code, ran.out) == (1, "")
    assert ran.errors == [f"{output} appeared while the video was made and is left as it was; the video is in {kept}"]
    assert (tmp_path / taken).read_text() == "of another run"
    assert read_metadata(kept).prompt == "a ball"
    assert len(read_frames(kept)) == 9
    assert not any("partial" in name for name in names_in(tmp_path))


def test_overwrite_replaces_what_appears_meanwhile_too(cli: Cli, tmp_path: Path) -> None:
    other = at_chunk(2, appearing(tmp_path / "x.gif"))
    assert cli.generate("a ball", "-o", "x.gif", "--overwrite", failing=other).paths == ["x.gif"]
    assert names_in(tmp_path) == ["x.gif"]


def test_two_videos_cannot_have_one_name(cli: Cli) -> None:
    ran = cli.generate("a", "b", "-o", "{seed}.gif", "--seed", "1", "--trace", "1.gif")
    assert ran.code == 2
    assert "prompts 1 and 2 would be written to the same file 1.gif; put {index} into the name" in ran.errors
    assert any("already the name of a video" in error for error in ran.errors)


def test_too_little_memory_is_predicted(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipedit.engine.fitting.available_bytes", lambda _device: 1_500_000)
    ran = cli.generate("x", "-o", "x.gif", "--json")
    assert ran.code == 1
    assert ran.document["error"]["kind"] == "memory"
    assert "need about" in ran.errors[0]


# -- failure and interruption -------------------------------------------------------------------------------------


def test_the_check_for_half_written_files_can_fail(cli: Cli, tmp_path: Path) -> None:
    seen: list[str] = []
    cli.generate("x", "-o", "x.gif", failing=at_chunk(2, lambda: seen.extend(names_in(tmp_path))))
    assert any("partial" in name for name in seen)


@pytest.mark.parametrize("ending", [".mp4", ".gif", ".npy", ".png"])
def test_ctrl_c_leaves_nothing_half_written(cli: Cli, tmp_path: Path, ending: str) -> None:
    ran = cli.generate("x", "-o", f"x{ending}", failing=at_chunk(2, interrupt))
    assert (ran.code, ran.out) == (130, "")
    assert ran.errors == ["interrupted"]
    assert "Traceback" not in ran.err
    assert names_in(tmp_path) == []


def test_ctrl_c_keeps_the_videos_that_are_whole(cli: Cli, tmp_path: Path) -> None:
    stop = at_chunk(1, interrupt, request_id="request-2")
    ran = cli.generate("one", "two", "-o", "x.gif", "--json", "--trace", "t.json", failing=stop)
    assert ran.code == 130
    assert [result["prompt"] for result in ran.document["results"]] == ["one"]
    assert ran.document["error"]["kind"] == "interrupted"
    assert names_in(tmp_path) == ["x-1.gif"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_like_ctrl_c(cli: Cli, tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    ran = cli.generate("x", "-o", "x.mp4", failing=at_chunk(2, lambda: signal.raise_signal(number)))
    assert ran.code == 128 + number
    assert ran.errors == [f"stopped by {number.name}"]
    assert names_in(tmp_path) == []
    assert signal.getsignal(number) is before


def test_one_failure_does_not_stop_the_others(cli: Cli, tmp_path: Path) -> None:
    ran = cli.generate("one", "two", "-o", "x.gif", "--json", failing=at_chunk(2, fail))
    assert ran.code == 1
    assert [result["file"] for result in ran.document["results"]] == ["x-2.gif"]
    assert ran.errors == ["x-1.gif: RuntimeError: no luck"]
    assert ran.document["error"]["messages"] == ran.errors
    assert names_in(tmp_path) == ["x-2.gif"]


def test_the_traceback_is_shown_on_request(cli: Cli) -> None:
    ran = cli.generate("x", "-o", "x.gif", failing=at_chunk(1, fail))
    assert (ran.code, "Traceback" in ran.err, "hint: pipedit --debug" in ran.err) == (1, False, True)
    ran = cli("--debug", "generate", "x", "-m", cli.model, *SMALL, "-o", "x.gif", failing=at_chunk(1, fail))
    assert (ran.code, "Traceback" in ran.err) == (1, True)


def test_a_disk_that_refuses_is_an_error_of_that_file(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    ran = cli.generate("x", "-o", "out/x.npy", failing=at_chunk(2, lambda: shutil.rmtree(folder)))
    assert ran.code == 1
    assert ran.errors[0].startswith("out/x.npy could not be written: ")
    assert names_in(tmp_path) == []


# -- prompts from elsewhere ---------------------------------------------------------------------------------------


def test_prompts_come_from_a_file(cli: Cli, tmp_path: Path) -> None:
    file = lines(tmp_path / "p.txt", ["a red ball", "", "  a blue square "])
    ran = cli.generate("first", "--prompt-file", file, "-o", "{index}.gif")
    assert [read_metadata(path).prompt for path in ran.paths] == ["first", "a red ball", "a blue square"]


def test_prompts_come_from_stdin(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert cli.generate("--prompt-file", "-", "-o", "x.gif").paths == ["x-1.gif", "x-2.gif"]


def test_json_lines_bring_settings_and_outputs_and_flags_win(cli: Cli, tmp_path: Path) -> None:
    wishes = [{"prompt": "a", "seed": 1, "output": "mine.gif"}, {"prompt": "b", "num_inference_steps": 50, "fps": 5}]
    file = lines(tmp_path / "p.jsonl", map(json.dumps, wishes))
    ran = cli.generate("--prompt-file", file, "-o", "x.gif")
    assert ran.paths == ["mine.gif", "x-2.gif"]
    first, second = (read_metadata(path).settings for path in ran.paths)
    assert first["seed"] == 1
    assert (second["num_inference_steps"], second["fps"]) == (3, 5)  # SMALL asks for 3 steps


def test_like_makes_the_same_again_and_flags_win(cli: Cli) -> None:
    cli.generate("a red ball", "-o", "a.gif", "--guidance-scale", "2.5", "--dtype", "bfloat16", "--fps", "5")
    made = read_metadata("a.gif")
    ran = cli("generate", "--like", "a.gif", "-o", "b.gif")
    assert (ran.code, ran.paths) == (0, ["b.gif"])
    again = read_metadata("b.gif")
    assert (again.prompt, again.model, again.settings) == (made.prompt, made.model, made.settings)
    assert again.extra["dtype"] == made.extra["dtype"]
    cli("generate", "another", "--like", "a.gif", "--seed", "9", "--dtype", "float32", "-o", "c.gif")
    other = read_metadata("c.gif")
    assert (other.prompt, other.settings) == ("another", {**made.settings, "seed": 9})
    assert other.extra["dtype"] != made.extra["dtype"]


def test_like_says_when_pixels_will_differ(cli: Cli) -> None:
    cli.generate("a red ball", "-o", "a.gif", "--dtype", "bfloat16")
    assert "note: a.gif was made in" in cli("generate", "--like", "a.gif", "--dtype", "float32", "-o", "b.gif").err
    assert "note:" not in cli("generate", "--like", "a.gif", "-o", "c.gif").err


# -- for real -----------------------------------------------------------------------------------------------------


def test_a_real_model_goes_the_same_way(
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(tiny_folder("wan"))
    monkeypatch.chdir(tmp_path)
    assert run(["generate", "a red ball", "--model", model, *SMALL, "-o", "a.npy", "--trace", "t.json", "-q"]) == 0
    assert run(["generate", "--like", "a.npy", "-o", "b.npy", "-q"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a.npy\nb.npy\n", "")
    np.testing.assert_array_equal(read_frames("a.npy"), read_frames("b.npy"))
    assert read_frames("a.npy").std() > 0
    assert {span.what for span in read_trace("t.json").spans} == {"load", "encode", "step", "decode", "write"}
