"""Cluster files: which devices there are, how they are joined, and what runs on them. One JSON object.

What the settings of replicas mean is decided elsewhere.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipedit.core.errors import InvalidRequestError
from pipedit.plan.hardware import Cluster, is_measured, make_cluster, read_cluster
from pipedit.plan.table_file import Column, Row, parse_row

_CLUSTER = {
    "device": Column(kind=str, is_required=True),
    "num_devices": Column(kind=int, least=1, is_required=True),
    "devices_per_node": Column(kind=int, least=1),
    "link": Column(kind=str),
    "node_link": Column(kind=str),
    "price_per_hour": Column(kind=float, least=0),
}
REPLICA_SETTINGS = {
    "num_workers": Column(kind=int, least=1),
    "strategy": Column(kind=str),
    "denoise_workers": Column(kind=int, least=1),
    "decode_workers": Column(kind=int, least=1),
    "encode_on": Column(kind=str),
    "aco": Column(kind=str),
    "decode": Column(kind=str),
    "cfg_degree": Column(kind=int, least=1),
    "ring_degree": Column(kind=int, least=1),
    "ulysses_degree": Column(kind=int, least=1),
    "block_size": Column(kind=int, least=1),
    "context": Column(kind=int, least=0),
    "prefix": Column(kind=str),
    "context_storage": Column(kind=str),
}
_REPLICA = {"model": Column(kind=str), "count": Column(kind=int, least=1), **REPLICA_SETTINGS}
_FLAGS = ("offload", "dualparal_compat")  # true or false


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """`count` engines that are alike (None: as many as the devices left over allow). `model` None: the only one of the
    workload. `settings`: as of EngineSettings, those that are given."""

    model: str | None = None
    count: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        return "replicas" if self.model is None else f"replicas of {self.model}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterFile:
    """`device`, `link` and `node_link` are names or paths; None: the device's own. Without `replicas`, what runs is to
    be chosen. `price_per_hour`: of one device, in any currency."""

    device: str
    num_devices: int
    devices_per_node: int
    link: str | None = None
    node_link: str | None = None
    price_per_hour: float | None = None
    replicas: tuple[ReplicaSpec, ...] = ()

    def cluster(self) -> Cluster:
        """Looks the names up. Raises InvalidRequestError for unknown ones."""
        return make_cluster(
            self.device,
            self.link,
            num_devices=self.num_devices,
            devices_per_node=self.devices_per_node,
            node_link=self.node_link,
        )


def read_cluster_file(path: str | os.PathLike[str]) -> ClusterFile:
    """A file of this form, or one that `pipedit profile` has written (then what runs is to be chosen). Raises
    InvalidRequestError with every problem of the file."""
    values = _load(Path(path))
    if is_measured(values):
        measured = read_cluster(Path(path))
        return ClusterFile(
            device=str(path), num_devices=measured.num_devices, devices_per_node=measured.devices_per_node
        )
    known, problems = parse_row(Row(source=str(path), values=values), _CLUSTER, noun="key", others=["replicas"])
    given_replicas = values.get("replicas", [])
    replicas = []
    if isinstance(given_replicas, list):
        for number, given in enumerate(given_replicas, start=1):
            replica, found = _replica(given)
            replicas.append(replica)
            problems += [f"replicas[{number}]: {problem}" for problem in found]
    else:
        problems.append('replicas must be a list of objects, such as [{"strategy": "colocated", "num_workers": 8}]')
    if problems:
        raise InvalidRequestError([f"{path}: {problem}" for problem in problems])
    per_node = known.pop("devices_per_node", min(8, known["num_devices"]))
    return ClusterFile(**known, devices_per_node=per_node, replicas=tuple(replicas))


def _replica(given: Any) -> tuple[ReplicaSpec, list[str]]:
    if not isinstance(given, dict):
        return ReplicaSpec(), ['must be an object, such as {"strategy": "colocated", "num_workers": 8}']
    values, problems = parse_row(Row(source="", values=given), _REPLICA, noun="key", others=_FLAGS)
    flags = {name: given[name] for name in _FLAGS if name in given}
    problems += [f"{name} must be true or false" for name, value in flags.items() if not isinstance(value, bool)]
    model, count = values.pop("model", None), values.pop("count", None)
    return ReplicaSpec(model=model, count=count, settings={**values, **flags}), problems


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidRequestError([f"{path} does not exist"]) from None
    except OSError as error:
        raise InvalidRequestError([f"{path} cannot be read: {error.strerror}"]) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON
        raise InvalidRequestError([f"{path} is not a cluster file: not whole JSON ({error})"]) from error
    if not isinstance(content, dict):
        raise InvalidRequestError([f'{path} is not a cluster file: it must be one object, with "device" and others'])
    return content
