"""What a noise scheduler remembers of the steps that it has taken, as a tree (see adapter.BlockStage), and back.

Only classes of which we know what they remember; an attribute that changes and is not listed here is found out.
"""

import copy
from typing import Any

import torch

from pipedit.core.errors import SnapshotError
from pipedit.models.noise_schedulers import snapshot_problem

# As of diffusers 0.42: what `step` changes.
_MEMORY = {
    "UniPCMultistepScheduler": (
        "model_outputs",
        "timestep_list",
        "lower_order_nums",
        "last_sample",
        "this_order",
        "_step_index",
    ),
    "FlowMatchEulerDiscreteScheduler": ("_step_index",),
}


def save_noise_scheduler(noise_scheduler: Any, fresh: Any) -> dict[str, Any]:
    """`fresh`: the one of which it is a copy, which has taken no step. Raises SnapshotError for one that cannot be
    saved. The tensors are its own."""
    name, values, before = type(noise_scheduler).__name__, vars(noise_scheduler), vars(fresh)
    problem = snapshot_problem(name, noise_scheduler.config)
    if problem is None and name not in _MEMORY:
        problem = f"what noise scheduler {name} remembers of its steps is not known; known are {', '.join(_MEMORY)}"
    if problem is not None:
        raise SnapshotError(problem)
    if others := [key for key in values if key not in _MEMORY[name] and not _equal(values[key], before.get(key))]:
        raise SnapshotError(
            f"{name} of this version of diffusers remembers more than pipedit knows of ({', '.join(others)}), "
            "so the run cannot be saved; use diffusers 0.42"
        )
    return {"class": name, "memory": {key: _copied(values[key]) for key in _MEMORY[name] if key in values}}


def restore_noise_scheduler(saved: dict[str, Any], fresh: Any) -> Any:
    """A copy of `fresh` that goes on where the saved one was. Raises SnapshotError if that was of another class."""
    name = type(fresh).__name__
    if saved["class"] != name or not set(saved["memory"]) <= set(_MEMORY[name]):
        raise SnapshotError(f"the run was saved with noise scheduler {saved['class']}; the model has {name}")
    noise_scheduler = copy.deepcopy(fresh)
    for key, value in saved["memory"].items():
        setattr(noise_scheduler, key, _copied(value))
    return noise_scheduler


def _copied(value: Any) -> Any:
    """Lists are changed in place."""
    return list(value) if isinstance(value, list) else value


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return isinstance(other, torch.Tensor) and value.shape == other.shape and torch.equal(value, other)
    return bool(value == other)
