"""Attention co-processing (PipeDiT, section 3.3): ranks that own no tokens take heads of the others' attention."""

from collections.abc import Sequence
from typing import Protocol

import torch

from pipedit.core.messages import Aco
from pipedit.core.parallel import ParallelConfig


class Forward(Protocol):
    """The self-attentions of one forward pass of a model: `sites` of them, one after the other, all of this shape.
    `dtype` by its name in torch."""

    @property
    def sites(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def latent_tokens(self) -> int: ...
    @property
    def text_tokens(self) -> int: ...
    @property
    def dtype(self) -> str: ...


class HelpersCall:
    """An attention (see calls.Call) to which this rank brings nothing."""

    local_tokens = 0
    text_mask = None

    def __init__(self, forward: Forward, device: torch.device) -> None:
        self.batch, self.heads, self.head_dim = forward.batch, forward.heads, forward.head_dim
        self.text_tokens, self.dtype = forward.text_tokens, getattr(torch, forward.dtype)
        self._nothing = torch.empty(self.batch, 0, self.heads, self.head_dim, dtype=self.dtype, device=device)

    def value(self, heads: slice) -> torch.Tensor:
        return self._nothing[:, :, heads]

    def key(self, heads: slice) -> torch.Tensor:
        return self._nothing[:, :, heads]

    def query(self, heads: slice) -> torch.Tensor:
        return self._nothing[:, :, heads]

    def text(self, heads: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise AssertionError("helpers get the text from an owner")


def aco_problems(config: ParallelConfig, aco: Aco, denoisers: Sequence[int]) -> list[str]:
    """Why these helpers cannot help these denoisers, a sentence each."""
    problems, helpers = [], [rank for group in aco.helpers for rank in group]
    if config.ring_degree > 1:
        problems.append(f"attention co-processing needs ring_degree=1, not {config.ring_degree}")
    if config.world_size != len(denoisers):
        problems.append(f"{config.describe()} is not for {len(denoisers)} denoise workers, so nobody can help them")
    if len(aco.helpers) != config.cfg_degree:
        problems.append(f"there are {len(aco.helpers)} groups of helpers for {config.cfg_degree} groups of workers")
    if any(len(group) + config.ulysses_degree != len(aco.heads) for group in aco.helpers):
        problems.append(f"{len(aco.heads)} shares of heads are not one for each worker and helper of a group")
    if len({*denoisers, *helpers}) != len(denoisers) + len(helpers):
        problems.append(f"helpers {helpers} are not all different, or not all different from workers {list(denoisers)}")
    return problems
