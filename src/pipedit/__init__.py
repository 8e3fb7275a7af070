"""pipedit: video from diffusion transformers on one to many GPUs.

An independent implementation of PipeDiT (arXiv 2511.12056) and DualParal (arXiv 2505.21070). Names are loaded when they
are first used, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pipedit.core.errors import (
    CancelledError,
    CheckpointError,
    InsufficientMemoryError,
    InvalidRequestError,
    PipeditError,
    WorkerDiedError,
    WorkerError,
)
from pipedit.core.request import VideoRequest
from pipedit.core.version import __version__

if TYPE_CHECKING:
    from pipedit.engine.engine import Engine
    from pipedit.engine.generate import generate
    from pipedit.engine.video import Video
    from pipedit.worker.pipeline import parallelize

_LAZY = {
    "Engine": "pipedit.engine.engine",
    "Video": "pipedit.engine.video",
    "generate": "pipedit.engine.generate",
    "parallelize": "pipedit.worker.pipeline",
}

__all__ = [
    "CancelledError",
    "CheckpointError",
    "Engine",
    "InsufficientMemoryError",
    "InvalidRequestError",
    "PipeditError",
    "Video",
    "VideoRequest",
    "WorkerDiedError",
    "WorkerError",
    "__version__",
    "generate",
    "parallelize",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pipedit' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
