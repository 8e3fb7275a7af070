"""Clips and their settings back from the files that `outputs` writes."""

import os
from collections.abc import Iterator
from pathlib import Path

import av
import av.container
import numpy as np
from PIL import Image, UnidentifiedImageError

from pipedit.core.errors import InvalidRequestError
from pipedit.media.frame_writer import Frames
from pipedit.media.metadata import VideoMetadata, parse_metadata
from pipedit.media.names import FrameNames, is_frames, sidecar


def read_frames(path: str | os.PathLike[str]) -> Frames:
    """All frames of a clip, uint8 [F, H, W, 3] RGB, held in memory at once. Raises InvalidRequestError."""
    text = os.fspath(path)
    if _is_png(text):
        files = _png_files(text)
        return np.stack([np.asarray(_open_image(file).convert("RGB")) for file in files])
    _require_file(text)
    if text.lower().endswith(".npy"):
        return _read_array(text)
    with _open_video(text) as container:
        pictures = [picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)]
    if not pictures:
        raise InvalidRequestError([f"{text} holds no frames"])
    return np.stack(pictures).astype(np.uint8, copy=False)


def stream_frames(path: str | os.PathLike[str], piece: int = 16) -> Iterator[Frames]:
    """The frames of a video file, so many at a time. Raises InvalidRequestError."""
    text = os.fspath(path)
    _require_file(text)
    with _open_video(text) as container:
        pictures: list[Frames] = []
        try:
            for picture in container.decode(video=0):
                pictures.append(np.asarray(picture.to_ndarray(format="rgb24"), np.uint8))
                if len(pictures) == piece:
                    yield np.stack(pictures)
                    pictures.clear()
        except av.FFmpegError as error:
            raise InvalidRequestError([f"{text} is damaged: {error.strerror}"]) from error
        if pictures:
            yield np.stack(pictures)


def read_metadata(path: str | os.PathLike[str]) -> VideoMetadata:
    """The settings that a clip was made with. Raises InvalidRequestError where the file is missing or holds none."""
    text = os.fspath(path)
    if _is_png(text):
        file = _png_files(text)[0]
        image = _open_image(file)
        return parse_metadata(image.info.get("Comment"), source=str(file))
    _require_file(text)
    if text.lower().endswith(".npy"):
        beside = sidecar(Path(text))
        return parse_metadata(_text_or_none(beside), source=text)
    with _open_video(text) as container:
        return parse_metadata(container.metadata.get("comment"), source=text)


def _is_png(text: str) -> bool:
    return is_frames(text) or os.path.isdir(text)


def _png_files(text: str) -> list[Path]:
    """A single frame that exists, or all frames that the name stands for when written to."""
    if os.path.isfile(text):
        return [Path(text)]
    names = FrameNames.of(text + "/" if os.path.isdir(text) and not text.endswith("/") else text)
    files = [names.folder / names.name(index) for index in names.present()]
    if not files:
        raise InvalidRequestError([f"there are no frames {names.folder / names.name(0)}, {names.name(1)}, ..."])
    return files


def _require_file(text: str) -> None:
    if not os.path.isfile(text):
        raise InvalidRequestError([f"{text} does not exist"])


def _open_image(file: Path) -> Image.Image:
    """The picture with its text chunks, loaded and closed."""
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError) as error:
        raise InvalidRequestError([f"{file} cannot be read as a picture: {error}"]) from error


def _open_video(text: str) -> av.container.InputContainer:
    try:
        # Absolute: FFmpeg would take `12:30.mp4` for a protocol. Tags of other programs need not be UTF-8.
        container = av.open(os.path.abspath(text), metadata_errors="replace")
    except av.FFmpegError as error:
        raise InvalidRequestError([f"{text} cannot be read as a video: {error.strerror}"]) from error
    if container.streams.video:
        return container
    container.close()
    raise InvalidRequestError([f"{text} holds no video"])


def _read_array(text: str) -> Frames:
    try:
        frames = np.load(text, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InvalidRequestError([f"{text} cannot be read as an array: {error}"]) from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise InvalidRequestError([f"{text} holds {frames.dtype} {frames.shape}, not uint8 [F, H, W, 3]"])
    return np.asarray(frames, np.uint8)


def _text_or_none(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):  # what is no text holds no settings
        return None
