"""Frames as they are: one raw .npy array, or one PNG file a frame. Memory does not grow with the length of the clip."""

import dataclasses
import re
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, PngImagePlugin

from pipedit.core.staging import Staging
from pipedit.media.frame_writer import ClipFormat, Frames, FrameWriter
from pipedit.media.metadata import VideoMetadata

_COUNTER = re.compile(r"%(?:0(\d))?d")  # %d or %04d


def sidecar(path: Path) -> Path:
    """Where the metadata of an .npy file lies."""
    return path.with_name(path.name + ".json")


class NpyWriter(FrameWriter):
    """uint8 [F, H, W, 3] in NumPy's own format. Metadata in `name.npy.json` beside it."""

    _file: IO[bytes] | None = None

    def __init__(self, path: Path, clip: ClipFormat, metadata: VideoMetadata | None) -> None:
        super().__init__(path.parent, clip, metadata)
        self._target = path

    def _begin(self, staging: Staging) -> None:
        if self._metadata is not None:
            text = self._metadata.to_json(indent=2) + "\n"
            staging.path(sidecar(self._target).name).write_text(text, encoding="ascii")
        self._file = staging.path(self._target.name).open("w+b")
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
        self._drop()
        if self._metadata is None:
            sidecar(self._target).unlink(missing_ok=True)  # one of an older clip would tell lies about this one

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameNames:
    """Names of PNG frames: `folder / f"{before}{index}{after}"` with at least `digits` digits."""

    folder: Path
    before: str
    digits: int
    after: str

    @classmethod
    def of(cls, path: str) -> "FrameNames":
        """`out/` -> out/frame_0000.png; `out/f%03d.png` -> out/f000.png; `x.png` -> x_0000.png.

        A path with two counters takes the last one; `check_output` refuses it.
        """
        if path.endswith("/"):
            return cls(folder=Path(path), before="frame_", digits=4, after=".png")
        target = Path(path)
        counters = list(_COUNTER.finditer(target.name))
        if not counters:
            return cls(folder=target.parent, before=target.stem + "_", digits=4, after=target.suffix)
        start, end = counters[-1].span()
        digits = int(counters[-1][1] or 1)
        return cls(folder=target.parent, before=target.name[:start], digits=digits, after=target.name[end:])

    def name(self, index: int) -> str:
        return f"{self.before}{index:0{self.digits}d}{self.after}"

    def present(self) -> list[int]:
        """Indices of the frames that lie in the folder, in order."""
        if not self.folder.is_dir():
            return []
        pattern = re.compile(re.escape(self.before) + r"(\d+)" + re.escape(self.after))
        matches = (pattern.fullmatch(path.name) for path in self.folder.iterdir())
        indices = sorted(int(match[1]) for match in matches if match)
        return [index for index in indices if (self.folder / self.name(index)).is_file()]

    def problems(self, num_frames: int | None) -> list[str]:
        """Frames of a longer clip would stay and look like the end of this one: refused, not deleted."""
        beyond = [index for index in self.present() if num_frames is not None and index >= num_frames]
        if not beyond:
            return []
        return [
            f"{self.folder} already holds frames of a longer clip, {self.name(beyond[0])} to {self.name(beyond[-1])};"
            " remove them or choose another name"
        ]


def counters_in(name: str) -> int:
    """How many frame counters such as %04d a file name has."""
    return len(_COUNTER.findall(name))


class PngWriter(FrameWriter):
    """One file a frame. Metadata in the text chunks Comment and Title of every frame, so that each can stand alone."""

    def __init__(self, names: FrameNames, clip: ClipFormat, metadata: VideoMetadata | None) -> None:
        super().__init__(names.folder, clip, metadata)
        self._names = names
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
