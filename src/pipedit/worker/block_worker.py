"""A worker of videos that are made block by block: a stage of the layer pipeline, the encoder, the decoder, or several
of them. Answers commands like the other kind (see worker.py), and knows as little of how they reach it."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipedit.core import messages
from pipedit.core.blocks import Storage
from pipedit.core.placement import Placement, Role
from pipedit.core.snapshots import rank_file
from pipedit.core.spans import Span
from pipedit.models.adapter import ModelAdapter
from pipedit.parallel.context_attention import ContextAttention
from pipedit.parallel.rotation import turn
from pipedit.parallel.runtime import ParallelRuntime
from pipedit.worker.block_denoiser import FinishedBlock
from pipedit.worker.block_prompts import encode_all
from pipedit.worker.block_work import BlockDecoder, BlockStageWork, Ring
from pipedit.worker.device import peak_bytes
from pipedit.worker.run import Clock, Run, naming_lack_of_memory, synchronize
from pipedit.worker.settings import WorkerSettings
from pipedit.worker.shelf import CONDITIONING, LATENTS, Shelf
from pipedit.worker.snapshot_files import read_tree, write_tree
from pipedit.worker.stages import Stages

Frames = np.ndarray[Any, np.dtype[np.uint8]]
_DECODED_SINCE = 64  # blocks, at least as many as are decoded between two commands to the first stage


class BlockWorker:
    """`load` first, then `handle` one command after the other; `recover` after one that has failed; `close` at the end.

    `ring`: the stages of the layer pipeline; this rank need not be one of them. One video is denoised at a time.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        settings: WorkerSettings,
        *,
        rank: int,
        placement: Placement,
        ring: Ring,
        shelf: Shelf,
        clock: Clock,
    ) -> None:
        self._adapter, self._settings, self._rank, self._placement = adapter, settings, rank, placement
        self._ring, self._shelf, self._clock = ring, shelf, clock
        self._stages = Stages(adapter, settings, placement.roles(rank), layers=ring.layers(adapter.layer_split()))
        self._work: BlockStageWork | None = None
        self._decoders: dict[str, BlockDecoder] = {}

    def load(self) -> tuple[Span, ...]:
        """Loads the stages of the worker's roles, of the denoiser its own layers only; one span for each."""
        run, start = self._begin(""), self._clock()
        with naming_lack_of_memory(self._settings.device):
            for role in self._stages.load(None):
                run.note(role, "load", start)
                start = self._clock()
        if self._rank in self._placement.denoisers:
            self._work = self._stage_work()
        return tuple(run.spans)

    def handle(self, command: messages.Command) -> messages.Event:
        """Runs one command. Errors of the work itself raise; the executor turns them into CommandFailed."""
        with naming_lack_of_memory(self._settings.device):
            event = self._run(command)
        return dataclasses.replace(event, peak_bytes=peak_bytes(self._settings.device))

    def recover(self) -> None:
        """After a command has failed, and whoever gave it knows: stages that wait for this one now fail too."""
        if self._work is not None:
            self._work.recover()

    def close(self) -> None:
        """Leaves no thread, no socket and no process group. Can be called twice."""
        self._decoders.clear()
        self._shelf.close()
        if self._work is not None:
            self._work.close()

    def _stage_work(self) -> BlockStageWork:
        stage = self._stages.block
        rotation, storage = stage.rotation, Storage(self._settings.context_storage)
        context = ContextAttention(lambda keys, frames: turn(keys, frames, rotation), storage)
        alone = ParallelRuntime(
            ranks=(self._rank,), rank=self._rank, device=self._settings.device, open_channel=_nobody_else
        )
        alone.take_keys_from(context)
        stage.attach(alone)
        if self._settings.compile_layers:
            stage.compile_layers()
        return BlockStageWork(self._adapter, stage, self._ring, context, self._clock)

    def _run(self, command: messages.Command) -> messages.Event:
        match command:
            case messages.Encode():
                return self._run_encode(command)
            case messages.DenoiseBlocks():
                return self._run_denoise(command)
            case messages.DecodeBlock():
                return self._run_decode(command)
            case messages.SaveBlocks():
                return self._run_save(command)
            case messages.Release():
                return self._run_release(command)
        raise AssertionError(f"unknown command {command}")

    # -- one command each ---------------------------------------------------------------------------------------

    def _run_encode(self, command: messages.Encode) -> messages.Event:
        run, stage, start = self._begin(command.request_id), self._stages.text, self._clock()
        conditioning = encode_all(command.request, stage.encode)
        synchronize(self._settings.device)
        run.note(Role.ENCODER, "encode", start)
        self._shelf.put(command.request_id, CONDITIONING, conditioning)
        return messages.Encoded(**run.answer())

    def _run_denoise(self, command: messages.DenoiseBlocks) -> messages.Event:
        run, work = self._begin(command.request_id), self._work
        assert work is not None, f"rank {self._rank} is no stage"
        if command.first == 0 or command.resume is not None:
            work.meet(command.epoch)  # before anything that can fail: else the others would wait for this one
            source = self._rank if command.conditioning_at is None else command.conditioning_at
            with self._fetching(run, Role.DENOISER):
                conditioning = self._shelf.fetch(source, command.request_id, CONDITIONING)
            work.begin(command.request_id, command, conditioning, self._saved_denoising(command))
        for block in range(max(command.decoded - _DECODED_SINCE, 0), command.decoded):
            self._shelf.drop_kind(command.request_id, _latents_of(block))
        for ran in work.run(command, lambda block: self._shelve(command.request_id, block)):
            for start_s, end_s in ran.passes:
                run.note(Role.DENOISER, "step", start_s, ran.op.step, end_s=end_s, block=ran.op.block)
        return messages.BlocksDone(**run.answer(), done=command.first + command.count, finished=work.finished)

    def _run_decode(self, command: messages.DecodeBlock) -> messages.Event:
        run, request_id = self._begin(command.request_id), command.request_id
        with self._fetching(run, Role.DECODER):
            fetched = self._shelf.fetch(command.latents_at, request_id, _latents_of(command.block))
        if command.resume is not None:
            self._decoders[request_id] = self._saved_decoder(command, command.resume)
        elif command.block == 0:
            self._decoders[request_id] = BlockDecoder(self._adapter, self._stages.decode, command.request)
        start, is_last = self._clock(), command.block + 1 == command.blocks.num_blocks
        pieces = list(self._decoders[request_id].add(fetched[LATENTS], is_last=is_last))
        run.note(Role.DECODER, "decode", start, command.block, block=command.block)
        frames_now = np.concatenate(pieces) if pieces else None
        return messages.BlockDecoded(**run.answer(), block=command.block, frames=frames_now)

    def _run_release(self, command: messages.Release) -> messages.Event:
        if self._work is not None:
            self._work.end(failed=command.failed)
        self._decoders.pop(command.request_id, None)
        self._shelf.drop(command.request_id)
        return messages.Released(request_id=command.request_id, rank=self._rank)

    # -- snapshots ----------------------------------------------------------------------------------------------

    def _run_save(self, command: messages.SaveBlocks) -> messages.Event:
        run, request_id, start = self._begin(command.request_id), command.request_id, self._clock()
        work, decoder, finished = self._work, self._decoders.get(command.request_id), 0
        tree: dict[str, Any] = {}
        if work is not None:
            tree["denoising"] = work.save(command.at, lambda block: self._shelve(request_id, block))
            finished = work.finished
            kinds = {block: _latents_of(block) for block in range(command.decoded, finished)}
            shelved = {b: self._shelf.fetch(self._rank, request_id, kind)[LATENTS] for b, kind in kinds.items()}
            tree["shelved"] = [{"block": block, "latents": latents} for block, latents in shelved.items()]
        if decoder is not None:
            tree["decoding"] = decoder.save()
        path = rank_file(Path(command.path), self._rank)
        num_bytes = write_tree(path, tree, self._label(command, at=command.at, decoded=command.decoded))
        role = Role.DECODER if work is None else Role.DENOISER
        run.note(role, "save", start, command.at, num_bytes)
        return messages.BlocksSaved(**run.answer(), at=command.at, num_bytes=num_bytes, finished=finished)

    def _saved_denoising(self, command: messages.DenoiseBlocks) -> dict[str, Any] | None:
        """What the stage was at in the snapshot that the command names; finished blocks lie on the shelf again."""
        if command.resume is None:
            return None
        path = rank_file(Path(command.resume), self._rank)
        tree = read_tree(path, self._label(command, at=command.first))
        for each in tree["shelved"]:
            self._shelve(command.request_id, FinishedBlock(block=each["block"], latents=each["latents"]))
        denoising: dict[str, Any] = tree["denoising"]
        return denoising

    def _saved_decoder(self, command: messages.DecodeBlock, resume: str) -> BlockDecoder:
        tree = read_tree(rank_file(Path(resume), self._rank), self._label(command, decoded=command.block))
        return BlockDecoder.restore(self._adapter, self._stages.decode, command.request, tree["decoding"])

    def _label(
        self, command: messages.SaveBlocks | messages.DenoiseBlocks | messages.DecodeBlock, **counts: int
    ) -> dict[str, Any]:
        """What a file of a snapshot is of."""
        video = {"request": dataclasses.asdict(command.request), "blocks": dataclasses.asdict(command.blocks)}
        return {"rank": self._rank, "placement": dataclasses.asdict(self._placement), **video, **counts}

    # -- what commands have in common ---------------------------------------------------------------------------

    def _begin(self, request_id: str) -> Run:
        return Run(request_id=request_id, rank=self._rank, clock=self._clock)

    def _shelve(self, request_id: str, block: FinishedBlock) -> None:
        self._shelf.put(request_id, _latents_of(block.block), {LATENTS: block.latents})

    @contextlib.contextmanager
    def _fetching(self, run: Run, role: Role) -> Iterator[None]:
        start = self._clock()
        yield
        synchronize(self._settings.device)
        run.note(role, "fetch", start)


def _latents_of(block: int) -> str:
    return f"{LATENTS} of block {block}"


def _nobody_else(name: str, members: object) -> Any:
    raise AssertionError(f"a stage is alone in its layers; it needs no channel {name} to {members}")
