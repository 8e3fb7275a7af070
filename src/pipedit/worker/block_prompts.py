"""Which prompt a block of a long video is made of, where prompts change with time."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch

from pipedit.core.blocks import BlockPlan
from pipedit.core.prompt_schedule import PromptSchedule
from pipedit.core.request import VideoRequest

Conditioning = dict[str, torch.Tensor]
Shares = tuple[tuple[int, Fraction], ...]


def schedule_of(request: VideoRequest) -> PromptSchedule:
    """Of a completed request without problems."""
    assert request.fps is not None
    return PromptSchedule.of(request.prompt, request.prompts_at, request.fps)


def encode_all(request: VideoRequest, encode: Callable[[VideoRequest], Conditioning]) -> Conditioning:
    """The conditioning of every stretch in one dictionary; `split` takes it apart."""
    merged: Conditioning = {}
    for number, prompt in enumerate(schedule_of(request).prompts):
        conditioning = encode(dataclasses.replace(request, prompt=prompt, prompts_at=None))
        merged |= {f"{number}/{name}": tensor for name, tensor in conditioning.items()}
    return merged


def split(merged: Mapping[str, torch.Tensor]) -> list[Conditioning]:
    """By stretch."""
    found: dict[int, Conditioning] = {}
    for key, tensor in merged.items():
        number, _, name = key.partition("/")
        found.setdefault(int(number), {})[name] = tensor
    return [found[number] for number in sorted(found)]


def blend(conditionings: Sequence[Conditioning], shares: Shares) -> Conditioning:
    """The mean of those that share a block, by their shares; that of the largest share, where texts of different
    lengths cannot be added up."""
    if len(shares) == 1:
        return conditionings[shares[0][0]]
    chosen = [conditionings[number] for number, _ in shares]
    shapes = [{name: tensor.shape for name, tensor in each.items()} for each in chosen]
    if any(each != shapes[0] for each in shapes):
        return conditionings[max(shares, key=lambda share: share[1])[0]]
    weights = [float(share) for _, share in shares]
    return {name: _mean([each[name] for each in chosen], weights) for name in chosen[0]}


def _mean(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    return torch.stack([tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]).sum(0)


class BlockStates:
    """The state of a stage (`BlockStage.begin`) for each block. Memory: one for each stretch, and for each joint that
    falls into a block."""

    def __init__(
        self,
        begin: Callable[[Conditioning], Any],
        conditionings: Sequence[Conditioning],
        schedule: PromptSchedule,
        plan: BlockPlan,
        frame_step: int,
    ) -> None:
        """`frame_step`: frames that a latent frame stands for, but for the first one, which stands for one."""
        self._begin, self._conditionings, self._schedule = begin, conditionings, schedule
        self._plan, self._frame_step = plan, frame_step
        self._states: dict[Shares, Any] = {}

    def __call__(self, block: int) -> Any:
        shares = self._shares(block)
        if shares not in self._states:
            self._states[shares] = self._begin(blend(self._conditionings, shares))
        return self._states[shares]

    def _shares(self, block: int) -> Shares:
        if len(self._conditionings) == 1:
            return ((0, Fraction(1)),)
        first = self._plan.first_latent(block)
        return self._schedule.shares(self._frame(first), self._frame(first + self._plan.latents_of(block)))

    def _frame(self, latent: int) -> int:
        """The first frame of a latent frame."""
        return 0 if latent == 0 else (latent - 1) * self._frame_step + 1
