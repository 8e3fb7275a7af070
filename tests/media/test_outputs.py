"""Every way in which a path can be wrong is said before any work."""

import os
from pathlib import Path

import numpy as np
import pytest

from pipedit.media import check_output, check_picture, files_of, numbered, open_writer


@pytest.mark.parametrize(
    "name", ["a.mp4", "a.MP4", "a.gif", "a.npy", "a.png", "a_%04d.png", "a_%d.png", "100%.png", "new/"]
)
def test_good_paths(tmp_path: Path, name: str) -> None:
    assert check_output(f"{tmp_path}/{name}") == []
    assert list(tmp_path.iterdir()) == []


def test_unknown_endings_list_the_known(tmp_path: Path) -> None:
    (problem,) = check_output(tmp_path / "out.avi")
    assert "the ending .avi is not known; use .mp4, .gif, .npy, .png, or a folder/" in problem
    (problem,) = check_output(tmp_path / "out")
    assert "it has no ending; use .mp4" in problem
    assert len(check_output("")) == 1


def test_all_problems_come_together(tmp_path: Path) -> None:
    ending, folder = check_output(tmp_path / "missing" / "out.webm")
    assert ".webm" in ending
    assert f"the folder {tmp_path}/missing does not exist" in folder


def test_folders_are_no_files(tmp_path: Path) -> None:
    (problem,) = check_output(tmp_path)
    assert f"{tmp_path} is a folder; write {tmp_path}/ for PNG frames in it" in problem
    (tmp_path / "clip.mp4").mkdir()
    assert "is a folder" in check_output(tmp_path / "clip.mp4")[0]


def test_files_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (f"{tmp_path}/file/out.mp4", f"{tmp_path}/file/", f"{tmp_path}/file/frames/"):
        (problem,) = check_output(path)
        assert "is a file" in problem


def test_folder_of_the_frame_folder_must_exist(tmp_path: Path) -> None:
    (problem,) = check_output(f"{tmp_path}/missing/frames/")
    assert f"the folder {tmp_path}/missing does not exist" in problem


@pytest.mark.parametrize("name", ["out.mp4", "frames/", "f%d.png"])
def test_unwritable_folders(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != tmp_path)  # root may write anywhere
    (problem,) = check_output(f"{tmp_path}/{name}")
    assert f"the folder {tmp_path} is not writable" in problem


def test_names_that_are_too_long(tmp_path: Path) -> None:
    (problem,) = check_output(tmp_path / ("x" * 300 + ".mp4"))
    assert "too long" in problem


@pytest.mark.parametrize(("ending", "written"), [(".npy", ".npy.json"), (".png", "_0004.png"), (".mp4", None)])
def test_the_names_that_are_truly_written_count(tmp_path: Path, ending: str, written: str | None) -> None:
    problems = check_output(tmp_path / ("x" * (255 - len(ending)) + ending), num_frames=5)
    assert [f"{written} is too long" in problem for problem in problems] == ([True] if written else [])


@pytest.mark.parametrize(("name", "said"), [("a\0.mp4", "NUL"), ("a\udcff.npy", "UTF-8"), ("\0/", "NUL")])
def test_names_that_are_no_text(name: str, said: str) -> None:
    (problem,) = check_output(name)
    assert said in problem


def test_a_path_object_is_told_how_folders_are_named(tmp_path: Path) -> None:
    assert "a Path drops the slash" in check_output(tmp_path / "frames")[0]
    assert "a Path drops the slash" not in check_output(f"{tmp_path}/frames")[0]


def test_numbered_names_have_room() -> None:
    assert [numbered(name, 2) for name in ("a/b.mp4", "a/b/", "f_%04d.png")] == ["a/b-2.mp4", "a/b-2/", "f_%04d-2.png"]
    for ending in (".mp4", ".npy", ".png", "/"):
        name = numbered("x" * (255 - len(ending)) + ending, 10)
        assert name.endswith(f"-10{ending}")
        assert all(len(file.name) <= 255 for file in (Path(name), *files_of(name, 3)))


def test_two_counters(tmp_path: Path) -> None:
    (problem,) = check_output(tmp_path / "%d_%04d.png")
    assert "more than one frame counter" in problem


def test_sizes_and_speed_that_a_format_lacks(tmp_path: Path) -> None:
    assert "even width and height, not 33 x 64" in check_output(tmp_path / "a.mp4", width=33, height=64)[0]
    assert check_output(tmp_path / "a.gif", width=33, height=64, fps=50) == []
    assert "more than 50 frames per second, 60 were asked for" in check_output(tmp_path / "a.gif", fps=60)[0]
    assert "less than 0.002 frames per second" in check_output(tmp_path / "a.gif", fps=0.001)[0]
    for fps in (1e-5, 1e9, float("inf"), float("nan")):
        assert "0.001 to 100000 frames per second" in check_output(tmp_path / "a.mp4", fps=fps)[0]
        assert check_output(tmp_path / "a.npy", fps=fps) == []


@pytest.mark.parametrize("name", ["clip.png", "frames/"])
def test_frames_of_a_longer_clip_would_stay(tmp_path: Path, name: str) -> None:
    with open_writer(f"{tmp_path}/{name}", width=4, height=4, fps=8) as writer:
        writer.write(np.zeros((5, 4, 4, 3), np.uint8))
    assert check_output(f"{tmp_path}/{name}", num_frames=5) == []
    (problem,) = check_output(f"{tmp_path}/{name}", num_frames=3)
    assert "frames of a longer clip" in problem
    assert "_0003.png to " in problem
    assert "_0004.png" in problem


def test_pictures(tmp_path: Path) -> None:
    assert check_picture(tmp_path / "a.svg") == check_picture(tmp_path / "a.PNG") == []
    ending, folder = check_picture(tmp_path / "missing" / "a.pdf")
    assert "must be .svg or .png" in ending
    assert "does not exist" in folder
