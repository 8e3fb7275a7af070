"""Workers of videos that are made block by block, as threads of this process on a tiny model, given commands as the
scheduler gives them, but each piece to all stages at once and waited for."""

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributed import HashStore  # type: ignore[attr-defined]

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.models.adapter import ModelAdapter
from pipedit.models.registry import open_model
from pipedit.parallel.groups import channel_opener
from pipedit.worker.block_work import Ring
from pipedit.worker.block_worker import BlockWorker
from pipedit.worker.settings import WorkerSettings
from pipedit.worker.shelf import Neighbours, Shelf

TIMEOUT_S = 60.0
Frames = np.ndarray[Any, np.dtype[np.uint8]]


def stages_of(count: int, *, decoder: int | None = None) -> Placement:
    """So many stages. The last one decodes, or the rank `decoder`."""
    if count == 1 and decoder is None:
        return Placement.colocated(1)
    decoder = count - 1 if decoder is None else decoder
    return Placement(encoders=(0,), denoisers=tuple(range(count)), decoders=(decoder,))


@dataclasses.dataclass(kw_only=True)
class BlockCrew:
    """The workers of a placement. `events` keeps the answers to the last command that was given to each."""

    adapter: ModelAdapter
    placement: Placement
    workers: list[BlockWorker]
    threads: ThreadPoolExecutor
    epoch: int = 0

    def run(self, commands: Sequence[messages.Command]) -> list[messages.Event]:
        """All at once, each on its rank; raises what was raised first."""
        futures = [self.threads.submit(self._handle, command) for command in commands]
        for future in as_completed(futures, TIMEOUT_S):
            future.result()
        return [future.result() for future in futures]

    def _handle(self, command: messages.Command) -> messages.Event:
        (rank,) = command.ranks
        try:
            return self.workers[rank].handle(command)
        except BaseException:
            self.workers[rank].recover()
            raise


@dataclasses.dataclass(kw_only=True)
class Making:
    """A video under way. `done` operations and `decoded` blocks count from the beginning of the video, not from that
    of this run."""

    crew: BlockCrew
    request_id: str
    request: VideoRequest
    plan: BlockPlan
    done: int = 0
    finished: int = 0
    decoded: int = 0
    resume: Path | None = None
    frames: list[Frames] = dataclasses.field(default_factory=list)
    _begun: set[type[messages.Command]] = dataclasses.field(default_factory=set)

    def encode(self) -> None:
        (rank,) = self.crew.placement.encoders
        self.crew.run([messages.Encode(request_id=self.request_id, ranks=(rank,), request=self.request)])

    def denoise(self, count: int) -> None:
        """The next operations."""
        (encoder,), resume = self.crew.placement.encoders, self._from(messages.DenoiseBlocks)
        commands = [
            messages.DenoiseBlocks(
                request_id=self.request_id, ranks=(rank,), request=self.request, epoch=self.crew.epoch,
                first=self.done, count=count, blocks=self.plan, conditioning_at=encoder, decoded=self.decoded,
                resume=resume,
            )
            for rank in self.crew.placement.denoisers
        ]  # fmt: skip
        first, *_ = self.crew.run(commands)
        assert isinstance(first, messages.BlocksDone)
        self.done, self.finished = first.done, first.finished

    def decode(self) -> None:
        """Everything that is finished."""
        while self.decoded < self.finished:
            command = messages.DecodeBlock(
                request_id=self.request_id, ranks=self.crew.placement.decoders, request=self.request,
                epoch=self.crew.epoch, block=self.decoded, blocks=self.plan,
                latents_at=self.crew.placement.denoisers[0],
                resume=self._from(messages.DecodeBlock) if self.decoded else None,
            )  # fmt: skip
            self._begun.add(messages.DecodeBlock)
            (event,) = self.crew.run([command])
            assert isinstance(event, messages.BlockDecoded)
            self.frames += [] if event.frames is None else [event.frames]
            self.decoded += 1

    def save(self, path: Path) -> None:
        commands = [
            messages.SaveBlocks(
                request_id=self.request_id, ranks=(rank,), request=self.request, blocks=self.plan, path=str(path),
                at=self.done, decoded=self.decoded,
            )
            for rank in self.crew.placement.world
        ]  # fmt: skip
        events = self.crew.run(commands)
        for event in events:
            assert isinstance(event, messages.BlocksSaved)
            assert event.at == self.done
            assert event.num_bytes == (path / f"rank-{event.rank}.safetensors").stat().st_size
            if event.rank == self.crew.placement.denoisers[0]:
                assert event.finished >= self.finished
                self.finished = event.finished

    def finish(self, piece: int = 1000) -> Frames:
        """All the rest."""
        total = self.plan.num_operations
        assert total is not None
        while self.done < total:
            self.denoise(min(piece, total - self.done))
            self.decode()
        self.release()
        return np.concatenate(self.frames)

    def release(self, *, failed: bool = False) -> None:
        commands = [
            messages.Release(request_id=self.request_id, ranks=(rank,), failed=failed)
            for rank in self.crew.placement.world
        ]
        self.crew.run(commands)

    def _from(self, kind: type[messages.Command]) -> str | None:
        """The snapshot, in the first command of its kind."""
        is_first = kind not in self._begun
        self._begun.add(kind)
        return str(self.resume) if is_first and self.resume is not None else None


def begin(crew: BlockCrew, request_id: str, request: VideoRequest, plan: BlockPlan, **changes: Any) -> Making:
    making = Making(crew=crew, request_id=request_id, request=request, plan=plan, **changes)
    making.encode()
    return making


def resumed(
    crew: BlockCrew, request_id: str, request: VideoRequest, plan: BlockPlan, path: Path, *, at: int, decoded: int
) -> Making:
    """From the snapshot at `path`, which was taken there."""
    return begin(crew, request_id, request, plan, done=at, decoded=decoded, resume=path)


@contextlib.contextmanager
def block_crew(folder: Path, placement: Placement, **settings: Any) -> Iterator[BlockCrew]:
    """Workers of `placement`, loaded. `settings`: of WorkerSettings."""
    adapter, store, key = open_model(str(folder)), HashStore(), secrets.token_bytes(32)
    chosen = WorkerSettings(device="cpu", precision=adapter.default_precision("cpu"), is_blockwise=True, **settings)
    with contextlib.ExitStack() as endings:
        workers = []
        for rank in placement.world:
            opener = channel_opener(store, rank=rank, device="cpu") if len(placement.world) > 1 else None
            neighbours = Neighbours(store=store, host="127.0.0.1", key=key) if len(placement.world) > 1 else None
            worker = BlockWorker(
                adapter,
                chosen,
                rank=rank,
                placement=placement,
                ring=Ring(ranks=placement.denoisers, rank=rank, device="cpu", open_channel=opener),
                shelf=Shelf(rank=rank, device="cpu", neighbours=neighbours),
                clock=lambda: 0.0,
            )
            endings.callback(worker.close)
            worker.load()  # one after the other, because loading is not made for several threads
            workers.append(worker)
        threads = endings.enter_context(ThreadPoolExecutor(len(workers)))
        yield BlockCrew(adapter=adapter, placement=placement, workers=workers, threads=threads)
