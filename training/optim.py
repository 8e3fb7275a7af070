"""Muon for hidden weight matrices, AdamW for the rest, with one schedule for both."""

import math

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Keller Jordan, 2024). Convolutions count as [out, everything else]."""

    def __init__(self, params: list[nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(state["momentum"], alpha=group["momentum"]).reshape(p.shape[0], -1)
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.add_(_orthogonal(update).view_as(p).to(p.dtype), alpha=-group["lr"] * scale)


def _orthogonal(update: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrix."""
    x = update.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: torch.Tensor = x.T if tall else x
    return result


def make_optimizers(
    hidden: list[nn.Parameter], rest: list[nn.Parameter], *, rest_lr: float, rest_betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    optimizers = [Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=rest_lr, betas=rest_betas, weight_decay=0.0)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(
    optimizers: list[torch.optim.Optimizer], step: int, total: int, *, warm_up: int, floor: float
) -> None:
    """Linear warm-up, then a cosine down to `floor` of the peak."""
    progress = min(step / total, 1.0)
    factor = min((step + 1) / warm_up, 1.0) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
