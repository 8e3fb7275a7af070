"""Noise schedulers go on where others were, to the bit; what cannot be saved is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipedit.core.errors import SnapshotError
from pipedit.models.noise_scheduler_state import restore_noise_scheduler, save_noise_scheduler
from pipedit.models.noise_schedulers import make_noise_scheduler, snapshot_problem
from pipedit.models.registry import open_model

Folder = Callable[[str], Path]
STEPS = 6


def fresh_of(kind: str, folder: Folder, **changes: Any) -> Any:
    checkpoint = open_model(str(folder(kind))).checkpoint
    config = {**checkpoint.config("scheduler"), **changes}
    scheduler = make_noise_scheduler(checkpoint.component_class("scheduler"), config, None)
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(0)
    return scheduler


def predictions() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 4, 2, 3, 3, generator=generator) for _ in range(STEPS)]


def run(scheduler: Any, latents: torch.Tensor, steps: range) -> torch.Tensor:
    for step in steps:
        prediction = predictions()[step]
        latents = scheduler.step(prediction, scheduler.timesteps[step], latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_from_every_step_the_same(kind: str, order: int, tiny_folder: Folder) -> None:
    changes = {"solver_order": order} if kind == "wan" else {}
    fresh, noise = fresh_of(kind, tiny_folder, **changes), torch.ones(1, 4, 2, 3, 3)
    whole = run(copy.deepcopy(fresh), noise, range(STEPS))
    for step in range(STEPS):
        first = copy.deepcopy(fresh)
        latents = run(first, noise, range(step))
        saved = save_noise_scheduler(first, fresh)
        second = restore_noise_scheduler(saved, fresh)
        assert torch.equal(run(second, latents, range(step, STEPS)), whole)
        assert torch.equal(run(first, latents, range(step, STEPS)), whole), "they share what they remember"
        if step > 0:
            saved["memory"].pop("_step_index")
            other = restore_noise_scheduler(saved, fresh)
            assert not torch.equal(run(other, latents, range(step, STEPS)), whole)


def test_what_is_not_known_is_refused(tiny_folder: Folder) -> None:
    fresh = fresh_of("wan", tiny_folder)
    scheduler = copy.deepcopy(fresh)
    run(scheduler, torch.ones(1, 4, 2, 3, 3), range(2))
    scheduler.temperature = 3
    with pytest.raises(SnapshotError, match="remembers more than pipedit knows of \\(temperature\\)"):
        save_noise_scheduler(scheduler, fresh)
    del scheduler.temperature
    scheduler.sigmas = scheduler.sigmas * 2
    with pytest.raises(SnapshotError, match="sigmas"):
        save_noise_scheduler(scheduler, fresh)
    saved = save_noise_scheduler(copy.deepcopy(fresh), fresh)
    with pytest.raises(SnapshotError, match="was saved with noise scheduler UniPC"):
        restore_noise_scheduler(saved, fresh_of("hunyuan", tiny_folder))


def test_noise_in_every_step_cannot_be_saved(tiny_folder: Folder) -> None:
    fresh = fresh_of("hunyuan", tiny_folder, stochastic_sampling=True)
    with pytest.raises(SnapshotError, match="stochastic_sampling"):
        save_noise_scheduler(copy.deepcopy(fresh), fresh)
    assert snapshot_problem("FlowMatchEulerDiscreteScheduler", {}) is None
