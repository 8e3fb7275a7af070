"""What a worker does for a video in blocks: noise from the pool, operations by command, endings, failures, decoding."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.models.seeding import initial_noise
from pipedit.parallel.groups import channel_opener
from pipedit.plan.block_orders import order_of
from pipedit.worker.block_denoiser import FinishedBlock, Ran
from pipedit.worker.block_work import BlockDecoder, BlockNoise, BlockStageWork, Ring
from pipedit.worker.block_worker import BlockWorker
from pipedit.worker.settings import WorkerSettings
from pipedit.worker.shelf import Shelf
from tests.models.parity import joined
from tests.worker.pipelines_of_stages import FLOAT32, WAYS, Job, Pipelines, on_one_stage, same_bits

Open = Callable[[str], Pipelines]
Latents = list[torch.Tensor]
TIMEOUT_S = 60.0


# -- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_noise_is_the_pool_in_other_orders(way: str, opened: Open) -> None:
    """Section 6 of the paper's algorithm: P_k is the last nc of P_{k-1}, then its first nb shuffled; a block takes the
    last nb of P_k, block 0 in compat mode all. So a window of the predecessor's end and the own latents holds each
    latent of the pool once."""
    pipelines, chosen = opened("wan"), WAYS[way]
    plan, request = chosen.plan(4), pipelines.request(4, seed=11)
    pool = torch.randn(1, 16, chosen.block + chosen.context, 4, 6, generator=torch.Generator().manual_seed(11))
    noise = BlockNoise(pipelines.adapter, request, plan, "cpu")
    found = []
    for block, size in enumerate(chosen.sizes):
        drawn = noise(block)
        assert drawn.dtype == torch.float32 and drawn.shape == (1, 16, size, 4, 6)
        same = (drawn[0, :, :, None] == pool[0, :, None]).all(dim=(0, 3, 4))  # [size, pool]
        assert (same.sum(dim=1) == 1).all()
        found.append(same.int().argmax(dim=1).tolist())
    for before, own in itertools.pairwise(found):
        window = [*before[len(before) - chosen.context :], *own]
        assert len(set(window)) == len(window)
        if len(own) == chosen.block:
            assert sorted(window) == list(range(chosen.block + chosen.context))
    if plan.compat:
        assert sorted(found[0]) == list(range(chosen.block + chosen.context))
    again = BlockNoise(pipelines.adapter, request, plan, "cpu")
    assert all(torch.equal(again(block), pool[:, :, places]) for block, places in enumerate(found))
    other = BlockNoise(pipelines.adapter, pipelines.request(4, seed=12), plan, "cpu")
    assert not torch.equal(other(0), pool[:, :, found[0]])


def test_noise_is_drawn_as_that_of_a_whole_video(opened: Open) -> None:
    pipelines = opened("hunyuan")
    plan = WAYS["cache"].plan(4)
    noise = BlockNoise(pipelines.adapter, pipelines.request(4, seed=5), plan, "cpu")
    pool = initial_noise((1, 4, 5, 4, 6), 5, "cpu")
    assert {float(x.sum()) for x in noise(0)[0].unbind(1)} <= {float(x.sum()) for x in pool[0].unbind(1)}


# -- operations by command --------------------------------------------------------------------------------------------


def one_stretch(texts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the encoder hands over a prompt that holds for the whole video."""
    return {f"0/{name}": text for name, text in texts.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Film:
    """A video that is asked for, and the commands for it."""

    pipelines: Pipelines
    plan: BlockPlan
    request: VideoRequest
    name: str = "film"

    @classmethod
    def of(cls, pipelines: Pipelines, way: str = "cache", *, name: str = "film", seed: int = 3) -> "Film":
        request = pipelines.request(4, seed=seed)
        return cls(pipelines=pipelines, plan=WAYS[way].plan(4), request=request, name=name)

    @property
    def count(self) -> int:
        assert self.plan.num_operations is not None
        return self.plan.num_operations

    def commands(self, piece: int, *, epoch: int = 0) -> Iterator[messages.DenoiseBlocks]:
        for first in range(0, self.count, piece):
            count = min(piece, self.count - first)
            yield messages.DenoiseBlocks(
                request_id=self.name, ranks=(0,), request=self.request, epoch=epoch, first=first, count=count,
                blocks=self.plan,
            )  # fmt: skip

    def expected(self, depth: int = 1) -> Latents:
        """By one block denoiser."""
        noise = BlockNoise(self.pipelines.adapter, self.request, self.plan, "cpu")
        job = Job(
            plan=self.plan,
            request=self.request,
            texts=self.pipelines.texts(),
            noise=[noise(block) for block in range(self.plan.num_blocks or 0)],
            order=lambda plan: order_of(plan, depth),
        )
        return on_one_stage(self.pipelines, job)


def work_of(pipelines: Pipelines, number: int = 0, depth: int = 1, store: HashStore | None = None) -> BlockStageWork:
    """Of stage `number`, whose rank is one more."""
    attached, ranks = pipelines.of_depth(depth)[number], tuple(range(1, depth + 1))
    opener = None if depth == 1 else channel_opener(store, rank=ranks[number], device="cpu")
    ring = Ring(ranks=ranks, rank=ranks[number], device="cpu", open_channel=opener)
    return BlockStageWork(pipelines.adapter, attached.stage, ring, attached.context, lambda: 0.0)


def obey(
    work: BlockStageWork,
    film: Film,
    *,
    piece: int = 5,
    pieces: int | None = None,
    epoch: int = 0,
    keep: Callable[[FinishedBlock], None] | None = None,
) -> Latents:
    """The first `pieces` commands; the blocks that came, which must come in order."""
    blocks = list[FinishedBlock]()
    for command in itertools.islice(film.commands(piece, epoch=epoch), pieces):
        if command.first == 0:
            work.begin(film.name, command, one_stretch(film.pipelines.texts()))
        for _ in work.run(command, keep or blocks.append):
            assert work.finished == len(blocks)
    assert [block.block for block in blocks] == list(range(len(blocks)))
    return [block.latents for block in blocks]


@pytest.mark.parametrize("piece", [1, 3, 5, 16])
@pytest.mark.parametrize("way", ["cache", "rerun"])
def test_all_blocks_are_there_when_the_last_command_is_done(way: str, piece: int, opened: Open) -> None:
    film, seen = Film.of(opened("wan"), way), list[Ran]()
    work, kept = work_of(film.pipelines), list[FinishedBlock]()
    counts = []
    for command in film.commands(piece):
        if command.first == 0:
            work.begin(film.name, command, one_stretch(film.pipelines.texts()))
        seen += work.run(command, kept.append)
        counts.append(work.finished)
        assert work.finished == len(kept)
    assert [ran.op for ran in seen] == list(order_of(film.plan, 1))
    assert [block.block for block in kept] == list(range(film.plan.num_blocks or 0))
    assert counts == sorted(counts) and counts[-1] == film.plan.num_blocks
    assert piece == film.count or 0 < counts[-2] < counts[-1]  # some came before, the rest was on its way
    assert same_bits([block.latents for block in kept], film.expected())
    work.end(failed=False)


def test_a_video_begins_from_nothing(opened: Open) -> None:
    """After one that was stopped half-way."""
    pipelines = opened("wan")
    work, film = work_of(pipelines), Film.of(pipelines)
    attached = pipelines.of_depth(1)[0]
    obey(work, Film.of(pipelines, name="stopped", seed=4), pieces=2)
    assert attached.context.entries
    work.end(failed=False)
    assert not attached.context.entries
    obey(work, film, pieces=1, piece=3)
    assert work.finished == 0
    work.end(failed=False)
    assert same_bits(obey(work, film), film.expected())  # and again, from its own beginning
    work.end(failed=False)
    work.end(failed=False)  # once more does no harm
    work.close()


def test_nothing_goes_on_after_a_failure(opened: Open) -> None:
    pipelines = opened("wan")
    work, film = work_of(pipelines), Film.of(pipelines)
    obey(work, film, pieces=1)
    work.recover()
    assert not pipelines.of_depth(1)[0].context.entries
    with pytest.raises(AssertionError, match="no video has begun"):
        list(work.run(next(film.commands(5)), lambda _: None))
    work.recover()
    assert same_bits(obey(work, film, epoch=1), film.expected())
    work.close()


# -- several stages ---------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


def works_of(pipelines: Pipelines, depth: int) -> list[BlockStageWork]:
    store = HashStore()
    return [work_of(pipelines, number, depth, store) for number in range(depth)]


@pytest.mark.parametrize("way", ["cache", "rerun"])
def test_links_are_used_for_one_video_after_the_other(way: str, opened: Open, threads: ThreadPoolExecutor) -> None:
    """The first is stopped after the same operations on every stage, in pieces of their own."""
    pipelines = opened("wan")
    works, stopped, film = works_of(pipelines, 3), Film.of(pipelines, way, name="stopped"), Film.of(pipelines, way)

    def stage(number: int) -> Latents:
        work, piece = works[number], (6, 2, 3)[number]
        assert len(obey(work, stopped, piece=piece, pieces=6 // piece)) <= 1
        work.end(failed=False)
        blocks = obey(work, film, piece=piece)
        work.end(failed=False)
        return blocks

    first, *others = threads.map(stage, range(3), timeout=TIMEOUT_S)
    assert same_bits(first, film.expected(depth=3))
    assert others == [[], []]
    for attached in pipelines.of_depth(3):
        assert not attached.context.entries
    for work in works:
        work.close()


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_after_a_failure_all_begin_anew(guilty: int, opened: Open, threads: ThreadPoolExecutor) -> None:
    """Whoever fails, the others fail of it instead of waiting, and in a new epoch everything is as it was."""
    pipelines = opened("wan")
    works, film = works_of(pipelines, 3), Film.of(pipelines)
    (layers,) = pipelines.of_depth(3)[guilty].stage.modules
    calls = itertools.count()

    def fail(_module: nn.Module, _inputs: object) -> None:
        if next(calls) == 9:
            raise ValueError("no memory")

    def stage(number: int, epoch: int) -> Latents:
        try:
            return obey(works[number], film, epoch=epoch)
        except BaseException:
            works[number].recover()
            raise

    handle = layers.register_forward_pre_hook(fail)
    futures = [threads.submit(stage, number, 0) for number in range(3)]
    errors = [future.exception(TIMEOUT_S) for future in futures]
    handle.remove()
    assert isinstance(errors.pop(guilty), ValueError)
    assert all(isinstance(error, RuntimeError) for error in errors), errors
    for work in works:
        work.end(failed=True)
    first, *_ = threads.map(lambda number: stage(number, 1), range(3), timeout=TIMEOUT_S)
    assert same_bits(first, film.expected(depth=3))
    for work in works:
        work.close()


def test_who_did_not_fail_lets_go_of_the_old_links_in_a_new_epoch(opened: Open, threads: ThreadPoolExecutor) -> None:
    """A stage may have done its part before another one failed, and hears of it only by the number."""
    pipelines = opened("wan")
    works, film = works_of(pipelines, 2), Film.of(pipelines)

    def refuse(_: FinishedBlock) -> None:
        raise ValueError("no room for it")

    def stage(number: int) -> Latents:
        return obey(works[number], film, piece=film.count, keep=refuse if number == 0 else None)

    futures = [threads.submit(stage, number) for number in range(2)]
    assert isinstance(futures[0].exception(TIMEOUT_S), ValueError)
    works[0].recover()
    futures[1].exception(TIMEOUT_S)  # whether it was through with its part or not
    first, _ = threads.map(lambda number: obey(works[number], film, epoch=1), range(2), timeout=TIMEOUT_S)
    assert same_bits(first, film.expected(depth=2))
    for work in works:
        work.close()


# -- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [(8,), (3, 3, 2), (2, 2, 2, 2), (7, 1), (1,) * 8])
@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_blocks_are_decoded_as_the_whole_video(kind: str, cut: tuple[int, ...], opened: Open) -> None:
    pipelines = opened(kind)
    adapter, request = pipelines.adapter, pipelines.request(1, num_frames=29, height=16, width=32)
    stage = adapter.load_decode_stage("cpu", FLOAT32)
    latents = torch.randn(adapter.latent_shape(request), generator=torch.Generator().manual_seed(0))
    state = stage.begin(request, latents)
    whole = joined([stage.chunk(state, index) for index in range(adapter.num_decode_chunks(request))])
    decoder, pieces, came = BlockDecoder(adapter, stage, request), list[np.ndarray](), 0
    for number, block in enumerate(latents.split(cut, dim=2)):
        came += block.shape[2]
        pieces += decoder.add(block, is_last=number + 1 == len(cut))
        assert len(pieces) == adapter.num_ready_chunks(came, is_complete=came == 8)
    assert len(whole) == 29 and np.array_equal(np.concatenate(pieces), whole)


# -- a worker of all of it --------------------------------------------------------------------------------------------


@pytest.fixture
def worker(opened: Open) -> Iterator[BlockWorker]:
    adapter, shelf = opened("wan").adapter, Shelf(rank=0, device="cpu")
    worker = BlockWorker(
        adapter,
        WorkerSettings(device="cpu", precision=FLOAT32, is_blockwise=True),
        rank=0,
        placement=Placement.colocated(1),
        ring=Ring(ranks=(0,), rank=0, device="cpu", open_channel=None),
        shelf=shelf,
        clock=lambda: 0.0,
    )
    worker.load()
    yield worker
    worker.close()


def test_a_worker_keeps_a_block_until_it_was_decoded(worker: BlockWorker, opened: Open) -> None:
    film, frames, shelf = Film.of(opened("wan"), "short end"), list[int](), worker._shelf
    asked: dict[str, Any] = {"request_id": film.name, "ranks": (0,), "request": film.request}
    worker.handle(messages.Encode(**asked))
    text_bytes, finished, decoded = shelf.held_bytes, 0, 0
    for command in film.commands(4):
        event = worker.handle(dataclasses.replace(command, decoded=decoded))
        assert isinstance(event, messages.BlocksDone)
        assert (event.done, finished) <= (command.first + command.count, event.finished)
        finished = event.finished
        held = sum(film.plan.latents_of(block) for block in range(decoded, finished))
        assert shelf.held_bytes == text_bytes + held * 16 * 4 * 6 * 4
        while decoded < finished:
            answer = worker.handle(messages.DecodeBlock(**asked, block=decoded, blocks=film.plan, latents_at=0))
            assert isinstance(answer, messages.BlockDecoded) and answer.block == decoded
            frames.append(0 if answer.frames is None else len(answer.frames))
            decoded += 1
    assert frames == [1 + 2 * 4, 3 * 4, 1 * 4]
    worker.handle(messages.Release(request_id=film.name, ranks=(0,)))
    assert shelf.held_bytes == 0 and not worker._decoders


def test_prefixes_make_different_videos(opened: Open) -> None:
    """The control of what was compared above."""
    pipelines = opened("wan")
    assert not same_bits(Film.of(pipelines, "cache").expected(), Film.of(pipelines, "rerun").expected())
