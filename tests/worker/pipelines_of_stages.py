"""Block denoisers of a tiny model on one stage, or on several that are threads of this process, joined by gloo."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from pipedit.core.blocks import BlockPlan, Op, Prefix, Storage
from pipedit.core.request import VideoRequest
from pipedit.models.adapter import BlockStage, ModelAdapter, Precision
from pipedit.models.registry import open_model
from pipedit.parallel.context_attention import ContextAttention
from pipedit.parallel.groups import channel_opener
from pipedit.parallel.rotation import turn
from pipedit.parallel.runtime import ParallelRuntime
from pipedit.parallel.stage_links import StageLinks
from pipedit.plan.block_orders import eager_order, published_order
from pipedit.worker.block_denoiser import BlockDenoiser, FinishedBlock
from tests.models.parity import make_request

TIMEOUT_S = 60.0
FLOAT32 = Precision(text_encoder="float32", transformer="float32", vae="float32")
GUIDED: dict[str, Any] = {"hunyuan": {"true_cfg_scale": 3.0, "negative_prompt": "green"}}
UNGUIDED: dict[str, Any] = {"hunyuan": {"true_cfg_scale": 1.0}}

Texts = dict[str, torch.Tensor]
Order = Callable[[BlockPlan], Iterator[Op]]
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """A plan, and what it comes to: the latent frames of each block. Its latent frames are theirs, or `asked`."""

    sizes: tuple[int, ...]
    block: int
    context: int
    rerun: bool = False
    asked: int | None = None  # in compat mode

    def plan(self, num_steps: int) -> BlockPlan:
        return BlockPlan(
            latents=sum(self.sizes) if self.asked is None else self.asked,
            block_latents=self.block,
            context_latents=self.context,
            num_steps=num_steps,
            prefix=Prefix.RERUN if self.rerun else Prefix.CACHE,
            compat=self.asked is not None,
        )


WAYS = {
    "cache": Way(sizes=(3, 3, 3, 3), block=3, context=2),
    "rerun": Way(sizes=(3, 3, 3, 3), block=3, context=2, rerun=True),
    "compat": Way(sizes=(3, 2, 2), block=2, context=1, rerun=True, asked=6),  # 3 * nb + nc latents
    "compat, whole blocks": Way(sizes=(4, 2, 2), block=2, context=2, rerun=True, asked=5),
    "as much context as there is": Way(sizes=(2, 2, 2), block=2, context=2),
    "short end": Way(sizes=(3, 3, 1), block=3, context=2),
    "short end, rerun": Way(sizes=(3, 3, 1), block=3, context=2, rerun=True),
    "no context": Way(sizes=(2, 2, 1), block=2, context=0),
    "no context, rerun": Way(sizes=(2, 2, 1), block=2, context=0, rerun=True),
    "one block": Way(sizes=(3,), block=4, context=2),
}
STEPS = {"wan22": 6}  # both experts come to work


def eager(plan: BlockPlan) -> Iterator[Op]:
    return eager_order(plan, 3)


ORDERS = {"published": published_order, "eager": eager}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attached:
    """A stage and the kernel that takes its neighbours' keys."""

    stage: BlockStage
    context: ContextAttention

    @classmethod
    def load(cls, adapter: ModelAdapter, layers: range, storage: Storage = Storage.DEVICE) -> "Attached":
        stage = adapter.load_block_stage("cpu", FLOAT32, layers)
        context = ContextAttention(functools.partial(turn, rotation=stage.rotation), storage)
        alone = ParallelRuntime(ranks=(0,), rank=0, device="cpu", open_channel=_nobody_else)
        alone.take_keys_from(context)
        stage.attach(alone)
        return cls(stage=stage, context=context)


def _nobody_else(*_: Any) -> Any:
    raise AssertionError("a stage is alone in its layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipelines:
    """Of one tiny model; stages are loaded once for each depth."""

    kind: str
    folder: Path
    adapter: ModelAdapter
    stages: dict[int, list[Attached]] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, kind: str, folder: Path) -> "Pipelines":
        return cls(kind=kind, folder=folder, adapter=open_model(str(folder)))

    def of_depth(self, depth: int) -> list[Attached]:
        if depth not in self.stages:
            cut = self.adapter.layer_split().ranges(depth)
            self.stages[depth] = [Attached.load(self.adapter, layers) for layers in cut]
        return self.stages[depth]

    def job(self, way: Way, *, guided: bool = True, steps: int | None = None) -> "Job":
        steps = STEPS.get(self.kind, 4) if steps is None else steps
        plan = way.plan(steps)
        assert tuple(plan.latents_of(block) for block in range(plan.num_blocks or 0)) == way.sizes
        return Job(
            plan=plan,
            request=self.request(steps, guided=guided),
            texts=self.texts(guided=guided),
            noise=self.noise(plan),
        )

    # -- what is asked for ------------------------------------------------------------------------------------------

    def request(self, num_steps: int, *, guided: bool = True, **settings: Any) -> VideoRequest:
        guidance = GUIDED if guided else UNGUIDED
        chosen = guidance.get(self.kind, {} if guided else {"guidance_scale": 1.0})
        return make_request(self.adapter, self.kind, num_inference_steps=num_steps, **{**chosen, **settings})

    def texts(self, *, guided: bool = True) -> Texts:
        """Of one branch or two, of different lengths."""
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(5))
        texts = {"prompt": draw(1, 7, 32), "negative": draw(1, 5, 32)}
        if self.kind == "hunyuan":
            texts |= {"pooled": draw(1, 16), "negative_pooled": draw(1, 16)}
        return texts if guided else {name: text for name, text in texts.items() if not name.startswith("negative")}

    def noise(self, plan: BlockPlan, seed: int = 0) -> list[torch.Tensor]:
        """Of each block, all of it new."""
        assert plan.num_blocks is not None
        shape = self.adapter.latent_shape(self.request(1, num_frames=1))
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(*shape[:2], plan.latents_of(block), *shape[3:], generator=generator)
            for block in range(plan.num_blocks)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A video: what the denoisers of all stages are made of."""

    plan: BlockPlan
    request: VideoRequest
    texts: Texts
    noise: Sequence[torch.Tensor]
    order: Order = published_order
    name: str = "video"

    def denoiser(self, attached: Attached, links: StageLinks, depth: int) -> BlockDenoiser:
        # Nobody reads how long the whole video is, or from what it was drawn.
        request = dataclasses.replace(self.request, num_frames=0, seed=None)
        state = attached.stage.begin(request, dict(self.texts))
        return BlockDenoiser(
            attached.stage,
            lambda _block: state,
            self.plan,
            self.order(self.plan),
            video=self.name,
            depth=depth,
            links=links,
            context=attached.context,
            noise=self.noise.__getitem__,
            clock=lambda: 0.0,
        )

    @property
    def count(self) -> int:
        assert self.plan.num_operations is not None
        return self.plan.num_operations


def denoise(job: Job, attached: Attached, links: StageLinks, depth: int, piece: int = 5) -> list[torch.Tensor]:
    """A whole video, in pieces of so many operations; on the first stage its blocks. Nothing is left over."""
    denoiser, finished = job.denoiser(attached, links, depth), list[FinishedBlock]()
    for _ in range(0, job.count + 1, piece):
        for ran in denoiser.run(piece):
            finished += ran.finished
    finished += denoiser.drain()
    assert_nothing_is_left(attached, links)
    assert [block.block for block in finished] == list(range(len(job.noise) if attached.stage.first else 0))
    return [block.latents for block in finished]


def assert_nothing_is_left(attached: Attached, links: StageLinks) -> None:
    assert not attached.context.entries and attached.context.nbytes == 0
    for inbox in (links.before, links.results_in):
        assert inbox is None or inbox.waiting == 0
    for outbox in (links.after, links.results_out):
        assert outbox is None or not outbox._leaving


def on_one_stage(pipelines: Pipelines, job: Job) -> list[torch.Tensor]:
    return denoise(job, pipelines.of_depth(1)[0], StageLinks(), 1)


def in_stages(pipelines: Pipelines, depth: int, work: Callable[[Attached, StageLinks], Result]) -> list[Result]:
    """`work` on every stage at once; what each returned."""
    stages, store, ranks = pipelines.of_depth(depth), HashStore(), list(range(1, depth + 1))

    def one(attached: Attached, rank: int) -> Result:
        opener = channel_opener(store, rank=rank, device="cpu")
        links = StageLinks.open(ranks, rank, device="cpu", open_channel=opener, epoch=0)
        try:
            return work(attached, links)
        finally:
            links.abandon()

    with ThreadPoolExecutor(depth) as threads:
        futures = [threads.submit(one, *each) for each in zip(stages, ranks, strict=True)]
        return [future.result(TIMEOUT_S) for future in futures]


def on_stages(pipelines: Pipelines, job: Job, depth: int) -> list[torch.Tensor]:
    return in_stages(pipelines, depth, lambda attached, links: denoise(job, attached, links, depth))[0]


def same_bits(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
