"""What is written can be read again, in chunks of any size; what is interrupted leaves nothing behind."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipedit.core.errors import InvalidRequestError
from pipedit.media import Frames, VideoMetadata, numbered, open_writer, read_frames
from pipedit.media.lossless import NpyWriter

TARGETS = ("clip.mp4", "clip.gif", "clip.npy", "clip.png", "f%03d.png", "frames/")
METADATA = VideoMetadata(prompt="a red ball", model="tiny", settings={"seed": 3})


def moving_square(num_frames: int = 9, height: int = 32, width: int = 48) -> Frames:
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = (230, 200, 30)
    for index in range(num_frames):
        frames[index, 8:24, 2 * index : 2 * index + 16] = (20, 60, 200)
    return frames


def write(path: str, frames: Frames, *, chunk: int = 4, metadata: VideoMetadata | None = None, fps: float = 8) -> None:
    _, height, width, _ = frames.shape
    with open_writer(path, width=width, height=height, fps=fps, metadata=metadata) as writer:
        for start in range(0, len(frames), chunk):
            writer.write(frames[start : start + chunk])


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("target", TARGETS)
def test_chunked_clip_comes_back(tmp_path: Path, target: str) -> None:
    frames = moving_square()
    write(f"{tmp_path}/{target}", frames)
    back = read_frames(f"{tmp_path}/{target}")
    assert back.shape == frames.shape
    assert back.dtype == np.uint8
    error = np.abs(back.astype(int) - frames)
    if target == "clip.mp4":  # lossy: flat areas within 2 levels, edges softened by the halved chroma
        assert error[:, :6].max() <= 2
        assert error.mean() < 3
    else:
        assert error.max() == 0
    assert not [name for name in everything_in(tmp_path) if "partial" in name]


@pytest.mark.parametrize("target", ["clip.mp4", "clip.gif", "clip.npy"])
@pytest.mark.parametrize("chunk", [1, 9])
def test_chunks_do_not_show(tmp_path: Path, target: str, chunk: int) -> None:
    write(f"{tmp_path}/{target}", moving_square(), chunk=chunk, metadata=METADATA)
    first = (tmp_path / target).read_bytes()
    write(f"{tmp_path}/{target}", moving_square(), chunk=4, metadata=METADATA)
    assert (tmp_path / target).read_bytes() == first


def test_frame_names(tmp_path: Path) -> None:
    for target in ("clip.png", "f%03d.png", "frames/"):
        write(f"{tmp_path}/{target}", moving_square(2))
    names = ["clip_0000.png", "clip_0001.png", "f000.png", "f001.png"]
    assert everything_in(tmp_path) == [*names, "frames", "frames/frame_0000.png", "frames/frame_0001.png"]


def test_paths_are_told(tmp_path: Path) -> None:
    with open_writer(f"{tmp_path}/out/", width=48, height=32, fps=8) as writer:
        writer.write(moving_square(2))
    assert [path.name for path in writer.paths] == ["frame_0000.png", "frame_0001.png"]
    assert all(path.is_file() for path in writer.paths)


@pytest.mark.parametrize("fps", [8, 16, 23.976, 7.5])
def test_mp4_plays_at_the_asked_speed(tmp_path: Path, fps: float) -> None:
    write(f"{tmp_path}/clip.mp4", moving_square(), fps=fps)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == pytest.approx(fps, rel=1e-4)
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.colorspace == 1  # BT.709
    content = (tmp_path / "clip.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_gif_plays_at_the_asked_speed(tmp_path: Path) -> None:
    write(f"{tmp_path}/clip.gif", moving_square(17), fps=16, metadata=METADATA)
    with Image.open(tmp_path / "clip.gif") as image:
        durations_ms = []
        for index in range(image.n_frames):  # type: ignore[attr-defined]
            image.seek(index)
            durations_ms.append(image.info["duration"])
        assert len(durations_ms) == 17
        assert sum(durations_ms) == pytest.approx(17 * 1000 / 16, abs=10)
        assert image.info["loop"] == 0


def test_an_older_output_is_replaced(tmp_path: Path) -> None:
    for target in ("clip.npy", "clip.mp4", "clip.png"):
        write(f"{tmp_path}/{target}", moving_square(3))
        write(f"{tmp_path}/{target}", moving_square(5))
        assert len(read_frames(f"{tmp_path}/{target}")) == 5


# -- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("target", TARGETS)
def test_interrupt_leaves_nothing(tmp_path: Path, target: str, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with open_writer(f"{tmp_path}/{target}", width=48, height=32, fps=8, metadata=METADATA) as writer:
            writer.write(moving_square(4))
            assert everything_in(tmp_path), "nothing was staged: the test proves nothing"
            raise error

    with pytest.raises(error):
        interrupted()
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("target", TARGETS)
def test_interrupt_keeps_the_older_output(tmp_path: Path, target: str) -> None:
    write(f"{tmp_path}/{target}", moving_square(), metadata=METADATA)
    before = everything_in(tmp_path)
    writer = open_writer(f"{tmp_path}/{target}", width=48, height=32, fps=8)
    writer.write(moving_square(4))
    writer.abort()
    writer.abort()
    assert everything_in(tmp_path) == before
    assert len(read_frames(f"{tmp_path}/{target}")) == 9


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # it is unclosed: that is what is tested
@pytest.mark.parametrize("target", TARGETS)
def test_a_writer_that_is_dropped_cleans_up(tmp_path: Path, target: str) -> None:
    writer = open_writer(f"{tmp_path}/{target}", width=48, height=32, fps=8)
    writer.write(moving_square(4))
    del writer
    assert everything_in(tmp_path) == []


def test_a_signal_without_any_care_leaves_nothing(tmp_path: Path) -> None:
    program = f"""
import os, signal, numpy as np
from pipedit.media import open_writer
writer = open_writer({str(tmp_path / "clip.mp4")!r}, width=32, height=32, fps=8)
writer.write(np.zeros((3, 32, 32, 3), np.uint8))
assert os.listdir({str(tmp_path)!r})
os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert b"KeyboardInterrupt" in done.stderr
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("target", ["clip.mp4", "clip.gif", "clip.npy", "clip.png"])
def test_frames_leave_memory_before_the_end(tmp_path: Path, target: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 64, 64, 3), np.uint8)
    writer = open_writer(tmp_path / target, width=64, height=64, fps=8)
    writer.write(noise)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(sizes) > 200_000  # with all frames held back there would be nothing, or a header
    writer.abort()


@pytest.mark.parametrize("target", ["clip.png", "frames/", "clip.npy"])
def test_interrupt_while_moving_leaves_nothing(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_writer(f"{tmp_path}/{target}", width=48, height=32, fps=8, metadata=METADATA)
    writer.write(moving_square(4))
    monkeypatch.setattr("os.replace", interrupt_at_second_call())
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    assert everything_in(tmp_path) == []


def interrupt_at_second_call() -> Callable[[Path, Path], None]:
    """In place of os.replace."""
    calls: list[Path] = []

    def move(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        os.rename(source, target)

    return move


def test_interrupt_while_replacing_brings_the_old_files_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(f"{tmp_path}/clip.png", moving_square(3))
    old = [(tmp_path / name).read_bytes() for name in everything_in(tmp_path)]
    writer = open_writer(f"{tmp_path}/clip.png", width=48, height=32, fps=8)
    writer.write(moving_square(4)[::-1])
    monkeypatch.setattr("os.replace", interrupt_at_second_call())
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    assert [(tmp_path / name).read_bytes() for name in everything_in(tmp_path)] == old


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_a_writer_that_may_not_replace_takes_a_free_name(
    tmp_path: Path, target: str, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr("os.link", refuse_links)
    write(f"{tmp_path}/{target}", moving_square(5), metadata=METADATA)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(2):
        kwargs = {"width": 48, "height": 32, "fps": 8, "metadata": METADATA}
        with open_writer(f"{tmp_path}/{target}", replace=False, **kwargs) as writer:  # type: ignore[arg-type]
            writer.write(moving_square(7))
    assert {path: path.read_bytes() for path in before} == before
    assert writer.target == numbered(f"{tmp_path}/{target}", 3)
    assert len(read_frames(writer.target)) == 7
    assert all(path.is_file() for path in writer.paths)
    assert not [name for name in everything_in(tmp_path) if "partial" in name]


def refuse_links(source: Path, target: Path, **_: object) -> None:
    """In place of os.link, on a file system without them."""
    if os.path.lexists(target):
        raise FileExistsError(target)
    raise PermissionError(source)


def test_a_disk_that_is_full_is_told_once(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "clip.npy", width=48, height=32, fps=8)
    writer.write(moving_square(1))
    assert isinstance(writer, NpyWriter)
    assert writer._file is not None
    writer._file.close()
    writer._file = open("/dev/full", "wb")  # noqa: SIM115
    writer._file.write(b"x")
    writer.abort()
    assert everything_in(tmp_path) == []


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [np.zeros((1, 32, 48, 3), np.float32), np.zeros((1, 48, 32, 3), np.uint8)])
def test_other_arrays_are_refused(tmp_path: Path, frames: Frames) -> None:
    with (
        pytest.raises(ValueError, match=r"must be uint8 \[F, 32, 48, 3\]"),
        open_writer(tmp_path / "clip.mp4", width=48, height=32, fps=8) as writer,
    ):
        writer.write(frames)
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("target", TARGETS)
def test_missing_frames_are_noticed(tmp_path: Path, target: str) -> None:
    writer = open_writer(f"{tmp_path}/{target}", width=48, height=32, fps=8, num_frames=9)
    writer.write(moving_square(4))
    with pytest.raises(ValueError, match="4 frames were written, 9 were announced"):
        writer.close()
    assert everything_in(tmp_path) == []


def test_no_frames_at_all_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no frames"):
        open_writer(tmp_path / "clip.mp4", width=48, height=32, fps=8).close()


def test_closed_is_closed(tmp_path: Path) -> None:
    with open_writer(tmp_path / "clip.npy", width=48, height=32, fps=8) as writer:
        writer.write(moving_square(1))
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write(moving_square(1))


def test_problems_are_raised_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"even width and height, not 47 x 32"):
        open_writer(tmp_path / "clip.mp4", width=47, height=32, fps=8)
    assert everything_in(tmp_path) == []


def test_odd_sizes_work_elsewhere(tmp_path: Path) -> None:
    frames = moving_square(3, 31, 47)
    for target in ("clip.gif", "clip.npy", "clip.png"):
        write(f"{tmp_path}/{target}", frames)
        assert np.array_equal(read_frames(f"{tmp_path}/{target}"), frames)
