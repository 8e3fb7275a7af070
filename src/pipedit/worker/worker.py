"""A worker: holds the stages of its roles and the state of each request, and answers commands.

Knows nothing of other requests' order, of time limits, or of how commands reach it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pipedit.core import messages
from pipedit.core.placement import Placement, Role
from pipedit.core.spans import Span
from pipedit.models.adapter import ModelAdapter
from pipedit.parallel.rows import ChannelRows
from pipedit.parallel.runtime import ParallelRuntime
from pipedit.worker.device import peak_bytes
from pipedit.worker.run import Clock, Run, naming_lack_of_memory, synchronize
from pipedit.worker.settings import WorkerSettings
from pipedit.worker.shelf import CONDITIONING, LATENTS, Shelf
from pipedit.worker.stages import Stages

_ALONE = Placement.colocated(1)


@dataclasses.dataclass(kw_only=True)
class _Held:
    """What a worker keeps for one request between commands: each until it has turned into the next."""

    conditioning: dict[str, torch.Tensor] | None = None
    denoising: Any = None
    latents: torch.Tensor | None = None
    decoding: Any = None


class Worker:
    """`load` first, then `handle` one command after the other, never two at a time; `recover` after one that
    has failed; `close` at the end.

    With `parallel` the worker shares its denoising with other ranks, with `decode_group` its decoding, where a command
    is for several: all of them get the same one, and a step or a chunk waits for the others. What is made here and
    needed elsewhere, or the other way round, goes over the `shelf`. Several requests may be at any stage at a time.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        settings: WorkerSettings,
        *,
        rank: int = 0,
        placement: Placement = _ALONE,
        parallel: ParallelRuntime | None = None,
        decode_group: ChannelRows | None = None,
        shelf: Shelf | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._adapter, self._settings, self._rank, self._placement = adapter, settings, rank, placement
        self._parallel, self._decode_group, self._clock = parallel, decode_group, clock
        self._shelf = shelf or Shelf(rank=rank, device=settings.device)
        self._stages = Stages(adapter, settings, placement.roles(rank))
        self._held: dict[str, _Held] = {}
        self._broken: ParallelRuntime | ChannelRows | None = None

    def load(self) -> tuple[Span, ...]:
        """Loads the stages of the worker's roles; one span for each."""
        run, start = self._begin(""), self._clock()
        with naming_lack_of_memory(self._settings.device):
            for role in self._stages.load(self._parallel):
                run.note(role, "load", start)
                start = self._clock()
        return tuple(run.spans)

    def handle(self, command: messages.Command) -> messages.Event:
        """Runs one command. Errors of the work itself raise; the executor turns them into CommandFailed."""
        with naming_lack_of_memory(self._settings.device):
            event = self._run(command)
        return dataclasses.replace(event, peak_bytes=peak_bytes(self._settings.device))

    def recover(self) -> None:
        """After a command has failed, and whoever gave it knows: closes the process groups that it used, so that ranks
        which wait for this one fail too instead of for ever (on CUDA they wait until they are stopped). The scheduler
        goes on in a new epoch, for which new ones are made."""
        broken, self._broken = self._broken, None
        if broken is not None:
            broken.reset()

    def close(self) -> None:
        """Leaves no thread, no socket and no process group. Can be called twice."""
        self._held.clear()
        self._shelf.close()
        if self._parallel is not None:
            self._parallel.close()
        if self._decode_group is not None:
            self._decode_group.close()

    def _run(self, command: messages.Command) -> messages.Event:
        match command:
            case messages.Encode():
                return self._run_encode(command)
            case messages.Denoise():
                with self._noting_what_breaks(command):
                    return self._run_denoise(command)
            case messages.Decode():
                with self._noting_what_breaks(command):
                    return self._run_decode(command)
            case messages.Release():
                return self._run_release(command)
        raise AssertionError(f"unknown command {command}")

    # -- one command each ---------------------------------------------------------------------------------------

    def _run_encode(self, command: messages.Encode) -> messages.Event:
        run, stage, denoisers = self._begin(command.request_id), self._stages.text, self._placement.denoisers
        self._bring(run, Role.ENCODER, stage.modules)
        start = self._clock()
        conditioning = stage.encode(command.request)
        self._synchronize()
        run.note(Role.ENCODER, "encode", start)
        self._send_home()
        if self._rank in denoisers:
            self._hold(command).conditioning = conditioning
        if not self._placement.encodes_locally:
            self._shelf.put(command.request_id, CONDITIONING, conditioning)
        return messages.Encoded(**run.answer(), text_tokens=stage.joint_tokens(conditioning))

    def _run_denoise(self, command: messages.Denoise) -> messages.Event:
        run, steps = self._begin(command.request_id), range(command.step, command.step + command.num_steps)
        if self._parallel is not None:
            self._parallel.use(command.parallel, aco=command.aco, epoch=command.epoch)
        if self._rank in self._placement.denoisers:
            self._denoise(run, command, steps)
        else:
            self._help(run, command, steps)
        return messages.StepDone(**run.answer(), step=steps[-1])

    def _denoise(self, run: Run, command: messages.Denoise, steps: range) -> None:
        stage, held, request = self._stages.denoise, self._hold(command), command.request
        if 0 in steps and command.conditioning_at is not None:
            held.conditioning = self._fetch(run, Role.DENOISER, command.conditioning_at, CONDITIONING)
        for step in steps:
            start = self._clock()
            if step == 0:
                assert held.conditioning is not None, "nothing was encoded"
                held.denoising, held.conditioning = stage.begin(request, held.conditioning), None
            if self._bring(run, Role.DENOISER, stage.modules_of_step(held.denoising, step)):
                start = self._clock()
            stage.step(held.denoising, step)
            self._synchronize()
            run.note(Role.DENOISER, "step", start, step)
        if steps[-1] + 1 == request.num_inference_steps:
            self._finish_denoising(command.request_id, held)

    def _finish_denoising(self, request_id: str, held: _Held) -> None:
        """Clean latents stay with decoders that have denoised; where others decode, they wait on the shelf of the first
        denoiser."""
        latents, held.denoising = self._stages.denoise.latents(held.denoising), None
        self._send_home()
        if self._placement.decodes_locally:
            held.latents = latents if self._rank in self._placement.decoders else None
        elif self._rank == self._placement.denoisers[0]:
            self._shelf.put(request_id, LATENTS, {LATENTS: latents})

    def _help(self, run: Run, command: messages.Denoise, steps: range) -> None:
        """Takes heads of the steps' attention for denoisers. Keeps nothing."""
        assert self._parallel is not None and command.aco is not None, command
        precision = self._settings.precision
        forwards = self._adapter.attention_forwards(command.request, precision, command.aco.text_tokens)
        for step in steps:
            start = self._clock()
            self._parallel.help(forwards)
            self._synchronize()
            run.note(Role.DECODER, "help", start, step)

    def _run_decode(self, command: messages.Decode) -> messages.Event:
        run, stage, held = self._begin(command.request_id), self._stages.decode, self._hold(command)
        chunks = range(command.chunk, command.chunk + command.num_chunks)
        group = self._group_of(command)
        if 0 in chunks and command.latents_at is not None:
            held.latents = self._fetch(run, Role.DECODER, command.latents_at, LATENTS)[LATENTS]
        self._bring(run, Role.DECODER, stage.modules)
        pieces = []
        for chunk in chunks:
            start = self._clock()
            if chunk == 0:
                assert held.latents is not None, "nothing was denoised"
                held.decoding, held.latents = stage.begin(command.request, held.latents, group), None
            pieces.append(stage.chunk(held.decoding, chunk))
            self._synchronize()  # frames are on the host by now, but other ranks may still be at their part
            run.note(Role.DECODER, "decode", start, chunk)
        if chunks[-1] + 1 == self._adapter.num_decode_chunks(command.request, len(command.ranks)):
            held.decoding = None
            self._send_home()
        frames = _joined(pieces) if self._rank == command.ranks[0] else None  # the first one answers for the output
        return messages.ChunkDecoded(**run.answer(), chunk=chunks[-1], frames=frames)

    def _run_release(self, command: messages.Release) -> messages.Event:
        self._held.pop(command.request_id, None)
        self._shelf.drop(command.request_id)
        if not self._held:
            self._send_home()
        return messages.Released(request_id=command.request_id, rank=self._rank)

    # -- what commands have in common ---------------------------------------------------------------------------

    def _begin(self, request_id: str) -> Run:
        return Run(request_id=request_id, rank=self._rank, clock=self._clock)

    def _hold(self, command: messages.Command) -> _Held:
        return self._held.setdefault(command.request_id, _Held())

    def _group_of(self, command: messages.Decode) -> ChannelRows | None:
        """Those who share the decode: nobody, or all decoders."""
        if len(command.ranks) == 1:
            return None
        assert self._decode_group is not None and command.ranks == self._placement.decoders, command
        self._decode_group.begin(command.epoch)
        return self._decode_group

    @contextlib.contextmanager
    def _noting_what_breaks(self, command: messages.Exchanging) -> Iterator[None]:
        """For `recover`."""
        try:
            yield
        except BaseException:
            if len(command.ranks) > 1:
                self._broken = self._parallel if isinstance(command, messages.Denoise) else self._decode_group
            raise

    def _fetch(self, run: Run, role: Role, rank: int, kind: str) -> dict[str, torch.Tensor]:
        start = self._clock()
        tensors = self._shelf.fetch(rank, run.request_id, kind)
        self._synchronize()
        run.note(role, "fetch", start, payload_bytes=sum(tensor.nbytes for tensor in tensors.values()))
        return tensors

    def _bring(self, run: Run, role: Role, modules: Sequence[nn.Module]) -> bool:
        """With offloading: these weights to the device, all others from it. Returns whether any had to come."""
        if self._stages.residence is None:
            return False
        start = self._clock()
        copied = self._stages.residence.bring(modules)
        if copied:
            run.note(role, "onload", start, payload_bytes=copied)
        return copied > 0

    def _send_home(self) -> None:
        if self._stages.residence is not None:
            self._stages.residence.clear()

    def _synchronize(self) -> None:
        synchronize(self._settings.device)


def _joined(
    pieces: Sequence["np.ndarray[Any, np.dtype[np.uint8]] | None"],
) -> "np.ndarray[Any, np.dtype[np.uint8]] | None":
    present = [piece for piece in pieces if piece is not None]
    return np.concatenate(present) if len(present) > 1 else next(iter(present), None)
