"""Published models as planned videos, and durations in closed form: enough to plan without a device's profile."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pipedit.core import messages
from pipedit.core.request import VideoRequest
from pipedit.models.planned_videos import planned_videos
from pipedit.models.registry import open_published
from pipedit.plan.arrangements import Arrangement
from pipedit.plan.durations import DECODE, ENCODE, ONLOAD, STEP, Durations, Piece
from pipedit.plan.planned_video import PlannedVideo

GIB = 2**30
OPERATIONS_PER_S = 1e14


def published(name: str, *, count: int = 10, **settings: Any) -> list[PlannedVideo]:
    adapter = open_published(name)
    request = adapter.complete(VideoRequest(prompt="", **settings))
    return planned_videos([request] * count, adapter, adapter.default_precision("cuda"))


def hunyuan(**settings: Any) -> list[PlannedVideo]:
    """The largest setting of PipeDiT's tables."""
    return published("hunyuanvideo", **{"width": 1024, "height": 576, "num_frames": 129, **settings})


def wan(**settings: Any) -> list[PlannedVideo]:
    return published("wan2.1-t2v-1.3b", **settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates(Durations):
    """Operations at one rate, exchanges free; `decode_factor` makes decoding slower, `help_s` is what help costs."""

    arrangement: Arrangement
    video: PlannedVideo
    decode_factor: float = 1.0
    help_s: float = 0.0
    offload_bytes_per_s: float = 1e10

    def pieces(self, command: messages.Command) -> Sequence[Piece]:
        match command:
            case messages.Encode():
                return [*self._moved("text_encoder"), self._piece(ENCODE, self.video.cost.encode.total)]
            case messages.Denoise():
                steps = [self._step(command.aco, number) for number in range(command.num_steps)]
                return [*(self._moved("transformer") if command.step == 0 else []), *steps]
            case messages.Decode():
                ranks = len(command.ranks)
                share = self.video.cost.decode.total * self.decode_factor / ranks / self.video.chunks_with(ranks)
                chunks = [self._piece(DECODE, share, number) for number in range(command.num_chunks)]
                return [*(self._moved("vae") if command.chunk == 0 else []), *chunks]
        return []

    def _step(self, aco: messages.Aco | None, number: int) -> Piece:
        config, cost = self.arrangement.sharing(self.video), self.video.cost
        heads = -(-self.video.heads // config.ulysses_degree) if aco is None else max(aco.heads)
        total = cost.forward.total
        attention = total.attention * heads / self.video.heads / config.ring_degree
        operations = cost.forwards_per_step / config.cfg_degree * (total.linear / config.sequence_degree + attention)
        piece = self._piece(STEP, operations, number)
        return piece if aco is None else dataclasses.replace(piece, seconds=piece.seconds + self.help_s)

    def _moved(self, part: str) -> list[Piece]:
        if not self.arrangement.kind.is_offloaded:
            return []
        weights = sum(kept.weights for name, kept in self.video.cost.parts.items() if name.startswith(part))
        return [Piece(what=ONLOAD, seconds=weights / self.offload_bytes_per_s, payload_bytes=weights)]

    def _piece(self, what: str, operations: float, number: int | None = None) -> Piece:
        return Piece(what=what, seconds=operations / OPERATIONS_PER_S, index=number)


def rates(arrangement: Arrangement, video: PlannedVideo) -> Rates:
    return Rates(arrangement=arrangement, video=video)


def slow_decode(arrangement: Arrangement, video: PlannedVideo) -> Rates:
    """As where a VAE's convolutions are far from the device's peak."""
    return Rates(arrangement=arrangement, video=video, decode_factor=4.0)
