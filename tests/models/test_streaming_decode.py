"""Latents that come in pieces give the frames of all latents at once, bit by bit, in memory that does not grow."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipedit.core.errors import NonFiniteError
from pipedit.core.request import VideoRequest
from pipedit.models.adapter import ModelAdapter
from pipedit.models.hunyuan_video.tiles import FRAMES, num_ready_rounds, num_temporal_tiles, temporal_tile
from pipedit.models.latent_stream import LatentStream
from pipedit.models.registry import open_model
from pipedit.parallel.rows import ChannelRows
from tests.models.decode_stages import load
from tests.models.parity import joined, make_request
from tests.parallel.thread_ranks import run_on_threads
from tests.tiny_pipelines import KINDS

Array = np.ndarray[Any, np.dtype[Any]]
Folder = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("values_not_levels")


def make_case(kind: str, folder: Folder, latent_frames: int, **size: int) -> tuple[ModelAdapter, VideoRequest]:
    adapter = open_model(str(folder(kind)))
    size = size or ({"height": 32, "width": 64} if kind == "wan_ti2v" else {"height": 16, "width": 48})
    return adapter, make_request(adapter, kind, num_frames=4 * (latent_frames - 1) + 1, **size)


def random_latents(adapter: ModelAdapter, request: VideoRequest) -> torch.Tensor:
    return torch.randn(adapter.latent_shape(request), generator=torch.Generator().manual_seed(0))


def at_once(
    stage: Any, adapter: ModelAdapter, request: VideoRequest, latents: torch.Tensor, group: ChannelRows | None = None
) -> list[Array | None]:
    state, decoders = stage.begin(request, latents, group), 1 if group is None else group.size
    return [stage.chunk(state, index) for index in range(adapter.num_decode_chunks(request, decoders))]


def in_pieces(
    stage: Any,
    adapter: ModelAdapter,
    request: VideoRequest,
    pieces: Sequence[torch.Tensor],
    group: ChannelRows | None = None,
) -> list[Array | None]:
    """Each chunk is asked for as soon as it is ready. A second video comes in turns, which must not disturb the
    first."""
    state, other = stage.begin(request, group=group), stage.begin(request, group=group)
    came, decoders = 0, 1 if group is None else group.size
    chunks: list[Array | None] = []

    def decode(*, is_complete: bool) -> None:
        for index in range(len(chunks), adapter.num_ready_chunks(came, is_complete=is_complete, decoders=decoders)):
            chunks.append(stage.chunk(state, index))
            stage.chunk(other, index)

    for piece in pieces:
        stage.extend(state, piece)
        stage.extend(other, piece.flip(1))
        came += piece.shape[2]
        decode(is_complete=False)
    stage.finish(state)
    stage.finish(other)
    decode(is_complete=True)
    return chunks


# Eight latent frames: three temporal tiles of HunyuanVideo, the last one of two frames only.
@pytest.mark.parametrize("tiling", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_every_size_equal_the_whole(kind: str, tiling: bool, tiny_folder: Folder) -> None:
    adapter, request = make_case(kind, tiny_folder, 8)
    stage, latents = load(adapter, tiling=tiling), random_latents(adapter, request)
    whole = joined(at_once(stage, adapter, request, latents))
    assert tiling == (not np.array_equal(whole, joined(at_once(load(adapter), adapter, request, latents))))
    for size in range(1, 9):
        assert np.array_equal(joined(in_pieces(stage, adapter, request, latents.split(size, dim=2))), whole), size


def cut(latents: torch.Tensor, places: Sequence[int]) -> list[torch.Tensor]:
    """The pieces between these latent frames."""
    bounds = [0, *sorted(places), latents.shape[2]]
    return [latents[:, :, a:b] for a, b in itertools.pairwise(bounds)]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.sets(st.integers(1, 13)))
@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_random_cuts_change_nothing(kind: str, places: set[int], tiny_folder: Folder) -> None:
    adapter, request = make_case(kind, tiny_folder, 14, height=16, width=16)
    stage, latents = load(adapter), random_latents(adapter, request)
    whole = joined(at_once(stage, adapter, request, latents))
    assert np.array_equal(joined(in_pieces(stage, adapter, request, cut(latents, sorted(places)))), whole)


@pytest.mark.parametrize("latent_frames", [1, 2, 4, 5, 6, 8])
def test_videos_of_few_temporal_tiles(latent_frames: int, tiny_folder: Folder) -> None:
    adapter, request = make_case("hunyuan", tiny_folder, latent_frames)
    stage, latents = load(adapter), random_latents(adapter, request)
    whole = joined(at_once(stage, adapter, request, latents))
    assert np.array_equal(joined(in_pieces(stage, adapter, request, latents.split(1, dim=2))), whole)


@pytest.mark.usefixtures("slabs_of_any_height")
@pytest.mark.parametrize("tiling", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["wan", "wan_ti2v", "hunyuan"])
def test_a_group_decodes_pieces_as_it_decodes_the_whole(
    kind: str, size: int, tiling: bool, tiny_folder: Folder
) -> None:
    """Ranks may hear of the latents in other pieces than their neighbours do."""
    adapter, request = make_case(kind, tiny_folder, 15)
    latents, stages = random_latents(adapter, request), [load(adapter, tiling=tiling) for _ in range(size)]

    def run(group: ChannelRows) -> tuple[list[Array | None], list[Array | None]]:
        group.begin()
        stage, pieces = stages[group.index], latents.split(2 + group.index, dim=2)
        whole = at_once(stage, adapter, request, latents, group)
        return whole, in_pieces(stage, adapter, request, pieces, group)

    (whole, streamed), *others = run_on_threads(size, run)
    assert np.array_equal(joined(streamed), joined(whole))
    assert all(chunk is None for result in others for chunks in result for chunk in chunks)


def test_a_round_waits_for_the_tiles_of_all_ranks(tiny_folder: Folder) -> None:
    hunyuan = open_model(str(tiny_folder("hunyuan")))
    ready = [hunyuan.num_ready_chunks(came, is_complete=False, decoders=2) for came in (0, 5, 7, 8, 13, 14, 20)]
    assert ready == [0, 0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_ready_is_not_decoded(kind: str, tiny_folder: Folder) -> None:
    adapter, request = make_case(kind, tiny_folder, 9)
    stage, latents = load(adapter), random_latents(adapter, request)
    state = stage.begin(request)
    assert adapter.num_ready_chunks(0, is_complete=False) == 0
    with pytest.raises(AssertionError, match="chunk 0 is not ready: 0 latent frames have come, and more will come"):
        stage.chunk(state, 0)
    stage.extend(state, latents[:, :, :6])
    num_ready = adapter.num_ready_chunks(6, is_complete=False)
    assert 0 < num_ready < adapter.num_decode_chunks(request)
    frames = [stage.chunk(state, index) for index in range(num_ready)]
    with pytest.raises(AssertionError, match=f"chunk {num_ready} is not ready: 6 latent frames"):
        stage.chunk(state, num_ready)
    with pytest.raises(AssertionError, match=f"chunk 0 is asked for, and chunk {num_ready} comes next"):
        stage.chunk(state, 0)
    stage.extend(state, latents[:, :, 6:])
    stage.finish(state)
    frames += [stage.chunk(state, index) for index in range(num_ready, adapter.num_decode_chunks(request))]
    assert np.array_equal(joined(frames), joined(at_once(stage, adapter, request, latents)))  # no question did harm
    with pytest.raises(AssertionError, match=r"is not ready: 9 latent frames have come$"):
        stage.chunk(state, len(frames))
    with pytest.raises(AssertionError, match="after the last"):
        stage.extend(state, latents)


def test_a_video_of_nothing_has_no_end(tiny_folder: Folder) -> None:
    adapter, request = make_case("wan", tiny_folder, 1)
    stage = load(adapter)
    with pytest.raises(AssertionError, match="one latent frame at least"):
        stage.finish(stage.begin(request))


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_every_piece_is_checked(kind: str, tiny_folder: Folder) -> None:
    adapter, request = make_case(kind, tiny_folder, 2)
    stage, latents = load(adapter), random_latents(adapter, request)
    state = stage.begin(request)
    stage.extend(state, latents)
    with pytest.raises(NonFiniteError):
        stage.extend(state, latents * float("inf"))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_in_another_order_are_another_video(kind: str, tiny_folder: Folder) -> None:
    adapter, request = make_case(kind, tiny_folder, 11)
    stage, (first, second, third) = load(adapter), cut(random_latents(adapter, request), (5, 8))
    right = joined(in_pieces(stage, adapter, request, [first, second, third]))
    wrong = joined(in_pieces(stage, adapter, request, [first, third, second]))
    assert wrong.shape == right.shape
    assert np.array_equal(wrong[:13], right[:13])
    assert np.abs(wrong - right).max() > 1e-2


# -- memory -------------------------------------------------------------------------------------------------------


def storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """Of every tensor that can be reached."""
    match value:
        case torch.Tensor():
            yield value.untyped_storage()
        case dict():
            for part in value.values():
                yield from storages(part)
        case list() | tuple():
            for part in value:
                yield from storages(part)
        case _:
            yield from storages(getattr(value, "__dict__", {}))


def held_bytes(state: Any) -> int:
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages(state)}.values())


def bytes_along_the_way(kind: str, folder: Folder, *, tiling: bool) -> list[int]:
    """What the state holds after each of 15 blocks of 4 latent frames."""
    adapter, request = make_case(kind, folder, 4, height=32, width=64)
    stage, latents = load(adapter, tiling=tiling), random_latents(adapter, request)
    state, done, held = stage.begin(request), 0, []
    for block in range(1, 16):
        stage.extend(state, latents)
        ready = adapter.num_ready_chunks(4 * block, is_complete=False)
        for index in range(done, ready):
            stage.chunk(state, index)
        done = ready
        held.append(held_bytes(state))
    return held


@pytest.mark.parametrize("tiling", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("kind", ["wan", "wan_ti2v", "hunyuan"])
def test_memory_does_not_grow_with_the_video(kind: str, tiling: bool, tiny_folder: Folder) -> None:
    held = bytes_along_the_way(kind, tiny_folder, tiling=tiling)
    assert max(held[3:6]) == max(held[12:])
    assert max(held) == max(held[:6])


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_latents_that_nobody_lets_go_are_seen(kind: str, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatentStream, "release", lambda _stream, _before: None)
    held = bytes_along_the_way(kind, tiny_folder, tiling=False)
    (growth,) = {after - before for before, after in itertools.pairwise(held[3:])}
    assert growth > 0


# -- arithmetic ---------------------------------------------------------------------------------------------------


@given(came=st.integers(0, 200), more=st.integers(0, 50), factor=st.sampled_from([2, 4, 8]))
def test_tiles_that_are_ready_stay_as_they_are(came: int, more: int, factor: int) -> None:
    ready = num_ready_rounds(came, factor, is_complete=False, decoders=1)
    total = came + 1 + more
    assert ready < num_temporal_tiles(total, factor)
    for index in range(ready):
        assert temporal_tile(came, factor, index) == temporal_tile(total, factor, index)
        assert index + 1 < num_temporal_tiles(came, factor)  # not the last one, so its end is blended with another
    latent = FRAMES.scaled_down(factor)
    assert came < ready * latent.stride + latent.length + 1  # the next one would have a part of its window only


@given(came=st.integers(1, 200), decoders=st.integers(1, 8), is_complete=st.booleans())
def test_rounds_are_full_until_the_last(came: int, decoders: int, is_complete: bool) -> None:
    tiles, rounds = (num_ready_rounds(came, 4, is_complete=is_complete, decoders=n) for n in (1, decoders))
    assert 0 <= rounds * decoders - tiles < decoders if is_complete else 0 <= tiles - rounds * decoders < decoders
    assert tiles <= num_ready_rounds(came + 1, 4, is_complete=is_complete, decoders=1) <= tiles + 1
