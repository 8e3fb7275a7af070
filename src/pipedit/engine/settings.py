"""How to run, as the user said it, and what can be wrong with that. Knows no requests."""

import dataclasses

from pipedit.core.errors import InvalidRequestError
from pipedit.core.parallel import AUTO
from pipedit.executor.launched import find_launch
from pipedit.models.adapter import ModelAdapter
from pipedit.models.registry import EMBEDDED, open_model
from pipedit.plan.degrees import Wanted, degree_problems
from pipedit.worker.device import device_problems, resolve_device, worker_problems
from pipedit.worker.machine import usable_cores


def default_num_workers() -> int:
    """As many as a launcher has started, else one. Raises InvalidRequestError where its variables make no sense."""
    launch = find_launch()
    return 1 if launch is None else launch.world_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How to run, as the user said it. Nothing here changes the video, except `dtype` and `vae_tiling`.

    The degrees multiply to `num_workers`; None: chosen for each request. `pipesp_chunks`: a number, or "auto" (see
    ParallelConfig).
    """

    model: str = EMBEDDED
    num_workers: int = dataclasses.field(default_factory=default_num_workers)
    ulysses_degree: int | None = None
    ring_degree: int | None = None
    cfg_degree: int | None = None
    pipesp_chunks: int | str = AUTO
    device: str = "auto"
    dtype: str = "auto"
    vae_tiling: bool = False
    compile_layers: bool = False

    @property
    def wanted(self) -> Wanted:
        return Wanted(
            cfg_degree=self.cfg_degree,
            ring_degree=self.ring_degree,
            ulysses_degree=self.ulysses_degree,
            pipesp_chunks=self.pipesp_chunks,
        )


def setting_problems(settings: EngineSettings, adapter: ModelAdapter | None = None) -> list[str]:
    """What is wrong with the settings besides the model's name, one sentence each; without the model's adapter, as far
    as can be told without it."""
    device = settings.device
    if device == "auto" and settings.dtype == "float16":
        device = resolve_device(device)  # only here it matters which: finding out imports torch
    problems = device_problems(device, settings.dtype)
    heads = None if adapter is None else adapter.heads
    wrong_degrees = degree_problems(settings.wanted, settings.num_workers, heads=heads)
    if not problems and not wrong_degrees:
        problems += worker_problems(settings.device, workers_here(settings))
    return [*problems, *wrong_degrees]


def setting_notes(settings: EngineSettings) -> list[str]:
    """What will work but may disappoint. Imports torch."""
    num_workers, cores = workers_here(settings), usable_cores()
    if num_workers <= cores or resolve_device(settings.device) != "cpu":
        return []
    counted = "1 core" if cores == 1 else f"{cores} cores"
    return [f"{num_workers} workers share {counted}: they take turns, which is slower than fewer workers"]


def workers_here(settings: EngineSettings) -> int:
    """Workers on this machine: all of them, unless a launcher has started them on several."""
    launch = find_launch() if settings.num_workers > 1 else None
    if launch is None or launch.world_size != settings.num_workers:
        return settings.num_workers
    return launch.local_world_size


def open_adapter(settings: EngineSettings) -> ModelAdapter:
    """The model's adapter. Raises one InvalidRequestError with everything that is wrong with the settings."""
    try:
        adapter = open_model(settings.model)
    except InvalidRequestError as error:
        raise InvalidRequestError([*setting_problems(settings), *error.problems]) from error
    if problems := setting_problems(settings, adapter):
        raise InvalidRequestError(problems)
    return adapter
