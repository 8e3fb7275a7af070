"""Ring attention on gloo ranks equals attention over everything in one process."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from pipedit.core.shares import ranges
from pipedit.parallel.channel import Channel
from pipedit.parallel.kernels import attention
from pipedit.parallel.ring import RingAttention
from pipedit.parallel.workspace import Workspace
from tests.parallel.ranks import Ranks, fresh_opener

WIDTH = 16
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2}
_channels: list[Channel] = []  # of a rank's process, which stays: one of all ranks
Group = Callable[[int], Ranks]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """`tokens` of each member; its number is the size of the ring. `shown`: text tokens that count, by batch row."""

    tokens: tuple[int, ...]
    text_tokens: int = 0
    shown: tuple[int, ...] | None = None
    batch: int = 2
    heads: int = 3
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v [B, n, S + T, D]: latent tokens of all members in order, then the text."""
        shape = (3, self.batch, self.heads, sum(self.tokens) + self.text_tokens, WIDTH)
        stacked = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)
        return stacked[0] * 2, stacked[1], stacked[2]

    def mask(self, tokens: int) -> torch.Tensor | None:
        """[B, 1, 1, tokens + T]: all latent tokens count, and the shown text."""
        if self.shown is None:
            return None
        text = torch.arange(self.text_tokens) < torch.tensor(self.shown).unsqueeze(1)
        return torch.cat([torch.ones(self.batch, tokens, dtype=torch.bool), text], dim=1)[:, None, None]

    def expected(self) -> torch.Tensor:
        q, k, v = (x.double() for x in self.inputs())
        mask = self.mask(sum(self.tokens))
        scores = q @ k.transpose(-1, -2) / WIDTH**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        result: torch.Tensor = scores.softmax(-1) @ v
        return result


def ring_results(rank: int, world_size: int, cases: list[Case]) -> list[torch.Tensor]:
    """This rank's output of each case, on rings of all ranks."""
    return [_attend(RingAttention(_channel(rank, world_size), case.tokens), case, rank) for case in cases]


def _channel(rank: int, world_size: int) -> Channel:
    if not _channels:
        _channels.append(fresh_opener(rank)("ring", range(world_size)))
    return _channels[0]


def _attend(ring: RingAttention, case: Case, rank: int) -> torch.Tensor:
    latents, rows = sum(case.tokens), ranges(case.tokens)[rank]
    # [S, B, n, D] in memory, as the exchange receives it
    parts = [x.permute(2, 0, 1, 3) for x in case.inputs()]
    q, k, v = (torch.cat([x[rows], x[latents:]]).permute(1, 2, 0, 3) for x in parts)
    return ring(q, k, v, text_tokens=case.text_tokens, mask=case.mask(case.tokens[rank]))


CASES = {
    "two": Case(tokens=(16, 16)),
    "two unequal": Case(tokens=(19, 7), heads=1),
    "one has nothing": Case(tokens=(0, 12), text_tokens=4),
    "one has nothing, no text": Case(tokens=(12, 0)),
    "three with text": Case(tokens=(8, 11, 5), text_tokens=6),
    "four, uneven, some empty": Case(tokens=(9, 0, 4, 0), text_tokens=3),
    "four, masks": Case(tokens=(6, 5, 5, 5), text_tokens=7, shown=(7, 3)),
    "no text counts, one has nothing": Case(tokens=(5, 0, 6), text_tokens=4, shown=(4, 0)),
    "bfloat16": Case(tokens=(24, 20, 20, 20), text_tokens=4, dtype=torch.bfloat16),
    "no heads here": Case(tokens=(4, 4), heads=0),
}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ring_equals_attention_over_everything(gloo: Group, size: int) -> None:
    cases = {name: case for name, case in CASES.items() if len(case.tokens) == size}
    answers = gloo(size).run(ring_results, list(cases.values()))
    for number, (name, case) in enumerate(cases.items()):
        expected, latents = case.expected(), sum(case.tokens)
        for member, rows in enumerate(ranges(case.tokens)):
            out = answers[member][number]
            wanted = torch.cat([expected[:, :, rows], expected[:, :, latents:]], dim=2)
            assert out.dtype == case.dtype and out.shape == wanted.shape, name
            if wanted.numel():
                error = (out.double() - wanted).abs().max() / wanted.abs().max()
                assert error < TOLERANCE[case.dtype], f"{name}, member {member}: {error}"


def test_a_member_that_sees_its_own_keys_only_would_be_found() -> None:
    """Negative control of the comparison above: attention over a member's own block is far from the whole."""
    case = CASES["two"]
    q, k, v = case.inputs()
    own = attention(q[:, :, :16], k[:, :, :16], v[:, :, :16])
    assert (own.double() - case.expected()[:, :, :16]).abs().max() > 1000 * TOLERANCE[case.dtype]


def test_a_ring_of_one_is_plain_attention() -> None:
    case = Case(tokens=(20,), text_tokens=5, shown=(5, 2))
    out = _attend(RingAttention(Channel(), case.tokens), case, 0)
    assert torch.equal(out, attention(*case.inputs(), case.mask(20)))


def kept_bytes(rank: int, world_size: int, cases: list[Case]) -> list[int]:
    """Bytes of the workspace after each case, every one on a ring of its own."""
    workspace, seen = Workspace(torch.device("cpu")), []
    for case in cases:
        _attend(RingAttention(_channel(rank, world_size), case.tokens, workspace), case, rank)
        seen.append(workspace.allocated_bytes)
    return seen


def test_buffers_are_two_blocks_and_are_kept(gloo: Group) -> None:
    """A chunk with fewer heads reuses the memory of one with more; no block is larger than the largest member's."""
    cases = [Case(tokens=(6, 5, 5, 5), heads=heads) for heads in (3, 2, 3, 1)]
    element, batch, heads = 4, 2, 3
    for seen in gloo(4).run(kept_bytes, cases):
        assert seen == [2 * (2 * batch * heads * 6 * WIDTH) * element] * len(cases)
