"""Prompt files and names of outputs: pure functions."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipedit.cli.outputs import file_problems, name_outputs, output_files, output_problems, slug
from pipedit.cli.prompts import Wish, dtype_of, gather_wishes, labels_of
from pipedit.core.request import VideoRequest
from pipedit.media import VideoMetadata
from tests.cli.running import lines


def named(pattern: str | None, count: int) -> list[str]:
    requests = [VideoRequest(prompt="a red ball", seed=40 + n) for n in range(1, count + 1)]
    return name_outputs(pattern, requests, [None] * count, overwrite=False)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red ball, moving!", "a-red-ball-moving"),
        ("ein roter Ball fällt", "ein-roter-ball-fällt"),
        ("红球向右移动", "红球向右移动"),
        ("../../etc/passwd", "etc-passwd"),
        ("🎉", "video"),
        ("", "video"),
        ("word " * 40, "-".join(["word"] * 12)),
        ("x" * 300, "x" * 60),
    ],
)
def test_a_prompt_gives_a_name(prompt: str, name: str) -> None:
    assert slug(prompt) == name


@given(st.text())
def test_any_prompt_gives_a_name_that_a_file_can_have(prompt: str) -> None:
    name = slug(prompt)
    assert 0 < len(name.encode("utf-8", "surrogatepass")) <= 245
    assert not set(name) & set("/\\\0.")


@pytest.mark.parametrize(
    ("pattern", "count", "names"),
    [
        ("out.mp4", 1, ["out.mp4"]),
        ("out.mp4", 2, ["out-1.mp4", "out-2.mp4"]),
        ("a.b/out", 2, ["a.b/out-1", "a.b/out-2"]),
        ("frames/", 2, ["frames-1/", "frames-2/"]),
        ("{index}_{seed}.mp4", 2, ["1_41.mp4", "2_42.mp4"]),
        ("{seed}.mp4", 1, ["41.mp4"]),
        ("{other}.mp4", 2, ["{other}-1.mp4", "{other}-2.mp4"]),
    ],
)
def test_patterns(pattern: str, count: int, names: list[str]) -> None:
    assert named(pattern, count) == names


def test_names_from_prompts_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-red-ball.mp4").touch()
    assert named(None, 2) == ["a-red-ball-2.mp4", "a-red-ball-3.mp4"]


def test_frames_that_exist_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "f_0000.png").touch()
    request = VideoRequest(prompt="x", width=16, height=16, num_frames=5, fps=8)
    target = str(tmp_path / "f_%04d.png")
    (problem,) = output_problems([target], [request], pattern=target, overwrite=False)
    assert problem.startswith(f"{tmp_path}/f_0000.png exists")
    assert output_problems([target], [request], pattern=target, overwrite=True) == []


def test_many_files_that_exist_are_one_sentence(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{n}.gif") for n in range(5)]
    for name in names:
        Path(name).touch()
    (problem,) = output_problems(names, [VideoRequest(prompt="x")] * 5, pattern=None, overwrite=False)
    assert "2.gif and 2 more exist" in problem


def test_sizes_that_a_format_cannot_hold_are_problems() -> None:
    request = VideoRequest(prompt="x", width=17, height=16, num_frames=5, fps=8)
    (problem,) = output_problems(["x.mp4"], [request], pattern=None, overwrite=False)
    assert "even" in problem
    endless = VideoRequest(prompt="x", fps=10**400, num_frames=10**400)  # what JSON may hold
    assert output_problems(["x.mp4", "x.png"], [endless] * 2, pattern=None, overwrite=False) == []


def test_a_trace_needs_a_place_of_its_own(tmp_path: Path) -> None:
    assert file_problems(str(tmp_path / "t.json"), overwrite=False) == []
    assert "does not exist" in file_problems(str(tmp_path / "gone" / "t.json"), overwrite=False)[0]
    for output, trace in (("x.npy", "x.npy.json"), ("f.png", "f_0003.png"), ("x.mp4", "../{}/x.mp4")):
        request = VideoRequest(prompt="x", num_frames=5)
        taken = output_files(f"{tmp_path}/{output}", request)
        path = f"{tmp_path}/{trace.format(tmp_path.name)}"
        assert "name of a video" in file_problems(path, overwrite=True, taken=taken)[0]
        assert file_problems(f"{tmp_path}/other.json", overwrite=True, taken=taken) == []


def test_everything_that_a_name_stands_for_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "k.npy.json").write_text("dear to me")
    (problem,) = output_problems([f"{tmp_path}/k.npy"], [VideoRequest(prompt="x")], pattern=None, overwrite=False)
    assert problem.startswith(f"{tmp_path}/k.npy.json exists")
    requests = [VideoRequest(prompt="x", num_frames=3, fps=8)] * 2
    names = [f"{tmp_path}/a.png", f"{tmp_path}/a_%04d.png"]
    (problem,) = output_problems(names, requests, pattern=None, overwrite=False)
    assert "prompts 1 and 2 would be written to the same file" in problem
    assert "a_0000.png" in problem
    names[1] = f"{tmp_path}/b_%04d.png"
    assert output_problems(names, requests, pattern=None, overwrite=False) == []


@pytest.mark.parametrize(("name", "said"), [("a\0.mp4", "NUL character"), ("a\udcff.mp4", "not valid UTF-8")])
def test_names_that_no_file_can_have_are_sentences(name: str, said: str) -> None:
    (problem,) = output_problems([name], [VideoRequest(prompt="x")], pattern=None, overwrite=False)
    assert said in problem
    problem.encode("utf-8")
    assert said in file_problems(name, overwrite=False)[0]


def test_names_from_prompts_keep_away_from_chosen_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    requests = [VideoRequest(prompt="a red ball")] * 2
    names = name_outputs(None, requests, [None, "a-red-ball.mp4"], overwrite=False)
    assert names == ["a-red-ball-2.mp4", "a-red-ball.mp4"]


# -- prompt files -------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_prompt_file_names_the_line(tmp_path: Path) -> None:
    content = ['{"prompt": 3}', "[]", '{"seed": 1}', '{"prompt": "x", "sed": 1}', '{"prompt": "good"}', "{"]
    file = lines(tmp_path / "p.jsonl", content)
    wishes, problems = gather_wishes([], file, None)
    assert [wish.prompt for wish in wishes] == ["good"]
    assert [problem.removeprefix(f"{file}:").split(":")[0] for problem in problems] == ["1", "2", "3", "4", "6"]
    assert "did you mean seed?" in problems[3]


def test_prompt_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "list.json").write_text('["a red ball"]')
    (tmp_path / "digits.jsonl").write_text('{"prompt": "x", "seed": ' + "9" * 5000 + "}")
    (tmp_path / "deep.jsonl").write_text('{"prompt": ' + "[" * 100_000 + "}")
    odd = {"digits.jsonl": "thousands of digits", "deep.jsonl": "nested too deeply"}
    cases = {
        **odd,
        "gone.txt": "cannot be read",
        "latin.txt": "UTF-8",
        "empty.txt": "holds no prompt",
        "list.json": ".jsonl",
    }
    for name, said in cases.items():
        wishes, (problem,) = gather_wishes([], str(tmp_path / name), None)
        assert wishes == []
        assert said in problem


def test_a_byte_order_mark_belongs_to_no_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa ball\r\nanother\r\n")
    wishes, _ = gather_wishes([], str(tmp_path / "p.txt"), None)
    assert [wish.prompt for wish in wishes] == ["a ball", "another"]


def test_later_sources_win() -> None:
    wish = Wish(prompt="x", settings={"seed": 2, "fps": 2})
    request = wish.request({"seed": 1, "fps": 1, "height": 1}, {"seed": 3})
    assert (request.seed, request.fps, request.height) == (3, 2, 1)


def test_labels() -> None:
    assert labels_of([Wish(prompt="x")]) == [""]
    assert labels_of([Wish(prompt="x", source="p.txt:1")]) == ["p.txt:1"]
    assert labels_of([Wish(prompt="x"), Wish(prompt="x", source="p.txt:1")]) == ["prompt 1", "p.txt:1"]


@pytest.mark.parametrize(
    ("parts", "dtype"),
    [
        ({"transformer": "bfloat16", "vae": "bfloat16"}, "bfloat16"),
        ({"transformer": "bfloat16", "vae": "float32"}, "auto"),
        ({}, "auto"),
        ("odd", "auto"),
    ],
)
def test_the_dtype_flag_of_a_file(parts: object, dtype: str) -> None:
    assert dtype_of(VideoMetadata(prompt="x", model="tiny", extra={"dtype": parts})) == dtype


def test_a_closed_stdin_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    _, (problem,) = gather_wishes([], "-", None)
    assert problem == "the prompt file - cannot be read: stdin is closed"
