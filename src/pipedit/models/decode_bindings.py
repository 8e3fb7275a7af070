"""From a diffusers VAE to how a group of ranks decodes with it. Knows that VAEs have `_decode`, which `decode` calls
for the whole batch, or for one video after the other where slicing is enabled.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from pipedit.models.rows import VideoGroup

# Classes as text, so that a family is imported only where it is used.
_DECODES = {
    "AutoencoderKLWan": "pipedit.models.wan.spread_decode:decode",
    "AutoencoderKLHunyuanVideo": "pipedit.models.hunyuan_video.spread_decode:decode",
}


def spread_decode(vae: Any, group: VideoGroup, device: torch.device) -> Callable[[], None]:
    """From now on `vae.decode(latents)` on every rank of the group decodes together, with equal latents, and every rank
    gets the whole video. Returns what leaves the VAE as it was.

    Each rank goes on to decode the whole video for itself, which gives the same, where nobody wrote a way to share it:
    other classes of VAE, compiled ones, latents on another device than `device` (the group's), recorded gradients.
    """
    from diffusers.models.autoencoders.vae import DecoderOutput

    if group.size == 1 or type(vae).__name__ not in _DECODES or _is_replaced(vae):
        return _nothing
    decode = _imported(_DECODES[type(vae).__name__])
    own_decode = vae._decode
    home = torch.empty(0, device=device).device  # with its index

    def whole(latents: torch.Tensor) -> torch.Tensor:
        video: torch.Tensor = own_decode(latents).sample
        return video

    def together(z: torch.Tensor, return_dict: bool = True) -> Any:
        if z.device != home or torch.is_grad_enabled():
            return own_decode(z, return_dict=return_dict)
        group.begin()
        video = decode(vae, z, group, whole)
        return DecoderOutput(sample=video) if return_dict else (video,)

    vae._decode = together
    return lambda: delattr(vae, "_decode")


def _is_replaced(vae: Any) -> bool:
    """Whether the VAE, a part of it, or its decode was compiled, or replaced by somebody."""
    return not vars(vae).keys().isdisjoint({"decode", "_decode"}) or any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in vae.modules()
    )


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _nothing() -> None: ...
