"""An executor that does no work: every command succeeds at once, and frames are plain grey ramps.

It ships, so that the engine, the command line and later the server can be run and tested without a model or torch.
"""

import collections
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from pipedit.core import messages
from pipedit.core.messages import Command, Event
from pipedit.core.spans import Span


class SimulatedExecutor:
    """`failing` may raise to make a command fail; time advances by `step_s` a command on a clock of its own."""

    def __init__(
        self, *, frames_per_chunk: int = 4, step_s: float = 0.01, failing: Callable[[Command], None] | None = None
    ) -> None:
        self._frames_per_chunk, self._step_s, self._failing = frames_per_chunk, step_s, failing
        self._waiting: collections.deque[tuple[Command, int]] = collections.deque()
        self._requests: dict[str, tuple[int, int]] = {}  # height and width
        self._ticks = itertools.count()
        self.sent: list[Command] = []

    def start(self, timeout_s: float) -> Sequence[Span]:
        return ()

    def check(self) -> None:
        """Nobody can die here."""

    def send(self, command: Command) -> None:
        self.sent.append(command)
        self._waiting.extend((command, rank) for rank in command.ranks)

    def receive(self, timeout_s: float) -> Sequence[Event]:
        if not self._waiting:
            return ()
        command, rank = self._waiting.popleft()
        try:
            if self._failing is not None:
                self._failing(command)
        except Exception as error:  # noqa: BLE001 - the caller's own
            return (messages.CommandFailed(request_id=command.request_id, rank=rank, doing="simulating", error=error),)
        return (self._answer(command, rank),)

    def stop(self, timeout_s: float) -> None:
        self._waiting.clear()

    def _answer(self, command: Command, rank: int) -> Event:
        match command:
            case messages.Encode():
                request = command.request
                self._requests[command.request_id] = (request.height or 16, request.width or 16)
                spans = self._span(command, rank, "encoder", "encode", None)
                return messages.Encoded(request_id=command.request_id, rank=rank, spans=spans)
            case messages.Denoise():
                spans = self._span(command, rank, "denoiser", "step", command.step)
                return messages.StepDone(request_id=command.request_id, rank=rank, spans=spans, step=command.step)
            case messages.Decode():
                spans = self._span(command, rank, "decoder", "decode", command.chunk)
                frames = self._frames(command) if rank == command.ranks[0] else None
                return messages.ChunkDecoded(
                    request_id=command.request_id, rank=rank, spans=spans, chunk=command.chunk, frames=frames
                )
        self._requests.pop(command.request_id, None)
        return messages.Released(request_id=command.request_id, rank=rank)

    def _frames(self, command: messages.Decode) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
        count = 1 if command.chunk == 0 else self._frames_per_chunk
        height, width = self._requests[command.request_id]
        return np.full((count, height, width, 3), (command.chunk * 16) % 256, dtype=np.uint8)

    def _span(self, command: Command, rank: int, role: str, what: str, index: int | None) -> tuple[Span, ...]:
        start = next(self._ticks) * self._step_s
        return (
            Span(
                request_id=command.request_id, rank=rank, role=role, what=what, start_s=start,
                end_s=start + self._step_s, index=index,
            ),
        )  # fmt: skip
