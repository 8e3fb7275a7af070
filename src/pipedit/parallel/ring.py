"""Ring attention: keys and values travel round a group of ranks, queries stay. Exact up to the rounding of a merge.

Shape legend: B batch, n heads, S latent tokens of one member, T text tokens, D head width.
"""

from collections.abc import Sequence

import torch

from pipedit.parallel.channel import Channel, Pending
from pipedit.parallel.kernels import attention, attention_with_lse, merge
from pipedit.parallel.workspace import Workspace


class RingAttention:
    """Attention of this member's queries over the latent tokens of all members of `channel` and the text.

    `tokens[i]`: latent tokens of member i; any may be 0. Every member must make the same calls in the same order, with
    the same B, n, D and dtype. Memory: two buffers of 2 * B * n * max(tokens) * D elements each in `workspace` (keys
    and values of one block; none if the group has one member), kept between calls and shared by all rings that are
    given the same one. During a call also a float32 sum of the output's size and the output of one block.
    """

    def __init__(self, channel: Channel, tokens: Sequence[int], workspace: Workspace | None = None) -> None:
        """Without a workspace it keeps one of its own."""
        assert len(tokens) == channel.size, (tokens, channel.size)
        self._channel, self._tokens = channel, tuple(tokens)
        self._workspace = workspace

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, text_tokens: int, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, n, S + T, D] in q's dtype, of q, k, v [B, n, S + T, D]: this member's S latent tokens, then the T text
        tokens, which all members have. `mask` [B, 1, 1, S + T] bool as in `attention`; False only for text.

        Text keys count once, with the own block; the text's query rows come out on every member, equal up to rounding.
        """
        own = self._tokens[self._channel.index]
        assert q.shape[2] == k.shape[2] == own + text_tokens, (q.shape, k.shape, own, text_tokens)
        if self._channel.size == 1:
            return attention(q, k, v, mask)
        held, spare = self._buffers(k)
        block = _view(held, k, own)
        block[0].copy_(k[:, :, :own])
        block[1].copy_(v[:, :, :own])
        pending, following = self._pass_on(0, block, spare, k)
        out, lse = attention_with_lse(q, k, v, mask)
        total = out.to(lse.dtype)  # no copy in float32
        for step in range(1, self._channel.size):
            pending.wait()
            held, spare, block = spare, held, following
            if step + 1 < self._channel.size:
                pending, following = self._pass_on(step, block, spare, k)
            if block.numel():
                merge(total, lse, *attention_with_lse(q, block[0], block[1]))
        return total.to(q.dtype)

    def _pass_on(
        self, step: int, block: torch.Tensor, spare: torch.Tensor, like: torch.Tensor
    ) -> tuple[Pending, torch.Tensor]:
        """Sends the block in hand to the next member while the one after it comes in from the previous member.
        `spare` was sent in the swap before, which is over."""
        size, index = self._channel.size, self._channel.index
        outgoing: list[torch.Tensor | None] = [None] * size
        incoming: list[torch.Tensor | None] = [None] * size
        following = _view(spare, like, self._tokens[(index - step - 1) % size])
        outgoing[(index + 1) % size] = block
        incoming[(index - 1) % size] = following
        return self._channel.swap(outgoing, incoming), following

    def _buffers(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two flat buffers, large enough for any member's block."""
        if self._workspace is None:
            self._workspace = Workspace(like.device)
        batch, heads, _, width = like.shape
        shape = (2 * batch * heads * max(self._tokens) * width,)
        take = self._workspace.take
        return take(("ring", 0), shape, like.dtype), take(("ring", 1), shape, like.dtype)


def _view(buffer: torch.Tensor, like: torch.Tensor, tokens: int) -> torch.Tensor:
    """Keys and values of a block, [2, B, n, tokens, D], at the start of a buffer; contiguous."""
    batch, heads, _, width = like.shape
    shape = (2, batch, heads, tokens, width)
    return buffer[: 2 * batch * heads * tokens * width].view(shape)
