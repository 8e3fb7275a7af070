"""The contract of every video file writer: frames come in chunks, a whole file or nothing comes out.

Owns the order begin, put, finish and the clean-up; knows no file format.
"""

import abc
import dataclasses
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pipedit.core.staging import Staging
from pipedit.media.metadata import VideoMetadata
from pipedit.media.names import files_of, numbered

Frames = np.ndarray[Any, np.dtype[np.uint8]]  # [F, H, W, 3] uint8, RGB


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipFormat:
    """Sizes in pixels; `num_frames` is None where nobody knows it before the end."""

    width: int
    height: int
    fps: float
    num_frames: int | None = None


class FrameWriter(abc.ABC):
    """Writes one clip in constant memory. Use as a context manager: an exception aborts, success closes.

    Nothing touches the disk before the first frame. Until `close` everything lies in a hidden folder beside the
    target, so that an abort, an exception or an interrupt leaves no half-written file.

    `replace`: what lies at the target gives way. Else it stays, even if it appeared while the clip was made: the clip
    then gets the next free number, counted from `series` (the target, if not given), and `target` says its true name.
    """

    def __init__(
        self, target: str, clip: ClipFormat, metadata: VideoMetadata | None, *, replace: bool, series: str | None
    ) -> None:
        self.target, self._clip, self._metadata = target, clip, metadata
        self._replace, self._series = replace, series or target
        self._staging: Staging | None = None
        self._is_over = False
        self.num_written = 0
        self.paths: tuple[Path, ...] = ()  # the files made, known after `close`

    def write(self, frames: Frames) -> None:
        """Appends frames, uint8 [F, H, W, 3]. May be called any number of times. Raises ValueError for other arrays."""
        if self._is_over:
            raise ValueError("the writer is closed")
        self._check(frames)
        if self._staging is None:
            self._staging = Staging(files_of(self.target, 1)[0].parent)
            self._begin(self._staging)
        for frame in frames:
            self._put(np.ascontiguousarray(frame))
            self.num_written += 1

    def close(self) -> None:
        """Finishes the file and moves it to its place. Raises ValueError if frames are missing. May be repeated."""
        if self._is_over:
            return
        try:
            staging = self._check_complete()
            self._finish()
            self.paths = staging.publish() if self._replace else self._publish_new(staging)
            self._published()
        except BaseException:
            self.abort()
            raise
        self._is_over = True

    def abort(self) -> None:
        """Removes everything half-written. No effect after `close` or a former `abort`."""
        if self._is_over:
            return
        self._is_over = True
        try:
            self._drop()
        finally:
            if self._staging is not None:
                self._staging.discard()

    def _publish_new(self, staging: Staging) -> tuple[Path, ...]:
        given = [path.name for path in files_of(self.target, self.num_written)]
        number = 1
        while True:
            try:
                return staging.publish_new(dict(zip(given, files_of(self.target, self.num_written), strict=True)))
            except FileExistsError:
                number += 1
                self.target = numbered(self._series, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    # -- what a format does -------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _begin(self, staging: Staging) -> None:
        """Opens the staged files."""

    @abc.abstractmethod
    def _put(self, frame: Frames) -> None:
        """Appends one frame [H, W, 3], contiguous; its index is `num_written`."""

    @abc.abstractmethod
    def _finish(self) -> None:
        """Completes and closes the staged files. Called once, after the last frame."""

    @abc.abstractmethod
    def _drop(self) -> None:
        """Closes what is open, in whatever state it is; may follow a failed `_begin`, `_put` or `_finish`."""

    def _published(self) -> None:  # noqa: B027 - most formats have nothing to do
        """Called when the files are in their place."""

    # -- checks -------------------------------------------------------------------------------------------------

    def _check(self, frames: Frames) -> None:
        wanted = (self._clip.height, self._clip.width, 3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != wanted:
            given = f"{frames.dtype} {frames.shape}"
            raise ValueError(f"frames must be uint8 [F, {wanted[0]}, {wanted[1]}, 3], not {given}")

    def _check_complete(self) -> Staging:
        if self._staging is None or not self.num_written:
            raise ValueError("no frames were written")
        if self._clip.num_frames not in (None, self.num_written):
            raise ValueError(f"{self.num_written} frames were written, {self._clip.num_frames} were announced")
        return self._staging
