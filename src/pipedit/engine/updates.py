"""What the engine tells its caller while it works."""

import dataclasses
from typing import TYPE_CHECKING, Any

from pipedit.core.request import VideoRequest

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    request_id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress(Update):
    """`done` of `total` units of a stage ("encode", "denoise", "decode") are finished; in an endless video nobody knows
    the total. `spent_s`: the time that these took, without the waiting between them."""

    stage: str
    done: int
    total: int | None
    spent_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frames(Update):
    """The next frames of the video in order, uint8 [F, H, W, 3]; `first` is the number of the first one."""

    first: int
    frames: "np.ndarray[Any, np.dtype[np.uint8]]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restarted(Update):
    """Workers were lost (`error`), and the request begins again on fresh ones. Frames that were told of stay valid and
    are not told of again."""

    error: Exception


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointed(Update):
    """The run is saved, and can be gone on with, as it was after `operations` steps of single blocks; by then so many
    blocks were decoded."""

    operations: int
    blocks_decoded: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished(Update):
    """The request is done; `request` is complete (seed and defaults filled), `seconds` is time per stage."""

    request: VideoRequest
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cancelled(Update):
    """The request was cancelled; no further update follows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed(Update):
    """The request failed; no further update follows."""

    error: Exception
