"""What a diffusers pipeline asks of its transformer, as seen from outside: whether all ranks ask the same, and which
two calls make one guided step, so that two halves of the ranks can share them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from pipedit.core.errors import InvalidRequestError
from pipedit.worker.interception import Compute, Inputs

Branches = Callable[[Sequence[Callable[[], torch.Tensor]]], list[torch.Tensor]]

_LATENTS, _TEXT = "hidden_states", "encoder_hidden_states"


class PipelineCalls:
    """Answers the transformers' calls. With `branches` (two halves of the ranks), the conditional call of a step makes
    both predictions, one on each half, and the unconditional call gets the one that is there already."""

    def __init__(self, branches: Branches | None) -> None:
        self._pairs = None if branches is None else _GuidancePairs(branches)

    def answer(self, expert: nn.Module, compute: Compute, inputs: Inputs) -> Any:
        if self._pairs is None:
            check_same_inputs(inputs)
            return compute(inputs)
        return self._pairs.answer(expert, compute, inputs)

    def finish(self) -> None:
        """After the last call. Raises InvalidRequestError if half of the ranks worked for nothing."""
        if self._pairs is not None:
            self._pairs.finish()


# -- two calls a step ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """One call that was answered. Holds its inputs, so that they can be told apart by identity."""

    expert: nn.Module
    inputs: Inputs

    def is_followed_by(self, expert: nn.Module, inputs: Inputs) -> bool:
        """Whether the other call asks for the second prediction of the same step."""
        return self.expert is expert and self.inputs[_LATENTS] is inputs[_LATENTS]


class _GuidancePairs:
    """Learns from the first step of a prompt which inputs differ between its two calls; from then on the first call
    is answered for both."""

    def __init__(self, branches: Branches) -> None:
        self._branches = branches
        self._text: Any = None  # of the conditional call that was learnt
        self._changes: Inputs = {}  # what the unconditional call had instead
        self._like: Any = None  # an answer, for the form that answers have
        self._first: _Call | None = None  # a first call whose second one is still to come
        self._kept: Any = None  # the second one's answer, if it is there already

    def answer(self, expert: nn.Module, compute: Compute, inputs: Inputs) -> Any:
        first, kept = self._first, self._kept
        self._first = self._kept = None  # so that nothing stale is left after an error
        if first is not None and first.is_followed_by(expert, inputs):
            return self._second(first, kept, compute, inputs)
        if first is not None:
            _refuse_unguided()
        return self._begin(expert, compute, inputs)

    def finish(self) -> None:
        if self._first is not None:
            _refuse_unguided()

    def _begin(self, expert: nn.Module, compute: Compute, inputs: Inputs) -> Any:
        check_same_inputs(inputs)
        if inputs[_TEXT] is self._text:
            output, self._kept = self._both(compute, inputs)
        else:
            output = compute(inputs)
        self._first = _Call(expert=expert, inputs=inputs)
        return output

    def _second(self, first: _Call, kept: Any, compute: Compute, inputs: Inputs) -> Any:
        changes = {name: value for name, value in inputs.items() if value is not first.inputs.get(name)}
        if kept is None:
            check_same_inputs(inputs)
            self._text, self._changes = first.inputs[_TEXT], changes
            self._like = compute(inputs)
            return self._like
        if changes.keys() != self._changes.keys() or any(changes[name] is not self._changes[name] for name in changes):
            raise InvalidRequestError(
                [
                    "the pipeline's unconditional call has other inputs than in the step before, and cfg_degree=2 "
                    "cannot follow it; use cfg_degree=1"
                ]
            )
        return kept

    def _both(self, compute: Compute, inputs: Inputs) -> tuple[Any, Any]:
        """The answers to this call and to the one that will follow."""
        calls = (inputs, {**inputs, **self._changes})
        samples = self._branches([lambda call=call: compute(call)[0] for call in calls])  # type: ignore[misc]
        if isinstance(self._like, tuple):
            return (samples[0],), (samples[1],)
        kind = type(self._like)
        return kind(sample=samples[0]), kind(sample=samples[1])


def _refuse_unguided() -> NoReturn:
    raise InvalidRequestError(
        [
            "cfg_degree=2 needs guidance, but the pipeline called its transformer only once in a step, so half of the "
            "ranks would work for nothing; use cfg_degree=1, or turn guidance on (guidance_scale above 1; for "
            "HunyuanVideo true_cfg_scale above 1 and a negative_prompt)"
        ]
    )


# -- the same on every rank ---------------------------------------------------------------------------------------

_SAMPLES = 4096  # values of a tensor that are compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Compared:
    """An input that must be the same on every rank. `tolerance` is a share of its norm: ranks that compute the same
    prompt or step on different devices differ a little, other noise or prompts differ by about the norm."""

    name: str
    what: str
    tolerance: float
    advice: str


_COMPARED = (
    _Compared(
        name=_LATENTS,
        what="latents",
        tolerance=1e-3,
        advice="pass generator=torch.Generator('cpu').manual_seed(...) on every rank, with the same seed",
    ),
    _Compared(name="timestep", what="timesteps", tolerance=1e-6, advice="pass the same settings on every rank"),
    _Compared(
        name=_TEXT,
        what="prompts",
        tolerance=1e-2,
        advice="all ranks make one video together: pass the same prompts on every rank",
    ),
)


def check_same_inputs(inputs: Inputs) -> None:
    """Every rank calls it before each forward; raises InvalidRequestError on all of them if one has other inputs than
    rank 0. Costs one small all-gather and one synchronisation with the device."""
    device = inputs[_LATENTS].device
    mine = torch.stack([_fingerprint(inputs[compared.name]).to(device) for compared in _COMPARED])
    everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, mine)
    first, *others = torch.stack(everybody).tolist()
    problems = [
        f"rank {rank} has other {compared.what} than rank 0; {compared.advice}"
        for index, compared in enumerate(_COMPARED)
        for rank, other in enumerate(others, start=1)
        if not _is_near(other[index], first[index], compared.tolerance)
    ]
    if problems:
        raise InvalidRequestError(problems)


def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """[5] float64: number of values, norm of a sample of them, and three sums of it with different weights. What is not
    finite counts as 0: an overflow that all ranks have is no difference between them."""
    values = tensor.reshape(-1)
    sample = values[:: max(1, values.numel() // _SAMPLES)].to(torch.float64).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    steps = torch.arange(sample.numel(), dtype=torch.float64, device=sample.device)
    sums = [(sample * torch.cos(math.sqrt(prime) * steps)).sum() for prime in (2, 3, 5)]
    count = sample.new_tensor(float(values.numel()))
    return torch.stack([count, torch.linalg.vector_norm(sample), *sums])


def _is_near(features: Sequence[float], wanted: Sequence[float], tolerance: float) -> bool:
    count, norm, *_ = wanted
    return features[0] == count and all(
        abs(a - b) <= tolerance * norm for a, b in zip(features[1:], wanted[1:], strict=True)
    )
