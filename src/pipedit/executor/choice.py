"""Which executor runs a model: this process, processes that we start, or ranks that a launcher has started."""

from pipedit.core.placement import Placement
from pipedit.executor.base import Executor
from pipedit.executor.launched import Launch, LaunchedExecutor
from pipedit.executor.local_processes import LocalProcessExecutor
from pipedit.models.adapter import ModelAdapter
from pipedit.worker.service import WorkerSpec, make_worker
from pipedit.worker.settings import WorkerSettings


def make_executor(
    adapter: ModelAdapter, settings: WorkerSettings, placement: Placement, launch: Launch | None
) -> Executor:
    """Only one worker in this process makes it import torch."""
    model = adapter.checkpoint.name
    if launch is not None:
        return LaunchedExecutor(launch=launch, model=model, settings=settings, placement=placement)
    if len(placement.world) > 1:
        return LocalProcessExecutor(model=model, settings=settings, placement=placement)
    from pipedit.executor.in_process import InProcessExecutor

    spec = WorkerSpec(model=model, settings=settings, rank=0, placement=placement, key=b"")
    return InProcessExecutor(make_worker(adapter, spec))
