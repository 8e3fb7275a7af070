"""Noise from a seed: drawn whole, on the CPU, from one generator, so that it is the same on any device and ranks."""

import torch


def initial_noise(shape: tuple[int, ...], seed: int, device: str) -> torch.Tensor:
    """Standard normal float32 [shape] on `device`; the numbers that diffusers draws with a CPU generator."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(device)
