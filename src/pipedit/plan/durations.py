"""How long the ranks of a command are at work: what the simulator asks, and the plainest answer to it."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from pipedit.core import messages

# Kinds of work, as workers name them in their spans.
ENCODE, STEP, DECODE, HELP, FETCH, ONLOAD = "encode", "step", "decode", "help", "fetch", "onload"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """One stretch of work of a rank. `what` as in Span; `index` counts steps or chunks from the command's first one."""

    what: str
    seconds: float
    index: int | None = None
    payload_bytes: int = 0


class Durations(Protocol):
    """Of one kind of request, in one placement."""

    def pieces(self, command: messages.Command) -> Sequence[Piece]:
        """What each rank of the command does, one after the other.

        A fetched input is part of its first step or chunk (`conditioning_at`, `latents_at`). Helpers take part in the
        steps only. Commands that differ only in the request's id, its epoch, in which ranks they name, or in the
        number of a step other than 0, must get the same answer: it is asked for once.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedDurations:
    """Every step takes as long as every other, and so does every chunk. For tests, and for measured figures.

    `helped_step_s`: with helpers, however many (None: they change nothing). `spread_chunk_s`: where several decoders
    share a chunk. `conditioning_s` and `latents_s`: to fetch them.
    """

    encode_s: float = 0.0
    step_s: float = 1.0
    chunk_s: float = 1.0
    helped_step_s: float | None = None
    spread_chunk_s: float | None = None
    conditioning_s: float = 0.0
    latents_s: float = 0.0

    def pieces(self, command: messages.Command) -> Sequence[Piece]:
        match command:
            case messages.Encode():
                return [Piece(what=ENCODE, seconds=self.encode_s)]
            case messages.Denoise():
                is_fetched = command.step == 0 and command.conditioning_at is not None
                helped = command.aco is not None and self.helped_step_s is not None
                seconds = self.helped_step_s if helped and self.helped_step_s is not None else self.step_s
                steps = [Piece(what=STEP, seconds=seconds, index=index) for index in range(command.num_steps)]
                return [*_fetch(self.conditioning_s, is_fetched), *steps]
            case messages.Decode():
                is_fetched = command.chunk == 0 and command.latents_at is not None
                spread = len(command.ranks) > 1 and self.spread_chunk_s is not None
                seconds = self.spread_chunk_s if spread and self.spread_chunk_s is not None else self.chunk_s
                chunks = [Piece(what=DECODE, seconds=seconds, index=index) for index in range(command.num_chunks)]
                return [*_fetch(self.latents_s, is_fetched), *chunks]
        return []


def _fetch(seconds: float, is_fetched: bool) -> list[Piece]:
    return [Piece(what=FETCH, seconds=seconds)] if is_fetched and seconds else []
