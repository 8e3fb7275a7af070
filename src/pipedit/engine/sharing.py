"""Which combination of degrees each request runs with, and what stands in the way. The rules are in plan.degrees."""

from pipedit.core.parallel import ParallelConfig
from pipedit.core.request import VideoRequest
from pipedit.engine.settings import EngineSettings
from pipedit.models.adapter import ModelAdapter
from pipedit.models.validation import sound_request
from pipedit.plan.degrees import choose


def choose_sharing(request: VideoRequest, adapter: ModelAdapter, settings: EngineSettings) -> ParallelConfig:
    """For a completed request without problems. Requests of one engine may differ: those without guidance leave
    nothing for a second CFG group to do."""
    return choose(
        settings.wanted,
        settings.num_denoisers,
        heads=adapter.heads,
        uses_guidance=adapter.uses_guidance(request),
        tokens=adapter.token_layout(request).latent_tokens,
    )


def sharing_problems(
    request: VideoRequest, adapter: ModelAdapter, settings: EngineSettings, *, has_sound_size: bool
) -> list[str]:
    """Why the workers cannot share this completed request, where the settings themselves are legal. The request may
    have problems of its own; only a sound size says how many tokens it has."""
    if settings.degree_problems(adapter.heads):
        return []
    return settings.degree_problems(
        adapter.heads,
        uses_guidance=adapter.uses_guidance(sound_request(request, adapter)),
        tokens=adapter.token_layout(request).latent_tokens if has_sound_size else None,
    )
