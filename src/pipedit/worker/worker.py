"""A worker: holds the stages of its roles and the state of each request, and answers commands.

Knows nothing of other requests' order, of time limits, or of how commands reach it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipedit.core import messages
from pipedit.core.errors import InsufficientMemoryError
from pipedit.core.placement import Role
from pipedit.core.request import VideoRequest
from pipedit.core.spans import Span
from pipedit.models.adapter import DecodeStage, DenoiseStage, ModelAdapter, TextStage
from pipedit.parallel.rows import ChannelRows
from pipedit.parallel.runtime import ParallelRuntime
from pipedit.worker.settings import WorkerSettings

Clock = Callable[[], float]


@dataclasses.dataclass(kw_only=True)
class _Held:
    """What a worker keeps for one request between commands."""

    request: VideoRequest
    conditioning: dict[str, torch.Tensor] | None = None
    denoising: Any = None
    decoding: Any = None


class Worker:
    """`load` first, then `handle` one command after the other; never two at a time.

    With `parallel` the worker shares its denoising with other ranks, with `decode_group` its decoding: all of them get
    the same commands in the same order, and a step or a chunk waits for the others.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        settings: WorkerSettings,
        *,
        rank: int = 0,
        roles: tuple[Role, ...] = tuple(Role),
        parallel: ParallelRuntime | None = None,
        decode_group: ChannelRows | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._adapter, self._settings, self._parallel = adapter, settings, parallel
        self._rank, self._roles, self._clock, self._decode_group = rank, roles, clock, decode_group
        self._held: dict[str, _Held] = {}
        self._text: TextStage | None = None
        self._denoise: DenoiseStage | None = None
        self._decode: DecodeStage | None = None

    def load(self) -> tuple[Span, ...]:
        """Loads the stages of the worker's roles; one span for each."""
        with _naming_lack_of_memory(self._settings.device):
            return self._load()

    def _load(self) -> tuple[Span, ...]:
        device, precision = self._settings.device, self._settings.precision
        spans = []
        if Role.ENCODER in self._roles:
            start = self._clock()
            self._text = self._adapter.load_text_stage(device, precision)
            spans.append(self._span("", Role.ENCODER, "load", start))
        if Role.DENOISER in self._roles:
            start = self._clock()
            self._denoise = self._adapter.load_denoise_stage(device, precision)
            if self._parallel is not None:
                self._denoise.attach(self._parallel)
            if self._settings.compile_layers:
                self._denoise.compile_layers()
            spans.append(self._span("", Role.DENOISER, "load", start))
        if Role.DECODER in self._roles:
            start = self._clock()
            self._decode = self._adapter.load_decode_stage(device, precision, tiling=self._settings.vae_tiling)
            if self._decode_group is not None:
                self._decode.attach(self._decode_group)
            spans.append(self._span("", Role.DECODER, "load", start))
        return tuple(spans)

    def handle(self, command: messages.Command) -> messages.Event:
        """Runs one command. Errors of the work itself raise; the executor turns them into CommandFailed."""
        with _naming_lack_of_memory(self._settings.device):
            return self._run(command)

    def _run(self, command: messages.Command) -> messages.Event:
        match command:
            case messages.Encode():
                return self._run_encode(command)
            case messages.Denoise():
                return self._run_step(command)
            case messages.Decode():
                return self._run_decode(command)
            case messages.Release():
                return self._run_release(command)
        raise AssertionError(f"unknown command {command}")

    def _run_encode(self, command: messages.Encode) -> messages.Event:
        assert self._text is not None
        start = self._clock()
        held = _Held(request=command.request, conditioning=self._text.encode(command.request))
        self._held[command.request_id] = held
        self._synchronize()
        span = self._span(command.request_id, Role.ENCODER, "encode", start)
        return messages.Encoded(request_id=command.request_id, rank=self._rank, spans=(span,))

    def _run_step(self, command: messages.Denoise) -> messages.Event:
        assert self._denoise is not None
        start, held = self._clock(), self._held[command.request_id]
        if self._parallel is not None:
            self._parallel.use(command.parallel)
        if command.step == 0:
            assert held.conditioning is not None
            held.denoising = self._denoise.begin(held.request, held.conditioning)
            held.conditioning = None
        self._denoise.step(held.denoising, command.step)
        self._synchronize()
        span = self._span(command.request_id, Role.DENOISER, "step", start, command.step)
        return messages.StepDone(request_id=command.request_id, rank=self._rank, spans=(span,), step=command.step)

    def _run_decode(self, command: messages.Decode) -> messages.Event:
        assert self._decode is not None
        start, held = self._clock(), self._held[command.request_id]
        if command.chunk == 0:
            assert self._denoise is not None
            held.decoding = self._decode.begin(held.request, self._denoise.latents(held.denoising))
            held.denoising = None
        frames = self._decode.chunk(held.decoding, command.chunk)
        self._synchronize()  # frames are on the host by now, but other ranks may still be at their part
        if self._rank != command.ranks[0]:
            frames = None  # the first rank answers for the output
        span = self._span(command.request_id, Role.DECODER, "decode", start, command.chunk)
        return messages.ChunkDecoded(
            request_id=command.request_id, rank=self._rank, spans=(span,), chunk=command.chunk, frames=frames
        )

    def _run_release(self, command: messages.Release) -> messages.Event:
        self._held.pop(command.request_id, None)
        # A rank that failed in the midst of an exchange has left messages behind, which must not be taken for those of
        # the next request: every rank goes on with fresh process groups.
        if command.after_failure and self._parallel is not None:
            self._parallel.reset()
        if command.after_failure and self._decode_group is not None:
            self._decode_group.reset()
        return messages.Released(request_id=command.request_id, rank=self._rank)

    def _synchronize(self) -> None:
        """Waits for the device, so that a span ends when the work does and a cancel takes hold within one step."""
        if self._settings.device.startswith("cuda"):
            torch.cuda.synchronize(self._settings.device)

    def _span(self, request_id: str, role: Role, what: str, start_s: float, index: int | None = None) -> Span:
        return Span(
            request_id=request_id,
            rank=self._rank,
            role=role,
            what=what,
            start_s=start_s,
            end_s=self._clock(),
            index=index,
        )


@contextlib.contextmanager
def _naming_lack_of_memory(device: str) -> Iterator[None]:
    """Turns the several ways in which an allocation fails into one error that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # The CPU allocator raises a plain RuntimeError, which only its text tells from others.
        is_memory = not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError)
        if not is_memory and "can't allocate memory" not in str(error):
            raise
        raise InsufficientMemoryError(
            f"{device} ran out of memory: take fewer frames, a smaller picture, or spatial tiling of the VAE"
        ) from error
