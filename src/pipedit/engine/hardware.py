"""The hardware that a user names: what "auto" predicts with. Files and names are those of plan.hardware."""

import dataclasses
from pathlib import Path

from pipedit.core.errors import InvalidRequestError
from pipedit.plan.hardware import Cluster, make_cluster, read_cluster


def cluster_of(hardware: str, num_workers: int) -> Cluster:
    """A file that `pipedit profile` has written, or the name of a known device. Raises InvalidRequestError."""
    if not Path(hardware).is_file():
        return make_cluster(hardware, num_devices=num_workers)
    cluster = read_cluster(Path(hardware))
    nodes = 1 if cluster.node_link is None else -(-num_workers // cluster.devices_per_node)
    return dataclasses.replace(cluster, num_devices=num_workers, devices_per_node=-(-num_workers // nodes))


def hardware_problems(hardware: str | None) -> list[str]:
    """What is wrong with it, a sentence each; None: nobody has named any."""
    try:
        if hardware is not None:
            cluster_of(hardware, 1)
    except InvalidRequestError as error:
        return list(error.problems)
    return []
