"""Frames as they are: one raw .npy array, or one PNG file a frame. Memory does not grow with the length of the clip."""

import contextlib
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, PngImagePlugin

from pipedit.core.errors import InvalidRequestError
from pipedit.core.staging import Staging
from pipedit.media.frame_writer import ClipFormat, Frames, FrameWriter
from pipedit.media.metadata import VideoMetadata, parse_metadata
from pipedit.media.names import FrameNames, sidecar


class NpyWriter(FrameWriter):
    """uint8 [F, H, W, 3] in NumPy's own format. Metadata in `name.npy.json` beside it."""

    _file: IO[bytes] | None = None

    def _begin(self, staging: Staging) -> None:
        if self._metadata is not None:
            text = self._metadata.to_json(indent=2) + "\n"
            staging.path(sidecar(Path(self.target)).name).write_text(text, encoding="ascii")
        self._file = staging.path(Path(self.target).name).open("w+b")
        self._write_header(num_frames=0)
        self._data_start = self._file.tell()

    def _write_header(self, *, num_frames: int) -> None:
        assert self._file is not None
        shape = (num_frames, self._clip.height, self._clip.width, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def _put(self, frame: Frames) -> None:
        assert self._file is not None
        self._file.write(frame.data)

    def _finish(self) -> None:
        """Writes the header again with the true length: NumPy pads it so that the first axis can grow in place."""
        assert self._file is not None
        self._file.seek(0)
        self._write_header(num_frames=self.num_written)
        assert self._file.tell() == self._data_start, "the header has changed its length"
        self._file.close()

    def _published(self) -> None:
        beside = sidecar(Path(self.target))
        if self._metadata is None and self._replace and _holds_settings(beside):
            beside.unlink(missing_ok=True)  # those of an older clip would tell lies about this one

    def _drop(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # it is thrown away; the first error is the one to show
                self._file.close()


def _holds_settings(file: Path) -> bool:
    try:
        parse_metadata(file.read_text(encoding="utf-8"), source=str(file))
    except (OSError, UnicodeDecodeError, InvalidRequestError):
        return False
    return True


class PngWriter(FrameWriter):
    """One file a frame. Metadata in the text chunks Comment and Title of every frame, so that each can stand alone."""

    def __init__(
        self, target: str, clip: ClipFormat, metadata: VideoMetadata | None, *, replace: bool, series: str | None
    ) -> None:
        super().__init__(target, clip, metadata, replace=replace, series=series)
        self._names = FrameNames.of(target)
        self._info = PngImagePlugin.PngInfo()
        if metadata is not None:
            self._info.add_itxt("Title", metadata.title)
            self._info.add_itxt("Comment", metadata.to_json())

    def _begin(self, staging: Staging) -> None:
        self._staged = staging

    def _put(self, frame: Frames) -> None:
        path = self._staged.path(self._names.name(self.num_written))
        Image.fromarray(frame).save(path, format="PNG", pnginfo=self._info)

    def _finish(self) -> None:
        pass

    def _drop(self) -> None:
        pass
