"""From an adapter and requests to what planning has to know of them. Reads configs only."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import ModelAdapter, Precision
from pipedit.plan.planned_video import PlannedVideo


def planned_videos(
    requests: Sequence[VideoRequest], adapter: ModelAdapter, precision: Precision, *, tiling: bool = False
) -> list[PlannedVideo]:
    """One for each kind of request, in order of first appearance. The requests are complete and have no problems."""
    guided = Counter((_alike(request), adapter.uses_guidance(request)) for request in requests)
    first = {(_alike(request), adapter.uses_guidance(request)): request for request in reversed(requests)}
    return [
        planned_video(first[kind], adapter, precision, tiling=tiling, count=count) for kind, count in guided.items()
    ]


def planned_video(
    request: VideoRequest, adapter: ModelAdapter, precision: Precision, *, tiling: bool = False, count: int = 1
) -> PlannedVideo:
    """`count` videos like this complete request."""
    return PlannedVideo(
        request=request,
        heads=adapter.heads,
        cost_with=functools.cache(lambda decoders: adapter.cost(request, precision, tiling=tiling, decoders=decoders)),
        chunks_with=functools.cache(lambda decoders: adapter.num_decode_chunks(request, decoders)),
        count=count,
        tiled=None if tiling else planned_video(request, adapter, precision, tiling=True, count=count),
    )


def _alike(request: VideoRequest) -> VideoRequest:
    """Equal for requests that cost the same, but for whether they use guidance."""
    plain = VideoRequest(prompt="")
    return dataclasses.replace(
        plain,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.num_inference_steps,
        max_sequence_length=request.max_sequence_length,
    )
