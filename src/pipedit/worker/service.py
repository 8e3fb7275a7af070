"""The serve loop: one worker at the far end of a connection. It gets a specification, loads, then answers commands.

Knows neither who is at the other end nor how the connection came about. Torch-free until a worker is built.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from pipedit.core.errors import PipeditError
from pipedit.core.messages import Command, CommandFailed, Event
from pipedit.core.placement import Placement
from pipedit.core.spans import Span
from pipedit.worker.failures import command_failed, portable
from pipedit.worker.group import Rendezvous, join_group
from pipedit.worker.settings import WorkerSettings

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from pipedit.models.adapter import ModelAdapter

    Link = Connection[Any, Any]

STARTING = "starting"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Everything that makes a worker. `model` is a name or a folder; `rendezvous` is None for one that is alone. `key`:
    the same for all workers of a run, who prove to each other with it that they belong to it."""

    model: str
    settings: WorkerSettings
    rank: int
    placement: Placement
    rendezvous: Rendezvous | None = None
    key: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
    """The worker has loaded its stages; `spans` say how long each took."""

    rank: int
    spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartFailed:
    """The worker could not be built or could not load. It ends after saying so."""

    rank: int
    error: PipeditError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskClock:
    """What does your clock show?"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClockShows:
    """Seconds on the clock of the worker's spans."""

    now_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stop:
    """Leave. Nothing answers it but the end of the connection."""


class Servant(Protocol):
    """What `serve` drives: a `Worker`, or a test's stand-in."""

    def load(self) -> tuple[Span, ...]: ...

    def handle(self, command: Command) -> Event: ...

    def recover(self) -> None:
        """After `handle` has raised, and after that was told of: other ranks that wait for this one now fail too."""

    def close(self) -> None:
        """Leaves nothing behind: no thread, no connection."""


Build = Callable[[WorkerSpec], Servant]


def serve(link: "Link", build: Build | None = None) -> bool:
    """Serves until `Stop`; False if the worker could not be started. Raises EOFError or OSError where the other end
    goes away without it.

    First may come AskClock, any number of times. The WorkerSpec is answered by Ready, or by StartFailed, after which
    nothing follows. Then each Command is answered by an Event, which is CommandFailed where it raised; the worker lives
    on after that.
    """
    while isinstance(spec := link.recv(), AskClock):
        link.send(ClockShows(now_s=time.perf_counter()))
    with contextlib.ExitStack() as endings:
        try:
            worker = (build or build_worker)(spec)
            endings.callback(worker.close)
            spans = worker.load()
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever started us wants to know
            link.send(StartFailed(rank=spec.rank, error=portable(error, rank=spec.rank, doing=STARTING)))
            return False
        link.send(Ready(rank=spec.rank, spans=tuple(spans)))
        while not isinstance(command := link.recv(), Stop):
            event = _answer(worker, spec.rank, command)
            link.send(event)
            if isinstance(event, CommandFailed):
                worker.recover()  # only now: who fails first is heard first, and not those who fail of it
    return True


def _answer(worker: Servant, rank: int, command: Command) -> Event:
    try:
        return worker.handle(command)
    except Exception as error:  # noqa: BLE001 - any failure of the work belongs to its request
        failed = command_failed(command, rank, error)
        return dataclasses.replace(failed, error=portable(failed.error, rank=rank, doing=failed.doing))


def build_worker(spec: WorkerSpec) -> Servant:
    """The real worker of a spec, in a process of its own."""
    # Imported here: whoever only talks to workers needs no torch.
    from pipedit.models.registry import fetch_weights, open_model

    adapter = open_model(spec.model)
    fetch_weights(adapter)  # on this machine; the controller has done it on its own
    return make_worker(adapter, spec)


def make_worker(adapter: "ModelAdapter", spec: WorkerSpec) -> Servant:
    """Joins the other ranks and, where its roles are theirs too, shares the work."""
    return _block_worker(adapter, spec) if spec.settings.is_blockwise else _worker(adapter, spec)


def _worker(adapter: "ModelAdapter", spec: WorkerSpec) -> Servant:
    from pipedit.parallel.groups import channel_opener
    from pipedit.parallel.rows import ChannelRows
    from pipedit.parallel.runtime import ParallelRuntime
    from pipedit.worker.shelf import Neighbours, Shelf, reachable_address
    from pipedit.worker.worker import Worker

    device, denoisers, decoders = spec.settings.device, spec.placement.denoisers, spec.placement.decoders
    parallel = decode_group = shelf = None
    if spec.rendezvous is not None:
        store = join_group(spec.rendezvous, device=device)
        open_channel = channel_opener(store, rank=spec.rank, device=device)
        if len({*denoisers, *decoders}) > 1 and spec.rank in (*denoisers, *decoders):  # decoders may help
            parallel = ParallelRuntime(ranks=denoisers, rank=spec.rank, device=device, open_channel=open_channel)
        if len(decoders) > 1 and spec.rank in decoders:
            decode_group = ChannelRows(ranks=decoders, rank=spec.rank, device=device, open_channel=open_channel)
        if spec.placement.hands_over:
            neighbours = Neighbours(store=store, host=reachable_address(spec.rendezvous), key=spec.key)
            shelf = Shelf(rank=spec.rank, device=device, neighbours=neighbours)
    return Worker(
        adapter,
        spec.settings,
        rank=spec.rank,
        placement=spec.placement,
        parallel=parallel,
        decode_group=decode_group,
        shelf=shelf,
    )


def _block_worker(adapter: "ModelAdapter", spec: WorkerSpec) -> Servant:
    from pipedit.parallel.groups import channel_opener
    from pipedit.worker.block_work import Ring
    from pipedit.worker.block_worker import BlockWorker
    from pipedit.worker.shelf import Neighbours, Shelf, reachable_address

    device, stages = spec.settings.device, spec.placement.denoisers
    open_channel = neighbours = None
    if spec.rendezvous is not None:
        store = join_group(spec.rendezvous, device=device)
        open_channel = channel_opener(store, rank=spec.rank, device=device)
        neighbours = Neighbours(store=store, host=reachable_address(spec.rendezvous), key=spec.key)
    return BlockWorker(
        adapter,
        spec.settings,
        rank=spec.rank,
        placement=spec.placement,
        ring=Ring(ranks=stages, rank=spec.rank, device=device, open_channel=open_channel),
        shelf=Shelf(rank=spec.rank, device=device, neighbours=neighbours),
        clock=time.perf_counter,
    )
