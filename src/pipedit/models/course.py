"""How a request is denoised, step by step: what the transformer is given, and how its predictions are combined. The
same for the whole latents as for a window of them; knows neither weights nor ranks.

Shape legend: C latent channels, F latent frames, H W latent size.
"""

import abc
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch

from pipedit.core.request import VideoRequest
from pipedit.models.noise_scheduler_state import restore_noise_scheduler, save_noise_scheduler

CourseT = TypeVar("CourseT", bound="Course")
Inputs = dict[str, Any]  # of a transformer's forward, by name
Branches = Callable[[Sequence[Callable[[], torch.Tensor]]], list[torch.Tensor]]  # see StageParallel


@dataclasses.dataclass(kw_only=True)
class NoisyLatents:
    """Latents [1, C, F, H, W] on their way, float32 at first, and the noise scheduler that belongs to them alone."""

    latents: torch.Tensor
    noise_scheduler: Any

    def advance(self, prediction: torch.Tensor, time: torch.Tensor) -> None:
        assert prediction.shape == self.latents.shape, (tuple(prediction.shape), tuple(self.latents.shape))
        self.latents = self.noise_scheduler.step(prediction, time, self.latents, return_dict=False)[0]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Course(abc.ABC):
    """One for each request; never changes. `dtype`: the transformer's. `noise_scheduler` knows its steps and has taken
    none: latents get copies of it."""

    request: VideoRequest
    conditioning: Mapping[str, torch.Tensor]
    dtype: torch.dtype
    noise_scheduler: Any

    @property
    def timesteps(self) -> torch.Tensor:
        """[steps]"""
        times: torch.Tensor = self.noise_scheduler.timesteps
        return times

    def start(self, noise: torch.Tensor) -> NoisyLatents:
        return NoisyLatents(latents=noise, noise_scheduler=copy.deepcopy(self.noise_scheduler))

    def save(self, noisy: NoisyLatents) -> dict[str, Any]:
        """See BlockStage.save_block."""
        noise_scheduler = save_noise_scheduler(noisy.noise_scheduler, self.noise_scheduler)
        return {"latents": noisy.latents, "noise_scheduler": noise_scheduler}

    def restore(self, saved: dict[str, Any]) -> NoisyLatents:
        noise_scheduler = restore_noise_scheduler(saved["noise_scheduler"], self.noise_scheduler)
        return NoisyLatents(latents=saved["latents"], noise_scheduler=noise_scheduler)

    @property
    @abc.abstractmethod
    def num_branches(self) -> int:
        """Predictions of each step: conditional, and unconditional with guidance."""

    def expert(self, step: int) -> int:
        """Number of the transformer that this step takes."""
        return 0

    def joint_tokens(self, branch: int) -> int:
        """Text tokens in the same attention as the latents."""
        return 0

    @abc.abstractmethod
    def inputs(self, step: int, branch: int, latents: torch.Tensor) -> Inputs:
        """Of the transformer's forward on latents in its data type. Of a stand-in for them only the shape and the
        device are read."""

    @abc.abstractmethod
    def scale(self, step: int) -> float:
        """Of the guidance."""

    def guide(self, step: int, predictions: Sequence[torch.Tensor]) -> torch.Tensor:
        """One prediction from those of all branches."""
        prediction, *others = predictions
        for negative in others:
            prediction = negative + self.scale(step) * (prediction - negative)
        return prediction


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiseState(Generic[CourseT]):
    """A request whose latents are denoised as a whole."""

    course: CourseT
    noisy: NoisyLatents

    def step(self, index: int, transformer: Callable[..., Any], branches: Branches) -> None:
        """Takes the next step. `transformer` is the one that `course.expert` names."""
        course, latents = self.course, self.noisy.latents.to(self.course.dtype)
        inputs = [course.inputs(index, branch, latents) for branch in range(course.num_branches)]
        predictions = branches([functools.partial(_predict, transformer, given) for given in inputs])
        self.noisy.advance(course.guide(index, predictions), course.timesteps[index])


def _predict(transformer: Callable[..., Any], inputs: Inputs) -> torch.Tensor:
    output: torch.Tensor = transformer(**inputs)[0]
    return output
