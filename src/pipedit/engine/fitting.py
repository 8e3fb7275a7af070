"""Whether requests fit into the memory of the workers' devices, and what would. The arithmetic is in plan.memory."""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pipedit.core.errors import InsufficientMemoryError
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Placement, Role
from pipedit.core.request import VideoRequest
from pipedit.models.adapter import ModelAdapter, Precision
from pipedit.plan.costs import RequestCost
from pipedit.plan.memory import Need, NeedOf, Room, SizeLadder, memory_problem
from pipedit.worker.device import available_bytes

Sharing = Callable[[VideoRequest], ParallelConfig]


class CostOf(Protocol):
    def __call__(self, request: VideoRequest, /, *, tiling: bool, decoders: int) -> RequestCost: ...


def free_memory(devices: Sequence[str]) -> dict[str, int]:
    """Bytes by device. What another process keeps for later use counts as used: for workers in processes of their own,
    measure before they load."""
    return {device: available_bytes(device) for device in devices}


def _alone(_request: VideoRequest) -> ParallelConfig:
    return ParallelConfig()


def check_memory(
    requests: Sequence[VideoRequest],
    adapter: ModelAdapter,
    devices: Sequence[str],
    precision: Precision,
    *,
    placement: Placement | None = None,
    sharing: Sharing = _alone,
    free_bytes: Mapping[str, int] | None = None,
    tiling: bool = False,
    offload: bool = False,
    is_loaded: bool = False,
    cost_of: CostOf | None = None,
) -> None:
    """Raises InsufficientMemoryError, with what would fit, for completed requests that are too large for the devices.

    `devices` has one entry for each worker, in order of rank; workers on one device share its memory. `placement` says
    who does what (None: all do everything), `sharing` how the denoisers share a request. `free_bytes`: as `free_memory`
    measured it, else what is free now. `tiling`: the VAE decodes in spatial tiles. `offload`: weights wait in host
    memory. `is_loaded`: libraries and weights are out of the free memory already. `cost_of`: where a worker does not
    have to hold what the adapter says of a whole request.
    """
    free_bytes = free_bytes or free_memory(devices)
    everybody = placement or Placement.colocated(len(devices))
    rules = adapter.size_rules
    ladder = SizeLadder(frame_step=rules.frame_step, size_multiple=rules.size_multiple)
    need = functools.partial(_need_of, cost_of or functools.partial(_whole_cost, adapter, precision), offload=offload)
    problems: dict[str, None] = {}  # a set in order
    for request in requests:
        shared = sharing(request)
        for members in _distinct(devices, everybody):
            room = Room(available_bytes=min(free_bytes[device] for device in members.devices), is_loaded=is_loaded)
            ways_out: dict[str, NeedOf] = {}
            if not tiling:
                tiled = need(members.roles, shared, everybody, tiling=True)
                ways_out["spatial tiling of the VAE (--vae-use-tiling, vae_tiling=True)"] = tiled
            if len(members.roles) > 1 and not is_loaded:
                alone = Placement.colocated(1)
                ways_out["1 worker instead"] = need((alone.roles(0),), ParallelConfig(), alone, tiling=tiling)
            whole = need(members.roles, shared, everybody, tiling=tiling)
            if (problem := memory_problem(request, whole, room, ladder, ways_out)) is not None:
                problems[problem] = None
                break  # devices differ little: one sentence a request is enough
    if problems:
        raise InsufficientMemoryError("\n".join(problems))


class _Members:
    """Devices on which the same roles live: those of each worker there."""

    def __init__(self, roles: tuple[tuple[Role, ...], ...]) -> None:
        self.roles = roles
        self.devices: list[str] = []


def _distinct(devices: Sequence[str], placement: Placement) -> list[_Members]:
    residents = collections.defaultdict(list)
    for rank, device in enumerate(devices):
        residents[device].append(placement.roles(rank))
    found: dict[tuple[tuple[Role, ...], ...], _Members] = {}
    for device, roles in residents.items():
        found.setdefault(tuple(roles), _Members(tuple(roles))).devices.append(device)
    return list(found.values())


def _whole_cost(
    adapter: ModelAdapter, precision: Precision, request: VideoRequest, *, tiling: bool, decoders: int
) -> RequestCost:
    return adapter.cost(request, precision, tiling=tiling, decoders=decoders)


def _need_of(
    cost_of: CostOf,
    roles: Sequence[tuple[Role, ...]],
    shared: ParallelConfig,
    placement: Placement,
    *,
    tiling: bool,
    offload: bool,
) -> NeedOf:
    """What workers with these roles need together. Disaggregated decoders may have to decode alone."""
    decoders = 1 if placement.is_disaggregated else len(placement.decoders)

    def need(request: VideoRequest) -> Need:
        cost = cost_of(request, tiling=tiling, decoders=decoders)
        one = Need.offloaded if offload else Need.of
        return Need.together([one(cost, shared, roles=each) for each in roles])

    return need
