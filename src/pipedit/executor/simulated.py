"""An executor that does no work: every command succeeds, and frames are plain grey ramps.

It ships, so that the engine, the command line and later the server can be run and tested without a model or torch.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from pipedit.core import messages
from pipedit.core.errors import WorkerDiedError
from pipedit.core.messages import Command, Event
from pipedit.core.placement import Role
from pipedit.core.spans import Span


class SimulatedExecutor:
    """`failing` may raise to make a command fail; with WorkerDiedError all ranks die. `step_s`: how long a step, a
    chunk or another command takes, on a clock of its own: a number, or what the command at hand takes for each. Ranks
    work at the same time, and events come in the order in which their commands end. `text_tokens`: see
    messages.Encoded."""

    def __init__(
        self,
        *,
        frames_per_chunk: int = 4,
        step_s: float | Callable[[Command], float] = 0.01,
        failing: Callable[[Command], None] | None = None,
        text_tokens: tuple[int, ...] = (0,),
    ) -> None:
        self._frames_per_chunk, self._failing, self._text_tokens = frames_per_chunk, failing, text_tokens
        self._seconds_of = step_s if callable(step_s) else lambda _command: step_s
        self._now_s = 0.0
        self._free_at_s: dict[int, float] = {}
        # By when it ends, then by when it was sent.
        self._waiting: list[tuple[float, int, float, Command, int]] = []
        self._numbers = itertools.count()
        self.sent: list[Command] = []

    def start(self, timeout_s: float) -> Sequence[Span]:
        return ()

    def check(self) -> None:
        """Nobody can die here."""

    def send(self, command: Command) -> None:
        self.sent.append(command)
        start_s = max(self._now_s, *(self._free_at_s.get(rank, 0.0) for rank in command.ranks))
        end_s = start_s + self._seconds_of(command) * len(_units(command))
        for rank in command.ranks:
            self._free_at_s[rank] = end_s
            heapq.heappush(self._waiting, (end_s, next(self._numbers), start_s, command, rank))

    def receive(self, timeout_s: float) -> Sequence[Event]:
        if not self._waiting:
            return ()
        self._now_s, _, start_s, command, rank = heapq.heappop(self._waiting)
        try:
            if self._failing is not None:
                self._failing(command)
        except WorkerDiedError:
            self.stop(0.0)
            raise
        except Exception as error:  # noqa: BLE001 - the caller's own
            return (messages.CommandFailed(request_id=command.request_id, rank=rank, doing="simulating", error=error),)
        return (self._answer(command, rank, start_s),)

    def stop(self, timeout_s: float) -> None:
        self._waiting.clear()
        self._free_at_s.clear()

    def _answer(self, command: Command, rank: int, start_s: float) -> Event:
        request_id, units = command.request_id, _units(command)
        match command:
            case messages.Encode():
                spans = self._spans(command, rank, start_s, Role.ENCODER, "encode")
                return messages.Encoded(request_id=request_id, rank=rank, spans=spans, text_tokens=self._text_tokens)
            case messages.Denoise():
                helps = command.aco is not None and any(rank in group for group in command.aco.helpers)
                role, what = (Role.DECODER, "help") if helps else (Role.DENOISER, "step")
                spans = self._spans(command, rank, start_s, role, what)
                return messages.StepDone(request_id=request_id, rank=rank, spans=spans, step=units[-1])
            case messages.Decode():
                spans = self._spans(command, rank, start_s, Role.DECODER, "decode")
                frames = self._frames(command) if rank == command.ranks[0] else None
                return messages.ChunkDecoded(
                    request_id=request_id, rank=rank, spans=spans, chunk=units[-1], frames=frames
                )
        return messages.Released(request_id=request_id, rank=rank)

    def _frames(self, command: messages.Decode) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
        request = command.request
        height, width = request.height or 16, request.width or 16
        chunks = []
        for chunk in _units(command):
            count = 1 if chunk == 0 else self._frames_per_chunk
            chunks.append(np.full((count, height, width, 3), (chunk * 16) % 256, dtype=np.uint8))
        return np.concatenate(chunks)

    def _spans(self, command: Command, rank: int, start_s: float, role: Role, what: str) -> tuple[Span, ...]:
        """One for each step or chunk."""
        seconds = self._seconds_of(command)
        return tuple(
            Span(
                request_id=command.request_id, rank=rank, role=role, what=what, start_s=start_s + number * seconds,
                end_s=start_s + (number + 1) * seconds, index=None if isinstance(command, messages.Encode) else index,
            )
            for number, index in enumerate(_units(command))
        )  # fmt: skip


def _units(command: Command) -> range:
    """Steps or chunks that the command asks for, by their indices; anything else is one unit."""
    match command:
        case messages.Denoise():
            return range(command.step, command.step + command.num_steps)
        case messages.Decode():
            return range(command.chunk, command.chunk + command.num_chunks)
    return range(1)
