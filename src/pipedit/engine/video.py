"""A finished video in memory, and the metadata that lets it be made again."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from pipedit.core.request import VideoRequest
from pipedit.media import VideoMetadata, open_writer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """`frames` is uint8 [F, H, W, 3]; `request` is complete, so that it makes the video again; `seconds` is time per
    stage."""

    frames: "np.ndarray[Any, np.dtype[np.uint8]]"
    request: VideoRequest
    metadata: VideoMetadata
    seconds: dict[str, float]

    @property
    def fps(self) -> float:
        assert self.request.fps is not None
        return self.request.fps

    def save(self, path: str | Path) -> Path:
        """Writes the video and replaces what was there; the ending decides the format (.mp4, .gif, .png, .npy, or
        "folder/" for PNG frames: as text, for a Path drops the slash). Raises InvalidRequestError where that cannot
        work."""
        num_frames, height, width, _ = self.frames.shape
        writer = open_writer(
            path, width=width, height=height, fps=self.fps, num_frames=num_frames, metadata=self.metadata
        )
        with writer:
            writer.write(self.frames)
        return Path(path)
