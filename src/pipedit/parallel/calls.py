"""What a strategy asks of an attention call and gives back. The models' classes fit by shape; neither side imports the
other. Legends and meanings: pipedit.models.sequence."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch


class Call(Protocol):
    """One self-attention on this rank's tokens; heads are asked for as runs."""

    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def batch(self) -> int: ...
    @property
    def local_tokens(self) -> int: ...
    @property
    def text_tokens(self) -> int: ...
    @property
    def text_mask(self) -> torch.Tensor | None: ...

    def value(self, heads: slice) -> torch.Tensor: ...
    def key(self, heads: slice) -> torch.Tensor: ...
    def query(self, heads: slice) -> torch.Tensor: ...
    def text(self, heads: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """`latents` [B, s, n, D] of this rank's tokens and `text` [B, T, n, D] for a run of heads."""

    heads: slice
    latents: torch.Tensor
    text: torch.Tensor | None = None


# query [B, n, Q, D], key and value [B, n, S + T, D], key mask [B, 1, 1, S + T] or None -> [B, n, Q, D]
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def key_mask(call: Call, latent_tokens: int) -> torch.Tensor | None:
    """[B, 1, 1, S + T]: every latent token is a key, text tokens as the call says."""
    if call.text_mask is None:
        return None
    latents = call.text_mask.new_ones(call.batch, latent_tokens)
    return torch.cat([latents, call.text_mask], dim=1)[:, None, None, :]
