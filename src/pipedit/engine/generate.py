"""The shortest way to a video."""

from pathlib import Path
from typing import Any

from pipedit.engine.engine import Engine
from pipedit.engine.video import Video
from pipedit.models.registry import EMBEDDED


def generate(
    prompt: str, *, model: str | Path = EMBEDDED, device: str = "auto", dtype: str = "auto", **settings: Any
) -> Video:
    """One video of the prompt, made in this process; `settings` are fields of VideoRequest.

    video = pipedit.generate("a red ball moves right", seed=0)
    video.save("ball.mp4")

    Loads the model for this one call; keep a pipedit.Engine for several. Raises InvalidRequestError for bad input.
    """
    with Engine(model, num_workers=1, device=device, dtype=dtype) as engine:
        (video,) = engine.generate(prompt, **settings)
    return video
