"""Short lines for logs, with a clock of our own."""

import pytest

from pipedit.cli.console import Terminal
from pipedit.cli.order import Job
from pipedit.cli.progress import Display, LineDisplay, make_display
from pipedit.core.request import VideoRequest
from pipedit.engine.updates import Progress


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def job(number: int = 1, of: int = 1) -> Job:
    request = VideoRequest(
        prompt="a\nred ball", num_frames=9, width=64, height=48, num_inference_steps=4, seed=7, fps=8
    )
    return Job(number=number, of=of, request=request, output="x.mp4")


def progress(stage: str, done: int, spent_s: float) -> Progress:
    total = {"encode": 1, "denoise": 4, "decode": 2}[stage]
    return Progress(request_id="request-1", stage=stage, done=done, total=total, spent_s=spent_s)


def test_a_line_for_each_stage_and_one_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    display = LineDisplay(Terminal(), clock)
    with display.loading("tiny"):
        clock.now_s = 2.0
    display.begin(job(), num_chunks=2)
    for stage, done, now_s, spent_s in [
        ("encode", 1, 3.0, 1.0),
        ("denoise", 1, 9.0, 5.0),
        ("denoise", 2, 15.0, 10.0),
        ("denoise", 3, 21.0, 15.0),
        ("denoise", 4, 27.0, 20.0),
        ("decode", 1, 27.5, 0.5),
        ("decode", 2, 28.0, 0.75),
    ]:
        clock.now_s = now_s
        display.progress(job(), progress(stage, done, spent_s))
    display.end(job())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "loading tiny",
        "loaded in 2.0 s",
        "a red ball · 9 frames of 64x48 · 4 steps · seed 7",
        "encode 1/1, took 1.0 s",
        "denoise 2/4, 10.0 s left",  # of work: what the workers do in between for other videos does not count
        "denoise 4/4, took 20.0 s",
        "decode 2/2, took 750 ms",
    ]


def test_several_videos_are_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    display = LineDisplay(Terminal(), Clock())
    display.begin(job(2, 3), num_chunks=2)
    display.progress(job(2, 3), progress("encode", 1, 0.0))
    assert capsys.readouterr().err.splitlines() == [
        "[2/3] a red ball · 9 frames of 64x48 · 4 steps · seed 7",
        "[2/3] encode 1/1, took 0 ms",
    ]


def test_the_display_fits_the_terminal() -> None:
    assert type(make_display(Terminal(quiet=True))) is Display
    assert type(make_display(Terminal())) is LineDisplay  # pytest captures: no terminal
