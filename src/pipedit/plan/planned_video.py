"""What planning has to know about a video before it is made. Knows no ranks and no device."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from pipedit.core.errors import InvalidRequestError
from pipedit.core.parallel import ParallelConfig
from pipedit.core.request import VideoRequest
from pipedit.plan.costs import RequestCost
from pipedit.plan.degrees import Wanted, choose
from pipedit.plan.jobs import Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedVideo:
    """`count` videos that are alike. `cost_with` and `chunks_with` take the number of ranks that share a decode, which
    changes the memory that each needs and the pieces that the frames come in. `request` is complete. `tiled`: the same
    with the VAE in spatial tiles, where it is not and can be."""

    request: VideoRequest
    heads: int
    cost_with: Callable[[int], RequestCost]
    chunks_with: Callable[[int], int]
    count: int = 1
    tiled: "PlannedVideo | None" = None

    @property
    def cost(self) -> RequestCost:
        """With one decoder."""
        return self.cost_with(1)

    @property
    def uses_guidance(self) -> bool:
        return self.cost.forwards_per_step > 1

    @property
    def title(self) -> str:
        """Such as "129 frames of 1024x576"."""
        return f"{self.request.num_frames} frames of {self.request.width}x{self.request.height}"

    def sharing(self, degrees: Wanted, denoisers: int) -> ParallelConfig:
        """How so many denoisers share its steps. Raises InvalidRequestError where they cannot."""
        return _chosen(degrees, denoisers, self.heads, self.uses_guidance, self.cost.latent_tokens)

    def work(self, parallel: ParallelConfig, decoders: int) -> Work:
        """For a scheduler whose placement has so many decoders."""
        return Work(
            num_steps=self.cost.num_steps,
            num_chunks=self.chunks_with(1),
            num_chunks_spread=self.chunks_with(decoders),
            parallel=parallel,
            heads=self.heads,
            shape=(self.title, self.cost.forwards_per_step, self.cost.latent_tokens),
        )


_chosen = functools.lru_cache(maxsize=4096)(choose)  # planning asks the same thing many times


def total_count(videos: Sequence[PlannedVideo]) -> int:
    return sum(video.count for video in videos)


def can_share(video: PlannedVideo, degrees: Wanted, denoisers: int) -> bool:
    try:
        video.sharing(degrees, denoisers)
    except InvalidRequestError:
        return False
    return True
