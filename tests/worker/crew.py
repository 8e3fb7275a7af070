"""Workers that are threads of this process, on a tiny model: what every rank of a run does, without the processes."""

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from pipedit.core import messages
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.core.spans import Span
from pipedit.models.adapter import ModelAdapter
from pipedit.models.registry import open_model
from pipedit.parallel.groups import channel_opener
from pipedit.parallel.rows import ChannelRows
from pipedit.parallel.runtime import ParallelRuntime
from pipedit.worker.settings import WorkerSettings
from pipedit.worker.shelf import Neighbours, Shelf
from pipedit.worker.worker import Worker
from tests.models.parity import make_request

TIMEOUT_S = 60.0
Frames = np.ndarray[Any, np.dtype[np.uint8]]


@dataclasses.dataclass(kw_only=True)
class Crew:
    """The workers of a placement. `events` keeps all answers."""

    adapter: ModelAdapter
    kind: str
    placement: Placement
    workers: list[Worker]
    shelves: list[Shelf]
    threads: ThreadPoolExecutor
    load_spans: tuple[Span, ...]
    epoch: int = 0
    events: list[messages.Event] = dataclasses.field(default_factory=list)

    def request(self, **settings: Any) -> VideoRequest:
        return make_request(self.adapter, self.kind, **settings)

    def start(self, command: messages.Command) -> "dict[int, Future[messages.Event]]":
        """On all ranks at once."""
        return {rank: self.threads.submit(_handle, self.workers[rank], command) for rank in command.ranks}

    def run(self, command: messages.Command) -> list[messages.Event]:
        """Waits for what every rank says, in their order; raises what the first one raised."""
        events = [future.result(TIMEOUT_S) for future in self.start(command).values()]
        self.events += events
        return events

    # -- the phases of a request, as the scheduler gives them out -------------------------------------------------

    def encode(self, request_id: str, request: VideoRequest) -> tuple[int, ...]:
        """Returns the joint text tokens of each forward pass."""
        encoders = self.placement.encoders
        ranks = encoders if self.placement.encodes_locally else encoders[-1:]
        event = self.run(messages.Encode(request_id=request_id, ranks=ranks, request=request))[0]
        assert isinstance(event, messages.Encoded)
        return event.text_tokens

    def step(self, request_id: str, request: VideoRequest, step: int, **changes: Any) -> messages.Denoise:
        """The command; `changes` are those of its fields."""
        placement = self.placement
        command = messages.Denoise(
            request_id=request_id,
            ranks=placement.denoisers,
            request=request,
            epoch=self.epoch,
            step=step,
            parallel=ParallelConfig(ulysses_degree=len(placement.denoisers)),
            conditioning_at=None if placement.encodes_locally else placement.encoders[-1],
        )
        return dataclasses.replace(command, **changes)

    def denoise(self, request_id: str, request: VideoRequest, *, grain: int = 1) -> None:
        total = request.num_inference_steps or 0
        for step in range(0, total, grain):
            self.run(self.step(request_id, request, step, num_steps=min(grain, total - step)))

    def chunk(self, request_id: str, request: VideoRequest, chunk: int, **changes: Any) -> messages.Decode:
        placement = self.placement
        command = messages.Decode(
            request_id=request_id,
            ranks=placement.decoders,
            request=request,
            epoch=self.epoch,
            chunk=chunk,
            latents_at=None if placement.decodes_locally else placement.denoisers[0],
        )
        return dataclasses.replace(command, **changes)

    def decode(
        self, request_id: str, request: VideoRequest, *, grain: int = 1, ranks: Sequence[int] | None = None
    ) -> Frames:
        ranks = self.placement.decoders if ranks is None else tuple(ranks)
        total, pieces = self.adapter.num_decode_chunks(request, len(ranks)), []
        for chunk in range(0, total, grain):
            command = self.chunk(request_id, request, chunk, ranks=ranks, num_chunks=min(grain, total - chunk))
            first, *others = self.run(command)
            assert isinstance(first, messages.ChunkDecoded) and first.frames is not None
            assert all(isinstance(other, messages.ChunkDecoded) and other.frames is None for other in others)
            pieces.append(first.frames)
        return np.concatenate(pieces)

    def release(self, request_id: str) -> None:
        for rank in self.placement.world:
            self.run(messages.Release(request_id=request_id, ranks=(rank,)))

    def video(self, request_id: str, request: VideoRequest, *, grain: int = 1) -> Frames:
        self.encode(request_id, request)
        self.denoise(request_id, request, grain=grain)
        frames = self.decode(request_id, request, grain=grain)
        self.release(request_id)
        return frames

    # -- what is left -----------------------------------------------------------------------------------------------

    def spans(self, what: str) -> list[Span]:
        return [span for event in self.events for span in event.spans if span.what == what]

    @property
    def is_empty(self) -> bool:
        """Whether nobody keeps anything of any request."""
        return not any(worker._held for worker in self.workers) and not any(s.held_bytes for s in self.shelves)


def _handle(worker: Worker, command: messages.Command) -> messages.Event:
    try:
        return worker.handle(command)
    except BaseException:
        worker.recover()
        raise


@contextlib.contextmanager
def crew(folder: Path, kind: str, placement: Placement | None = None, **settings: Any) -> Iterator[Crew]:
    """Workers of `placement` (None: one alone), loaded. `settings`: of WorkerSettings."""
    placement = placement or Placement.colocated(1)
    adapter, store, key = open_model(str(folder)), HashStore(), secrets.token_bytes(32)
    chosen = WorkerSettings(device="cpu", precision=adapter.default_precision("cpu"), **settings)
    shelves, workers = [], []
    for rank in placement.world:
        open_channel = channel_opener(store, rank=rank, device="cpu")
        neighbours = Neighbours(store=store, host="127.0.0.1", key=key) if placement.hands_over else None
        shelves.append(Shelf(rank=rank, device="cpu", neighbours=neighbours))
        runtime = group = None
        if len(placement.world) > 1:
            runtime = ParallelRuntime(ranks=placement.denoisers, rank=rank, device="cpu", open_channel=open_channel)
        if rank in placement.decoders:
            group = ChannelRows(ranks=placement.decoders, rank=rank, device="cpu", open_channel=open_channel)
        workers.append(
            Worker(
                adapter, chosen, rank=rank, placement=placement, parallel=runtime, decode_group=group,
                shelf=shelves[-1],
            )
        )  # fmt: skip
    with contextlib.ExitStack() as endings:
        threads = endings.enter_context(ThreadPoolExecutor(len(workers)))
        for worker in workers:
            endings.callback(worker.close)
        # One after the other, because loading is not made for several threads.
        load_spans = tuple(span for worker in workers for span in worker.load())
        yield Crew(
            adapter=adapter,
            kind=kind,
            placement=placement,
            workers=workers,
            shelves=shelves,
            threads=threads,
            load_spans=load_spans,
        )


def held_weights(worker: Worker) -> set[str]:
    """Names of the stages that a worker has loaded."""
    stages = {"text": worker._stages._text, "denoise": worker._stages._denoise, "decode": worker._stages._decode}
    return {name for name, stage in stages.items() if stage is not None}


def loaded_bytes(modules: Sequence[torch.nn.Module]) -> int:
    """Of parameters and buffers that have memory, tied ones once."""
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers()) if not x.is_meta]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
