"""Wan's VAE decoder on a slab of rows: each convolution is given the rows next to its own, and the mid block's
attention the keys and values of the whole picture. Everything else in the decoder looks at one position.

Exact: every value is computed from the same numbers as in the whole decode. In time nothing can be cut, because each
frame needs the cached features of the one before; those caches simply hold this rank's rows.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock
from torch.utils.hooks import RemovableHandle

from pipedit.models.rows import RowGroup


@contextlib.contextmanager
def on_row_slabs(decoder: torch.nn.Module, group: RowGroup, shares: Sequence[int]) -> Iterator[None]:
    """Inside, `decoder` takes and gives the rows of this rank: `shares[r]` latent rows on rank r of the group. Every
    rank with a share runs the decoder the same number of times. The decoder is left as it was. Nothing is asked of the
    group where one rank has all rows."""
    members = sum(rows > 0 for rows in shares)
    if members == 1:
        yield
        return
    with contextlib.ExitStack() as hooks:
        for module in decoder.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)) and module.kernel_size[-2] > 1:
                handles = _hook_convolution(module, group, members)
            elif isinstance(module, WanAttentionBlock):
                handles = _hook_attention(module, group, shares)
            else:
                continue
            for handle in handles:
                hooks.enter_context(handle)
        yield


def _hook_convolution(
    convolution: torch.nn.Conv2d | torch.nn.Conv3d, group: RowGroup, members: int
) -> tuple[RemovableHandle, ...]:
    """The convolution goes on to put a row of zeros above and below. At the picture's edges that is right; beside a
    neighbour's row it spoils the outermost row of the output, which belongs to the neighbour and is cut off."""
    assert convolution.kernel_size[-2] == 3 and convolution.stride[-2] == 1, convolution  # reaches one row far
    first, last = int(group.index > 0), int(group.index + 1 < members)

    def extend(_module: torch.nn.Module, inputs: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        # The input [.., rows, W], and for causal convolutions the cached frames that go before it (None at first).
        extended = iter(group.with_edges([x for x in inputs if x is not None], members))
        return tuple(None if x is None else next(extended) for x in inputs)

    def crop(_module: torch.nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output[..., first : output.shape[-2] - last, :]

    return convolution.register_forward_pre_hook(extend), convolution.register_forward_hook(crop)


def _hook_attention(block: torch.nn.Module, group: RowGroup, shares: Sequence[int]) -> tuple[RemovableHandle, ...]:
    """Own rows ask, the whole picture answers. The block's own attention, of the slab with itself, still runs in
    between, and is thrown away: with N ranks it is 1 / N^2 of the whole one, and that is 1 % of the decode at most."""
    attended: list[torch.Tensor] = []

    def attend(_module: torch.nn.Module, _inputs: tuple[Any, ...], projected: torch.Tensor) -> None:
        width = projected.shape[1] // 3
        own, key_value = projected.split([width, 2 * width], dim=1)  # [B * T, C or 2 C, rows, W]
        query, key, value = map(_as_one_head, (own, *group.gather_rows(key_value, shares).chunk(2, dim=1)))
        result = F.scaled_dot_product_attention(query, key, value)
        attended.append(result.squeeze(1).transpose(1, 2).reshape(own.shape))

    def replace(_module: torch.nn.Module, _inputs: tuple[Any, ...]) -> tuple[torch.Tensor]:
        return (attended.pop(),)

    before, after = block.get_submodule("to_qkv"), block.get_submodule("proj")
    return before.register_forward_hook(attend), after.register_forward_pre_hook(replace)


def _as_one_head(x: torch.Tensor) -> torch.Tensor:
    """[B, C, rows, W] -> [B, 1, rows * W, C]"""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)
