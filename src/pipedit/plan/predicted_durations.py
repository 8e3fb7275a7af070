"""How long commands take by prediction: what planner and simulator ask where nothing was measured."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from pipedit.core import messages
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Role
from pipedit.plan.costs import RequestCost
from pipedit.plan.durations import DECODE, ENCODE, FETCH, ONLOAD, STEP, Piece
from pipedit.plan.memory import role_of_part
from pipedit.plan.predict import Predictor

StepSeconds = Callable[[ParallelConfig, messages.Aco | None], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictedDurations:
    """Of one kind of request. `step_s`: what a step takes (predicting it is work, so it is shared and remembered).
    `is_offloaded`: weights come from host memory for each request."""

    predictor: Predictor
    cost: RequestCost
    step_s: StepSeconds
    is_offloaded: bool = False

    @classmethod
    def of(cls, predictor: Predictor, cost: RequestCost, *, is_offloaded: bool = False) -> "PredictedDurations":
        steps = remembered_steps(predictor, cost)
        return cls(predictor=predictor, cost=cost, step_s=steps, is_offloaded=is_offloaded)

    def pieces(self, command: messages.Command) -> Sequence[Piece]:
        match command:
            case messages.Encode():
                seconds = self.predictor.encode_s(self.cost) + self.predictor.implementation.request_s
                return [*self._onload(Role.ENCODER, command), Piece(what=ENCODE, seconds=seconds)]
            case messages.Denoise():
                return [*self._before_denoising(command), *self._steps(command)]
            case messages.Decode():
                return [*self._before_decoding(command), *self._chunks(command)]
        return []

    def _before_denoising(self, command: messages.Denoise) -> list[Piece]:
        if command.step > 0:
            return []
        fetched = [] if command.conditioning_at is None else [self.conditioning()]
        return [*fetched, *self._onload(Role.DENOISER, command)]

    def _before_decoding(self, command: messages.Decode) -> list[Piece]:
        if command.chunk > 0:
            return []
        fetched = [] if command.latents_at is None else [self.fetch(self.cost.latent_bytes)]
        return [*fetched, *self._onload(Role.DECODER, command)]

    def _steps(self, command: messages.Denoise) -> list[Piece]:
        seconds = self.step_s(command.parallel, command.aco)
        return [Piece(what=STEP, seconds=seconds, index=index) for index in range(command.num_steps)]

    def _chunks(self, command: messages.Decode) -> list[Piece]:
        ranks, last = len(command.ranks), self.cost.num_chunks - 1
        seconds = []
        for chunk in range(command.chunk, command.chunk + command.num_chunks):
            if self.cost.decodes_in_rounds and ranks > 1:  # the longest of a round; the first chunk of all is shorter
                first = min(chunk * ranks, last)
                of_round = {first, min(first + 1, last)}
                seconds.append(max(self.predictor.chunk_s(self.cost, one) for one in of_round))
            else:
                seconds.append(self.predictor.chunk_s(self.cost, min(chunk, last), ranks))
        return [Piece(what=DECODE, seconds=s, index=index) for index, s in enumerate(seconds)]

    def conditioning(self) -> Piece:
        """Fetching it from another rank. About: the text's embedding is as wide as the transformer."""
        attention = self.cost.attention
        row_bytes = 0 if attention is None else attention.row_bytes
        return self.fetch(self.cost.text_tokens * row_bytes * self.cost.forwards_per_step)

    def fetch(self, num_bytes: int) -> Piece:
        """From another rank."""
        return Piece(what=FETCH, seconds=self.predictor.hand_over_s(num_bytes), payload_bytes=num_bytes)

    def _onload(self, role: Role, command: messages.Command) -> list[Piece]:
        """The role's weights come from host memory, once a request."""
        if not self.is_offloaded:
            return []
        weights = sum(part.weights for name, part in self.cost.parts.items() if role_of_part(name) is role)
        seconds = self.predictor.offload_s(weights, len(command.ranks))
        return [Piece(what=ONLOAD, seconds=seconds, payload_bytes=weights)]


def remembered_steps(predictor: Predictor, cost: RequestCost) -> StepSeconds:
    """Seconds of a step by how ranks share it."""

    @functools.cache
    def by_shares(parallel: ParallelConfig, heads: tuple[int, ...]) -> float:
        aco = messages.Aco(helpers=(), heads=heads, text_tokens=()) if heads else None
        return predictor.step(cost, parallel, aco).total_s

    return lambda parallel, aco: by_shares(parallel, () if aco is None else aco.heads)
