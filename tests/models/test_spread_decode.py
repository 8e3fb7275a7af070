"""Decoding shared by several ranks (threads here) equals decoding alone, for every model kind and every split.

Slabs of rows: Wan, exact, so within rounding of float32. Temporal tiles of HunyuanVideo and spatial tiles: bit by bit.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import ModelAdapter
from pipedit.models.registry import open_model
from pipedit.models.tiles import Tiling, deal
from pipedit.models.wan.slabs import LEAST_ROWS, num_slabs
from pipedit.parallel.rows import ChannelRows
from tests.models.decode_stages import load
from tests.models.parity import joined, make_request
from tests.parallel.thread_ranks import run_on_threads

Array = np.ndarray[Any, np.dtype[Any]]
Folder = Callable[[str], Path]


class WithoutNeighbours(ChannelRows):
    """The negative control: rows beyond a slab's edge are zeros, as if the picture ended there."""

    def with_edges(self, tensors: Sequence[torch.Tensor], members: int) -> list[torch.Tensor]:
        above, below = int(self.index > 0), int(self.index + 1 < members)
        return [torch.nn.functional.pad(x, (0, 0, above, below)) for x in tensors]


class WithoutOtherKeys(ChannelRows):
    """The negative control: attention hears zeros of the other ranks."""

    def gather_rows(self, tensor: torch.Tensor, shares: Sequence[int]) -> torch.Tensor:
        above, below = sum(shares[: self.index]), sum(shares[self.index + 1 :])
        return torch.nn.functional.pad(tensor, (0, 0, above, below))


def decode(
    stage: Any, adapter: ModelAdapter, request: VideoRequest, group: ChannelRows | None = None
) -> list[Array | None]:
    """Chunks of a video of random latents. A second video is decoded in turns, which must not disturb the first."""
    latents = torch.randn(adapter.latent_shape(request), generator=torch.Generator().manual_seed(0))
    state, other = stage.begin(request, latents, group), stage.begin(request, latents.flip(2), group)
    chunks = []
    for index in range(adapter.num_decode_chunks(request, 1 if group is None else group.size)):
        chunks.append(stage.chunk(state, index))
        stage.chunk(other, index)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in stage.vae.modules())
    return chunks


def alone(adapter: ModelAdapter, request: VideoRequest, *, tiling: bool = False, dtype: str = "float32") -> Array:
    return joined(decode(load(adapter, tiling=tiling, dtype=dtype), adapter, request))


def spread(
    adapter: ModelAdapter,
    request: VideoRequest,
    size: int,
    *,
    tiling: bool = False,
    dtype: str = "float32",
    kind_of_group: type[ChannelRows] = ChannelRows,
) -> Array:
    """What rank 0 of a group gives out; the others give nothing."""
    # Here, because loading is not made for several threads.
    stages = [load(adapter, tiling=tiling, dtype=dtype) for _ in range(size)]

    def run(group: ChannelRows) -> list[Array | None]:
        group.begin()
        return decode(stages[group.index], adapter, request, group)

    first, *others = run_on_threads(size, run, kind_of_group)
    assert {chunk is None for chunks in others for chunk in chunks} == {True}
    return joined(first)


# 2, 10 and 14 latent rows; TI2V's VAE makes 16 pixels of one
PICTURES = {
    "wan": ({"height": 16}, {"height": 80}, {"height": 112, "num_frames": 1}),
    "wan_ti2v": ({"height": 32}, {"height": 160}, {"height": 224, "num_frames": 1}),
}


@pytest.mark.usefixtures("values_not_levels", "slabs_of_any_height")
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", ["wan", "wan_ti2v"])
def test_slabs_of_rows_equal_the_whole_picture(kind: str, size: int, tiny_folder: Folder) -> None:
    """In float64 there is no difference at all (the bound leaves room for other processors). In float32 a slab is as
    near to the truth as the whole picture is: vectorised SiLU rounds the last bit by where a value lies in memory, and
    the norms of these tiny VAEs, over four random channels, make more of it."""
    adapter = open_model(str(tiny_folder(kind)))
    for settings in PICTURES[kind]:
        request = make_request(adapter, kind, **settings)
        truth = alone(adapter, request, dtype="float64")
        assert np.abs(spread(adapter, request, size, dtype="float64") - truth).max() < 1e-9
        whole, slabs = alone(adapter, request), spread(adapter, request, size)
        assert np.abs(slabs - truth).max() < 1e-5 + 2 * np.abs(whole - truth).max() < 1e-3


@pytest.mark.usefixtures("slabs_of_any_height")
@pytest.mark.parametrize("kind", ["wan", "wan_ti2v"])
def test_frames_of_slabs_differ_by_one_level_at_most(kind: str, tiny_folder: Folder) -> None:
    adapter = open_model(str(tiny_folder(kind)))
    for settings in PICTURES[kind]:
        request = make_request(adapter, kind, **settings)
        whole, slabs = alone(adapter, request), spread(adapter, request, 3)
        assert whole.dtype == slabs.dtype == np.uint8
        assert whole.shape == slabs.shape
        assert np.abs(whole.astype(int) - slabs).max() <= 1


@pytest.mark.usefixtures("values_not_levels", "slabs_of_any_height")
@pytest.mark.parametrize("control", [WithoutNeighbours, WithoutOtherKeys])
@pytest.mark.parametrize("kind", ["wan", "wan_ti2v"])
def test_slabs_that_do_not_know_of_each_other_are_another_picture(
    kind: str, control: type[ChannelRows], tiny_folder: Folder
) -> None:
    adapter = open_model(str(tiny_folder(kind)))
    request = make_request(adapter, kind)
    whole, slabs = alone(adapter, request), spread(adapter, request, 2, kind_of_group=control)
    assert np.abs(whole - slabs).max() > 1e-2


class Unasked(ChannelRows):
    """Ranks that share nothing ask nothing of each other."""

    def with_edges(self, tensors: Sequence[torch.Tensor], members: int) -> list[torch.Tensor]:
        raise AssertionError("edges are of no use to who has all rows")

    gather_rows = gather_all = with_edges  # type: ignore[assignment]


@pytest.mark.parametrize("kind", ["wan", "wan_ti2v"])
def test_pictures_of_few_rows_are_decoded_by_the_first_rank(kind: str, tiny_folder: Folder) -> None:
    """Frames come out bit by bit as from one rank; one row more, and they are shared."""
    adapter = open_model(str(tiny_folder(kind)))
    per_row = 16 if kind == "wan_ti2v" else 8
    rows_of_two = 2 * LEAST_ROWS
    small = make_request(adapter, kind, height=(rows_of_two - 2) * per_row)
    assert np.array_equal(alone(adapter, small), spread(adapter, small, 2, kind_of_group=Unasked))
    large = make_request(adapter, kind, height=rows_of_two * per_row)
    with pytest.raises(AssertionError, match="edges are of no use"):
        spread(adapter, large, 2, kind_of_group=Unasked)


@pytest.mark.usefixtures("values_not_levels")
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("num_frames", [1, 17, 21, 37, 65])
def test_temporal_tiles_equal_one_rank_bit_by_bit(num_frames: int, size: int, tiny_folder: Folder) -> None:
    adapter = open_model(str(tiny_folder("hunyuan")))
    request = make_request(adapter, "hunyuan", num_frames=num_frames, height=32, width=32)
    assert np.array_equal(alone(adapter, request), spread(adapter, request, size))


@pytest.mark.usefixtures("values_not_levels")
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", ["wan", "wan_ti2v", "hunyuan"])
def test_spatial_tiles_equal_one_rank_bit_by_bit(kind: str, size: int, tiny_folder: Folder) -> None:
    adapter = open_model(str(tiny_folder(kind)))
    for height, width, num_frames in ((64, 96, 5), (32, 64, 33)):
        request = make_request(adapter, kind, height=height, width=width, num_frames=num_frames)
        whole = alone(adapter, request, tiling=True)
        assert np.array_equal(whole, spread(adapter, request, size, tiling=True))
        assert not np.array_equal(whole, alone(adapter, request))


# -- arithmetic ---------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 200), length=st.integers(1, 40), stride=st.integers(1, 40))
def test_windows_are_those_that_are_counted(size: int, length: int, stride: int) -> None:
    tiling = Tiling(length=max(length, stride), stride=min(length, stride))
    windows = tiling.windows(size)
    assert Counter(window.stop - window.start for window in windows) == tiling.lengths(size)
    assert {position for window in windows for position in range(window.start, window.stop)} == set(range(size))


@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=40), parts=st.integers(1, 9))
def test_work_is_dealt_out_evenly(weights: list[int], parts: int) -> None:
    owners = deal(weights, parts)
    sums = [sum(w for w, owner in zip(weights, owners, strict=True) if owner == part) for part in range(parts)]
    assert sum(sums) == sum(weights)
    assert max(sums) - min(sums) <= max(weights)
    assert weights[owners.index(0)] <= max(weights) == max(w for w, o in zip(weights, owners, strict=True) if o == 0)
    if len(weights) >= parts:
        assert min(sums) > 0


@given(rows=st.integers(1, 500), ranks=st.integers(1, 64))
def test_slabs_are_as_many_as_pay(rows: int, ranks: int) -> None:
    slabs = num_slabs(rows, ranks)
    assert 1 <= slabs <= ranks
    assert slabs == 1 or rows // slabs >= LEAST_ROWS
    assert slabs == ranks or rows // (slabs + 1) < LEAST_ROWS


def test_slabs_of_usual_pictures() -> None:
    """Latent rows of 64 and 96 pixels; of 480p and 720p by Wan 2.1's VAE, and of 704 pixels by TI2V's."""
    assert [num_slabs(rows, 2) for rows in (8, 12, 60)] == [1, 2, 2]
    assert [num_slabs(rows, 8) for rows in (60, 90, 44)] == [8, 8, 7]


def test_small_pictures_cost_the_first_rank_what_they_cost_alone(tiny_folder: Folder) -> None:
    adapter = open_model(str(tiny_folder("wan")))
    precision = adapter.default_precision("cpu")
    for height, is_shared in ((64, False), (256, True)):
        request = make_request(adapter, "wan", height=height)
        one, two = (adapter.cost(request, precision, decoders=n).parts["vae"].working for n in (1, 2))
        assert (two < one) if is_shared else (two == one)


def test_hunyuan_video_decodes_in_rounds(tiny_folder: Folder) -> None:
    hunyuan, wan = open_model(str(tiny_folder("hunyuan"))), open_model(str(tiny_folder("wan")))
    request = make_request(hunyuan, "hunyuan", num_frames=129)  # 33 latent frames, 11 temporal tiles
    assert [hunyuan.num_decode_chunks(request, decoders) for decoders in (1, 2, 4, 8, 11, 12)] == [11, 6, 3, 2, 1, 1]
    assert {wan.num_decode_chunks(request, decoders) for decoders in (1, 2, 8)} == {33}
