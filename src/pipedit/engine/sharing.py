"""Which combination of degrees each request runs with, and what stands in the way. The rules are in plan.degrees."""

from collections.abc import Iterator, Sequence

from pipedit.core.parallel import ParallelConfig
from pipedit.core.request import VideoRequest
from pipedit.engine.settings import EngineSettings, Strategy
from pipedit.models.adapter import ModelAdapter
from pipedit.models.validation import sound_request
from pipedit.plan.aco_gate import AcoMode, helper_groups, shares_with_help
from pipedit.plan.degrees import choose


def choose_sharing(request: VideoRequest, adapter: ModelAdapter, settings: EngineSettings) -> ParallelConfig:
    """For a completed request without problems. Requests of one engine may differ: those without guidance leave
    nothing for a second CFG group to do. Stages of layers have nothing to share."""
    if settings.is_blockwise:
        return ParallelConfig()
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


def help_notes(requests: Sequence[VideoRequest], adapter: ModelAdapter, settings: EngineSettings) -> Iterator[str]:
    """Why help with attention that was asked for cannot be had for some of these completed requests, a sentence for
    each way to share. The settings leave nothing open."""
    if settings.strategy != Strategy.DISAGGREGATED or settings.aco != AcoMode.ON:
        return
    assert settings.decode_workers is not None
    for config in dict.fromkeys(choose_sharing(request, adapter, settings) for request in requests):
        (group, *_) = helper_groups(range(settings.decode_workers), config)
        if not shares_with_help(adapter.heads, config.ulysses_degree, len(group)):
            yield f"aco=on changes nothing with {config.describe()}: {_why_no_help(config, adapter.heads, len(group))}"


def _why_no_help(config: ParallelConfig, heads: int, helpers: int) -> str:
    if config.ring_degree > 1:
        return "nobody can help a ring; ring_degree=1 allows it"
    if helpers == 0:
        return "both guidance groups need a decode worker to help them; cfg_degree=1 needs one in all"
    return f"{heads} heads cannot go round {config.ulysses_degree} workers and {helpers} more"
