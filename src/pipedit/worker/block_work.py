"""What a worker does for videos that are made block by block: its layers' part of the denoising, and decoding of blocks
as they are finished. Knows no other requests' order and not how commands reach it."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan
from pipedit.core.request import VideoRequest
from pipedit.models.adapter import BlockStage, DecodeStage, LayerSplit, ModelAdapter
from pipedit.models.seeding import initial_noise
from pipedit.parallel.context_attention import ContextAttention
from pipedit.parallel.groups import OpenChannel
from pipedit.parallel.stage_links import StageLinks
from pipedit.plan.block_orders import order_of
from pipedit.plan.noise_pool import noise_indices, pool_size
from pipedit.worker.block_denoiser import BlockDenoiser, FinishedBlock, Ran
from pipedit.worker.block_prompts import BlockStates, schedule_of, split
from pipedit.worker.run import Clock
from pipedit.worker.snapshot_files import on_device

Frames = np.ndarray[Any, np.dtype[np.uint8]]
Keep = Callable[[FinishedBlock], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """The stages of the layer pipeline, `ranks` in order, of which `rank` may be one."""

    ranks: tuple[int, ...]
    rank: int
    device: str
    open_channel: OpenChannel | None  # None where there is one stage

    @property
    def depth(self) -> int:
        return len(self.ranks)

    def layers(self, split: LayerSplit) -> range | None:
        """Those of this rank; None if it is no stage."""
        return split.ranges(self.depth)[self.ranks.index(self.rank)] if self.rank in self.ranks else None

    def links(self, epoch: int) -> StageLinks:
        if self.open_channel is None:
            return StageLinks()
        return StageLinks.open(self.ranks, self.rank, device=self.device, open_channel=self.open_channel, epoch=epoch)


class BlockStageWork:
    """One stage's part of videos that are made one after the other. `links` stay open from video to video, and are
    made anew in an epoch after a failure."""

    def __init__(
        self, adapter: ModelAdapter, stage: BlockStage, ring: Ring, context: ContextAttention, clock: Clock
    ) -> None:
        self._adapter, self._stage, self._ring, self._context, self._clock = adapter, stage, ring, context, clock
        self._links: StageLinks | None = None
        self._epoch = 0
        self._denoiser: BlockDenoiser | None = None
        self._finished = 0

    @property
    def finished(self) -> int:
        """Blocks of the video under way that are finished, on the first stage."""
        return self._finished

    def meet(self, epoch: int) -> None:
        """Opens the links to the other stages, which do this at the same time, unless they are open."""
        self._opened(epoch)

    def begin(
        self,
        request_id: str,
        command: messages.DenoiseBlocks,
        conditioning: dict[str, torch.Tensor],
        saved: dict[str, Any] | None = None,
    ) -> None:
        """Before a video's first operations here; `saved` tells what came before them (see `save`)."""
        request, plan = command.request, command.blocks
        self._finished = 0
        self._denoiser = BlockDenoiser(
            self._stage,
            BlockStates(
                functools.partial(self._stage.begin, request),
                split(conditioning),
                schedule_of(request),
                plan,
                self._adapter.size_rules.frame_step,
            ),
            plan,
            order_of(plan, self._ring.depth),
            video=request_id,
            depth=self._ring.depth,
            links=self._opened(command.epoch),
            context=self._context,
            noise=BlockNoise(self._adapter, request, plan, self._stage.device),
            clock=self._clock,
        )
        if saved is not None:
            self._finished = saved["finished"]
            self._denoiser.restore(saved["denoiser"], lambda tree: on_device(tree, self._stage.device))

    def save(self, at: int, keep: Keep) -> dict[str, Any]:
        """All that is needed to go on after `at` operations, which all stages have run, as a tree (see adapter.
        BlockStage) whose tensors are in use. `keep` as in `run`."""
        denoiser = self._denoiser
        assert denoiser is not None and denoiser.done == at, f"not after {at} operations"
        self._keep(denoiser.drain(), keep)
        return {"finished": self._finished, "denoiser": denoiser.save()}

    def run(self, command: messages.DenoiseBlocks, keep: Keep) -> Iterator[Ran]:
        """The command's operations, each as it is done. `keep` is given every block that is finished by then."""
        denoiser = self._denoiser
        assert denoiser is not None, "no video has begun"
        for ran in denoiser.run(command.count):
            self._keep(ran.finished, keep)
            yield ran
        if command.first + command.count == command.blocks.num_operations:
            self._keep(denoiser.drain(), keep)

    def end(self, *, failed: bool) -> None:
        """The video is over, or is given up after every stage has run the same operations; `failed`: after some rank
        has failed, so that messages may be missing."""
        denoiser, self._denoiser = self._denoiser, None
        if failed:
            self.recover()
        elif denoiser is not None:
            denoiser.drain()
        self._context.abandon()

    def recover(self) -> None:
        """After a failure: stages that wait for this one fail too."""
        links, self._links, self._denoiser = self._links, None, None
        if links is not None:
            links.abandon()
        self._context.abandon()

    def close(self) -> None:
        links, self._links = self._links, None
        if links is not None:
            links.abandon()  # whatever is on its way is wanted by nobody

    def _keep(self, finished: tuple[FinishedBlock, ...], keep: Keep) -> None:
        for block in finished:
            keep(block)
            self._finished = block.block + 1

    def _opened(self, epoch: int) -> StageLinks:
        if self._links is None or epoch > self._epoch:
            self.recover()
            self._links, self._epoch = self._ring.links(epoch), epoch
        return self._links


class BlockNoise:
    """The noise of each block, from one pool (DualParal, section 3.3): a few latent frames, drawn from the seed on the
    CPU, that every block uses again in another order. Blocks are asked for in order of time, from any one on."""

    def __init__(self, adapter: ModelAdapter, request: VideoRequest, plan: BlockPlan, device: str) -> None:
        assert request.seed is not None
        one, channels, _, height, width = adapter.latent_shape(dataclasses.replace(request, num_frames=1))
        shape = (one, channels, pool_size(plan), height, width)
        self._pool = initial_noise(shape, request.seed, device)
        self._indices_from = functools.partial(noise_indices, plan, request.seed)
        self._indices: Iterator[tuple[int, ...]] | None = None

    def __call__(self, block: int) -> torch.Tensor:
        if self._indices is None:
            self._indices = self._indices_from(block)
        return self._pool[:, :, list(next(self._indices))]


class BlockDecoder:
    """Decodes the blocks of a video in order, as far as can be told from those that are there."""

    def __init__(self, adapter: ModelAdapter, stage: DecodeStage, request: VideoRequest) -> None:
        self._adapter, self._stage = adapter, stage
        self._state = stage.begin(request)
        self._latents = self._chunks = 0

    def save(self) -> dict[str, Any]:
        """As a tree (see adapter.BlockStage), whose tensors are in use."""
        return {"latents": self._latents, "chunks": self._chunks, "state": self._stage.save(self._state)}

    @classmethod
    def restore(
        cls, adapter: ModelAdapter, stage: DecodeStage, request: VideoRequest, saved: dict[str, Any]
    ) -> "BlockDecoder":
        """Goes on where the one that was saved has been."""
        decoder = cls(adapter, stage, request)
        decoder._latents, decoder._chunks = saved["latents"], saved["chunks"]
        decoder._state = stage.restore(on_device(saved["state"], stage.device))
        return decoder

    def add(self, latents: torch.Tensor, *, is_last: bool) -> Iterator[Frames]:
        """Takes the next block [1, C, f, H, W]; yields the frames that are final now. Lazy."""
        self._stage.extend(self._state, latents)
        self._latents += latents.shape[2]
        if is_last:
            self._stage.finish(self._state)
        ready = self._adapter.num_ready_chunks(self._latents, is_complete=is_last)
        while self._chunks < ready:
            frames = self._stage.chunk(self._state, self._chunks)
            self._chunks += 1
            assert frames is not None
            yield frames
