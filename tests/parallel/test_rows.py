"""Rows shared by gloo ranks: edges, whole pictures, pieces; and the decode of each model kind built on them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipedit.core.shares import ranges, split_evenly
from pipedit.models.registry import open_model
from pipedit.parallel.channel import Channel
from pipedit.parallel.rows import ChannelRows
from tests.models.parity import make_request
from tests.parallel.ranks import Ranks, fresh_opener

Group = Callable[[int], Ranks]
Array = np.ndarray[Any, np.dtype[Any]]
WORLD = 4
_groups: dict[int, ChannelRows] = {}  # of a rank's process, which stays: the first n ranks


def _group(rank: int, size: int) -> ChannelRows:
    """The first `size` ranks. All groups are made at the first call, on every rank."""
    if not _groups:
        open_channel = fresh_opener(rank)
        for count in range(rank + 1, WORLD + 1):
            _groups[count] = ChannelRows(ranks=range(count), rank=rank, device="cpu", open_channel=open_channel)
    return _groups[size]


def _picture(total: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, total, 5, generator=torch.Generator().manual_seed(total)).mul(40).to(dtype)


# -- what moves ---------------------------------------------------------------------------------------------------


def edges(rank: int, _world_size: int, total: int) -> list[torch.Tensor]:
    group = _group(rank, WORLD)
    group.begin()
    shares = group.shares(total, WORLD)
    if shares[rank] == 0:
        return []
    own = [picture.split(shares, dim=-2)[rank] for picture in (_picture(total), _picture(total)[:1] + 1)]
    return group.with_edges(own, sum(rows > 0 for rows in shares))


@pytest.mark.parametrize("total", [2, 4, 9, 11])
def test_edges_are_the_neighbours_rows(total: int, gloo: Group) -> None:
    rows = [part for part in ranges(split_evenly(total, WORLD)) if part.start < part.stop]
    results = gloo(WORLD).run(edges, total)
    assert results[len(rows) :] == [[]] * (WORLD - len(rows))
    for part, (first, second) in zip(rows, results, strict=False):
        reach = slice(max(part.start - 1, 0), part.stop + 1)
        assert torch.equal(first, _picture(total)[..., reach, :])
        assert torch.equal(second, _picture(total)[:1, :, reach] + 1)


def whole(rank: int, _world_size: int, total: int, dtype: torch.dtype) -> torch.Tensor | None:
    group = _group(rank, WORLD)
    group.begin()
    shares = group.shares(total, WORLD)
    return group.gather_rows(_picture(total, dtype).split(shares, dim=-2)[rank], shares) if shares[rank] else None


@pytest.mark.parametrize(("total", "dtype"), [(3, torch.float32), (10, torch.bfloat16), (5, torch.float16)])
def test_every_rank_with_rows_gets_the_whole_picture(total: int, dtype: torch.dtype, gloo: Group) -> None:
    results = gloo(WORLD).run(whole, total, dtype)
    assert all(torch.equal(result, _picture(total, dtype)) for result in results[: min(total, WORLD)])
    assert results[total:] == [None] * max(WORLD - total, 0)


def pieces(rank: int, _world_size: int, lengths: tuple[int, ...]) -> list[torch.Tensor] | None:
    group = _group(rank, WORLD)
    group.begin()
    return group.collect(torch.full((lengths[rank],), rank, dtype=torch.uint8), lengths)


def test_pieces_come_to_the_first_rank(gloo: Group) -> None:
    first, *others = gloo(WORLD).run(pieces, (3, 0, 5, 1))
    assert others == [None] * 3
    assert [piece.tolist() for piece in first] == [[0] * 3, [], [2] * 5, [3]]


def gathered(rank: int, _world_size: int) -> list[torch.Tensor | None]:
    group = _group(rank, WORLD)
    group.begin()
    return group.gather_all(_picture(rank + 1, DTYPES[rank]) if rank != 2 else None)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def test_everybody_gets_tensors_that_nobody_announced(gloo: Group) -> None:
    for everything in gloo(WORLD).run(gathered):
        assert everything[2] is None
        for rank in (0, 1, 3):
            assert everything[rank].dtype == DTYPES[rank]
            assert torch.equal(everything[rank], _picture(rank + 1, DTYPES[rank]))


def passed(rank: int, _world_size: int, senders: tuple[int, ...]) -> float | None:
    group = _group(rank, WORLD)
    group.begin()
    incoming = torch.full((1,), -1.0) if (rank - 1) % WORLD in senders else None
    group.pass_on(torch.full((1,), float(rank)) if rank in senders else None, incoming)
    return None if incoming is None else float(incoming)


def test_the_next_rank_gets_what_is_passed_on(gloo: Group) -> None:
    assert gloo(WORLD).run(passed, (0, 1, 2, 3)) == [3, 0, 1, 2]
    assert gloo(WORLD).run(passed, (0, 1)) == [None, 0, 1, None]


def reset(rank: int, _world_size: int) -> list[list[torch.Tensor] | None]:
    group = ChannelRows(ranks=range(WORLD), rank=rank, device="cpu", open_channel=fresh_opener(rank))
    results = []
    for epoch, start in enumerate((0, 10)):
        group.begin(epoch)
        results.append(group.collect(torch.full((1,), start + rank), [1] * WORLD))
    group.close()
    return results


def test_a_group_goes_on_in_a_new_epoch(gloo: Group) -> None:
    first, *_ = gloo(WORLD).run(reset)
    assert [[int(piece) for piece in pieces] for pieces in first] == [[0, 1, 2, 3], [10, 11, 12, 13]]


def test_an_epoch_makes_a_fresh_channel() -> None:
    opened: list[str] = []

    def open_channel(name: str, members: Sequence[int]) -> Channel:
        assert members == (3,)
        opened.append(name)
        return Channel()

    group = ChannelRows(ranks=[3], rank=3, device="cpu", open_channel=open_channel)
    assert (group.size, group.index, opened) == (1, 0, [])
    group.begin()
    group.begin()
    assert len(opened) == 1
    group.reset()
    with pytest.raises(AssertionError, match="begin first"):
        group.collect(torch.ones(2), [2])
    group.begin(epoch=2)
    assert opened == ["rows/0", "rows/2"]
    assert group.collect(torch.ones(2), [2]) is not None


# -- decoding -----------------------------------------------------------------------------------------------------

CASES = {
    "wan": ({"height": 32}, {"height": 80}),  # 4 and 10 latent rows
    "wan22": ({"height": 112, "num_frames": 5},),
    "wan_ti2v": ({"height": 96}, {"height": 32, "num_frames": 1}),  # 6 and 2
    "hunyuan": ({"num_frames": 37}, {"num_frames": 65}),  # 3 and 5 temporal tiles
}


def decoded(rank: int, _world_size: int, folder: str, kind: str, sizes: tuple[int, ...]) -> list[list[Array | None]]:
    """For each number of ranks (1: alone) and each case of the kind."""
    torch.set_num_threads(1)
    adapter = open_model(folder)
    results = []
    for size in sizes:
        if rank >= size:
            continue
        stage = adapter.load_decode_stage("cpu", adapter.default_precision("cpu"))
        group = _group(rank, size)
        group.begin()
        for settings in CASES[kind]:
            request = make_request(adapter, kind, **settings)
            latents = torch.randn(adapter.latent_shape(request), generator=torch.Generator().manual_seed(0))
            state = stage.begin(request, latents, group)
            results.append([stage.chunk(state, index) for index in range(adapter.num_decode_chunks(request, size))])
    return results


@pytest.mark.parametrize("kind", sorted(CASES))
def test_ranks_that_decode_together_equal_one(kind: str, gloo: Group, tiny_folder: Callable[[str], Path]) -> None:
    sizes = (1, 2, 3, 4)
    first, *others = gloo(WORLD).run(decoded, str(tiny_folder(kind)), kind, sizes)
    assert all(chunk is None for results in others for chunks in results for chunk in chunks)
    videos = [np.concatenate(chunks) for chunks in first]
    count = len(CASES[kind])
    for number, video in enumerate(videos):
        alone = videos[number % count]
        assert video.shape == alone.shape
        difference = np.abs(video.astype(int) - alone).max()
        assert difference == 0 if kind == "hunyuan" else difference <= 1
