"""Frames that wait for the rest of a run on disk come back bit by bit."""

from pathlib import Path

import numpy as np
import pytest

from pipedit.core.errors import InvalidRequestError
from pipedit.media import ClipFormat, Frames, LosslessWriter, open_writer, stream_frames


def noise(num_frames: int, height: int, width: int) -> Frames:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def ramp() -> Frames:
    """Every colour of 6 bits, and smooth."""
    values = np.arange(0, 256, 4, dtype=np.uint8)
    red, green, blue = np.meshgrid(values, values, values, indexing="ij")
    return np.stack([red, green, blue], axis=-1)


def write(path: Path, frames: Frames, chunk: int = 3) -> None:
    _, height, width, _ = frames.shape
    clip = ClipFormat(width=width, height=height, fps=16)
    with LosslessWriter(str(path), clip, None, replace=True, series=None) as writer:
        for start in range(0, len(frames), chunk):
            writer.write(frames[start : start + chunk])


@pytest.mark.parametrize("frames", [noise(1, 2, 2), noise(7, 33, 47), noise(20, 64, 64), ramp()])
def test_every_bit_comes_back(frames: Frames, tmp_path: Path) -> None:
    write(tmp_path / "a.mkv", frames)
    pieces = list(stream_frames(tmp_path / "a.mkv", piece=6))
    assert all(len(piece) == 6 for piece in pieces[:-1])
    assert np.array_equal(np.concatenate(pieces), frames)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


def test_other_formats_lose_bits(tmp_path: Path) -> None:
    frames = noise(5, 32, 32)
    with open_writer(tmp_path / "a.mp4", width=32, height=32, fps=16) as writer:
        writer.write(frames)
    assert not np.array_equal(np.concatenate(list(stream_frames(tmp_path / "a.mp4"))), frames)


def test_no_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="does not exist"):
        list(stream_frames(tmp_path / "a.mkv"))
    (tmp_path / "a.mkv").write_bytes(b"x" * 1000)
    with pytest.raises(InvalidRequestError, match="cannot be read as a video"):
        list(stream_frames(tmp_path / "a.mkv"))
