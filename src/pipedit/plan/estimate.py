"""A first guess of how long an arrangement takes, in closed form: it says which arrangements are worth simulating."""

import dataclasses
from collections.abc import Callable, Sequence

from pipedit.core import messages
from pipedit.core.placement import Role
from pipedit.core.request import VideoRequest
from pipedit.plan.aco_gate import AcoMode, helper_groups
from pipedit.plan.arrangements import Arrangement
from pipedit.plan.durations import Durations
from pipedit.plan.planned_video import PlannedVideo
from pipedit.plan.rank_memory import most_help

DurationsOf = Callable[[Arrangement, PlannedVideo], Durations]

_REQUEST = VideoRequest(prompt="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one video's phases. `decode_alone_s`: with all decoders, and as fast as one where there is one."""

    encode_s: float
    first_step_s: float
    step_s: float
    helped_step_s: float  # with all decoders; as long as without where they cannot or should not help
    decode_s: float
    decode_alone_s: float
    num_steps: int

    def denoise_s(self, help_share: float = 0.0) -> float:
        """`help_share`: the part of the steps for which decoders are idle."""
        step_s = (1 - help_share) * self.step_s + help_share * min(self.step_s, self.helped_step_s)
        return self.first_step_s + (self.num_steps - 1) * step_s


def times(arrangement: Arrangement, video: PlannedVideo, durations: Durations) -> Times:
    phases = _Phases(arrangement=arrangement, video=video, durations=durations)
    placement, step_s = arrangement.placement, phases.step_s(1)
    together_s = phases.decode_s(placement.decoders)
    return Times(
        encode_s=phases.encode_s(),
        first_step_s=phases.step_s(0),
        step_s=step_s,
        helped_step_s=min((phases.step_s(1, aco) for aco in _helps(arrangement, video)), default=step_s),
        decode_s=phases.decode_s(placement.decoders[:1]) if placement.is_disaggregated else together_s,
        decode_alone_s=together_s,
        num_steps=video.cost.num_steps,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Phases:
    """Asks for the commands that the scheduler would send."""

    arrangement: Arrangement
    video: PlannedVideo
    durations: Durations

    def encode_s(self) -> float:
        placement = self.arrangement.placement
        ranks = placement.encoders if placement.encodes_locally else placement.encoders[:1]
        return self._seconds(messages.Encode(request_id="", request=_REQUEST, ranks=ranks))

    def step_s(self, number: int, aco: messages.Aco | None = None) -> float:
        placement = self.arrangement.placement
        helpers = () if aco is None else tuple(rank for group in aco.helpers for rank in group)
        fetched_at = placement.encoders[0] if number == 0 and not placement.encodes_locally else None
        command = messages.Denoise(
            request_id="", request=_REQUEST, ranks=(*placement.denoisers, *helpers), step=number, aco=aco,
            parallel=self.arrangement.sharing(self.video), conditioning_at=fetched_at,
        )  # fmt: skip
        return self._seconds(command)

    def decode_s(self, ranks: tuple[int, ...]) -> float:
        placement = self.arrangement.placement
        command = messages.Decode(
            request_id="", request=_REQUEST, ranks=ranks, chunk=0, num_chunks=self.video.chunks_with(len(ranks)),
            latents_at=placement.denoisers[0] if placement.is_disaggregated else None,
        )  # fmt: skip
        return self._seconds(command)

    def _seconds(self, command: messages.Command) -> float:
        return sum(piece.seconds for piece in self.durations.pieces(command))


def _helps(arrangement: Arrangement, video: PlannedVideo) -> list[messages.Aco]:
    """What all decoders together may take of a step."""
    if arrangement.aco is AcoMode.OFF:
        return []
    parallel = arrangement.sharing(video)
    groups = helper_groups(arrangement.placement.decoders, parallel)
    text_tokens = (video.cost.text_tokens,) * video.cost.forwards_per_step
    return [
        messages.Aco(helpers=groups, heads=shares, text_tokens=text_tokens)
        for shares in most_help(arrangement, video, parallel)
    ]


def estimate_makespan_s(arrangement: Arrangement, videos: Sequence[PlannedVideo], durations_of: DurationsOf) -> float:
    """All videos, from the first command to the last frame. On disjoint groups, the slower one decides, and the other's
    first or last turn comes on top."""
    found = [(times(arrangement, video, durations_of(arrangement, video)), video.count) for video in videos]
    placement = arrangement.placement
    if not placement.is_disaggregated:
        return sum(count * (t.encode_s + t.denoise_s() + t.decode_s) for t, count in found)
    on_denoisers = arrangement.encoder is Role.DENOISER
    encoding_s = sum(count * t.encode_s for t, count in found)
    decoding_s = sum(count * t.decode_s for t, count in found) + (0.0 if on_denoisers else encoding_s)
    decoding_s /= len(placement.decoders)
    unhelped_s = sum(count * t.denoise_s() for t, count in found)
    help_share = max(0.0, 1 - decoding_s / unhelped_s) if unhelped_s else 0.0
    denoising_s = sum(count * t.denoise_s(help_share) for t, count in found) + (encoding_s if on_denoisers else 0.0)
    first, last = found[0][0], found[-1][0]
    return max(
        denoising_s + (0.0 if on_denoisers else first.encode_s) + last.decode_alone_s,
        first.encode_s + first.denoise_s(help_share) + decoding_s,
    )
