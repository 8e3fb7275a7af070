"""`pipedit bench device`: rates of attention, linear layers and VAE decoding at a model's own shapes, as a profile.

Head counts and token counts are those that ranks of 1, 2, 4 and 8 would see, so that a planner need not guess them.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from pipedit.bench.environment import environment
from pipedit.core.request import VideoRequest
from pipedit.engine.engine import Engine
from pipedit.models.adapter import AttentionSite
from pipedit.plan.device_profile import DeviceProfile, Rate

_SHARES = (1, 2, 4, 8)


def measure(engine: Engine, request: VideoRequest, *, repeats: int = 5, with_decode: bool = True) -> DeviceProfile:
    """The profile of the engine's device at the shapes of a prepared request. `with_decode` loads the VAE."""
    device, precision = engine.device, engine.precision
    dtype = getattr(torch, precision.transformer)
    site, tokens = engine.adapter.attention_sites()[0], engine.adapter.token_layout(request).latent_tokens
    rates = _attention_rates(site, tokens, device, dtype, repeats) + _linear_rates(site, tokens, device, dtype, repeats)
    if with_decode:
        rates.append(_decode_rate(engine, request))
    return DeviceProfile(
        device=_device_name(device),
        memory_bytes=_memory_bytes(device),
        rates=tuple(rates),
        source={"model": engine.settings.model, "tokens": tokens, **environment()},
    )


def _attention_rates(site: AttentionSite, tokens: int, device: str, dtype: torch.dtype, repeats: int) -> list[Rate]:
    rates = []
    for share in _SHARES:
        heads = max(site.heads // share, 1)
        q, k, v = (torch.randn(1, heads, tokens, site.head_dim, device=device, dtype=dtype) for _ in range(3))
        seconds = _seconds(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v), device, repeats)  # type: ignore[misc]
        shape = {"heads": heads, "tokens": tokens, "head_dim": site.head_dim}
        rates.append(_rate("attention", dtype, shape, 4 * tokens * tokens * heads * site.head_dim / seconds))
    return rates


def _linear_rates(site: AttentionSite, tokens: int, device: str, dtype: torch.dtype, repeats: int) -> list[Rate]:
    hidden, rates = site.heads * site.head_dim, []
    weight = torch.randn(4 * hidden, hidden, device=device, dtype=dtype)
    for share in _SHARES:
        rows = -(-tokens // share)
        x = torch.randn(rows, hidden, device=device, dtype=dtype)
        seconds = _seconds(lambda x=x: F.linear(x, weight), device, repeats)  # type: ignore[misc]
        shape = {"tokens": rows, "inputs": hidden, "outputs": 4 * hidden}
        rates.append(_rate("linear", dtype, shape, 2 * rows * hidden * 4 * hidden / seconds))
    return rates


def _decode_rate(engine: Engine, request: VideoRequest) -> Rate:
    """From decoding the first chunks of random latents; the first chunk warms up."""
    cost = engine.adapter.cost(request, engine.precision)
    stage = engine.adapter.load_decode_stage(engine.device, engine.precision, tiling=engine.settings.vae_tiling)
    state = stage.begin(request, torch.randn(engine.adapter.latent_shape(request)))
    seconds = []
    for index in range(min(cost.num_chunks, 4)):
        start = time.perf_counter()
        stage.chunk(state, index)
        seconds.append(time.perf_counter() - start)
    operations = cost.decode_chunk if len(seconds) > 1 else cost.decode_first_chunk
    took = statistics.median(seconds[1:] or seconds)
    shape = {"height": request.height or 0, "width": request.width or 0}
    return _rate("convolution", getattr(torch, engine.precision.vae), shape, operations.total / took)


def _rate(kind: str, dtype: torch.dtype, shape: dict[str, int], operations_per_s: float) -> Rate:
    name = str(dtype).removeprefix("torch.")
    return Rate(kind=kind, dtype=name, shape=shape, operations_per_s=operations_per_s)


def _seconds(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Median seconds of one call after a warm-up; on a GPU each call is waited for."""
    taken = []
    with torch.inference_mode():
        for number in range(repeats + 1):
            start = time.perf_counter()
            work()
            if device != "cpu":
                torch.cuda.synchronize(device)
            if number:
                taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _device_name(device: str) -> str:
    return str(environment()["processor"]) if device == "cpu" else torch.cuda.get_device_name(device)


def _memory_bytes(device: str) -> int:
    if device == "cpu":
        return int(environment()["memory_bytes"])
    return int(torch.cuda.get_device_properties(device).total_memory)
