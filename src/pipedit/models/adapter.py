"""What a model family declares, and the stages it can load. Strategies use these words and no model's name.

An adapter is made from a checkpoint's config files alone, without torch, so that input can be checked and costs
predicted before anything heavy is imported. The stages hold weights and are loaded where they run.

Shape legend: B batch, S latent tokens, T text tokens, N heads, C latent channels, F latent frames, H W latent size.
"""

import abc
import dataclasses
import enum
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pipedit.core.errors import CheckpointError, InvalidRequestError
from pipedit.core.request import RequestDefaults, VideoRequest
from pipedit.core.rotation import TemporalRotation
from pipedit.core.shares import ranges, split_evenly
from pipedit.models.checkpoint import Checkpoint
from pipedit.models.config_needs import ConfigNeeds, config_problems
from pipedit.models.noise_schedulers import scheduler_problem
from pipedit.models.sequence import SequenceParallel
from pipedit.plan.costs import RequestCost

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from pipedit.models.rows import RowGroup


class QueryKeyNorm(enum.StrEnum):
    """Over what q and k are normalised: decides how finely the projections can be pipelined by heads."""

    NONE = "none"
    PER_HEAD = "per_head"
    ALL_HEADS = "all_heads"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One self-attention that a sequence-parallel strategy can attach to.

    `path` is the module inside the transformer; `joint_text` says that text tokens take part as queries and keys
    (after the latent tokens), as in HunyuanVideo.
    """

    path: str
    layer: int
    heads: int
    head_dim: int
    query_key_norm: QueryKeyNorm
    joint_text: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionForward:
    """The self-attentions of one forward pass, `sites` of them with the same shape: what ranks need to know that take
    heads of them without running the model. `dtype` by its name in torch; `text_tokens` are those in the same
    attention as the latents."""

    sites: int
    batch: int
    heads: int
    head_dim: int
    latent_tokens: int
    text_tokens: int
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """How a request's tokens are laid out: `latent_frames` x `rows` x `columns` latent tokens in that order, then
    `text_tokens`. `text_is_joint`: the text is in the same attention as the latents; else it is cross-attended.
    `text_is_masked`: padding text is no key; else it is (Wan's zeros)."""

    latent_frames: int
    rows: int
    columns: int
    text_tokens: int
    text_is_joint: bool
    text_is_masked: bool

    @property
    def latent_tokens(self) -> int:
        return self.latent_frames * self.rows * self.columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSplit:
    """How a transformer falls into front / layers / back, as prefixes of parameter names inside it.

    `everywhere` is computed before the layers too, but its results go into each of them (the time, a text that is
    cross-attended), so every rank has it.
    """

    front: tuple[str, ...]
    layers: tuple[str, ...]  # one prefix a layer, in order of execution
    back: tuple[str, ...]
    everywhere: tuple[str, ...] = ()

    def wanted(self, layers: range | None) -> tuple[str, ...]:
        """Prefixes that a rank with these layers needs. The first range brings the front, the last one the back."""
        if layers is None:
            layers = range(len(self.layers))
        front = self.front if self.has_front(layers) else ()
        back = self.back if self.has_back(layers) else ()
        return (*front, *self.everywhere, *self.layers[layers.start : layers.stop], *back)

    def has_front(self, layers: range) -> bool:
        return self._legal(layers).start == 0

    def has_back(self, layers: range) -> bool:
        return self._legal(layers).stop == len(self.layers)

    def ranges(self, stages: int) -> tuple[range, ...]:
        """Layers of each of so many stages: counts differ by at most one, larger ones first. Raises
        InvalidRequestError if a stage would have none."""
        if stages > len(self.layers):
            raise InvalidRequestError(
                [f"{stages} stages cannot share {len(self.layers)} layers; take {len(self.layers)} stages or fewer"]
            )
        return tuple(range(part.start, part.stop) for part in ranges(split_evenly(len(self.layers), stages)))

    def _legal(self, layers: range) -> range:
        assert layers.step == 1 and 0 <= layers.start < layers.stop <= len(self.layers), layers
        return layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeRules:
    """Legal sizes: num_frames = frame_step * n + 1, height and width multiples of `size_multiple`."""

    frame_step: int
    size_multiple: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Data types by part, as torch names: "float32", "bfloat16", "float16"."""

    text_encoder: str
    transformer: str
    vae: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFrame:
    """Fixed text around a prompt when it is tokenized. The first `cropped_tokens` tokens, a start token included, are
    dropped from the embedding and do not count towards `max_sequence_length`."""

    before: str = ""
    after: str = ""
    cropped_tokens: int = 0


class StageParallel(SequenceParallel, Protocol):
    """What a denoise stage asks of the ranks that share its work."""

    def branches(self, predictions: Sequence[Callable[[], "torch.Tensor"]]) -> "list[torch.Tensor]":
        """The results of all predictions (conditional, unconditional), on every rank."""


def one_after_the_other(predictions: Sequence[Callable[[], "torch.Tensor"]]) -> "list[torch.Tensor]":
    """`StageParallel.branches` of a rank alone."""
    return [predict() for predict in predictions]


class TextStage(Protocol):
    """Prompt -> conditioning tensors. The dictionary's keys are the adapter's own business. It computes where the
    weights of its modules are."""

    @property
    def modules(self) -> "Sequence[nn.Module]":
        """Everything that holds weights."""

    def encode(self, request: VideoRequest) -> dict[str, "torch.Tensor"]: ...

    def joint_tokens(self, conditioning: Mapping[str, "torch.Tensor"]) -> tuple[int, ...]:
        """For each forward pass of a step, the text tokens that take part in self-attention: 0 where the text is
        cross-attended."""


class DenoiseStage(Protocol):
    """Noise -> clean latents, one step at a time. The state belongs to one request.

    `device`: where it computes; set by whoever moves the weights.
    """

    device: str

    @property
    def modules(self) -> "Sequence[nn.Module]":
        """Everything that holds weights."""

    def modules_of_step(self, state: Any, index: int) -> "Sequence[nn.Module]":
        """Those whose weights the step needs."""

    def begin(self, request: VideoRequest, conditioning: dict[str, "torch.Tensor"]) -> Any:
        """Draws the whole noise from the request's seed on the CPU and prepares the noise scheduler."""

    def step(self, state: Any, index: int) -> None: ...

    def attach(self, parallel: StageParallel) -> None:
        """Shares every later step with other ranks, which must take the same steps at the same time. Once, before
        `compile_layers`."""

    def compile_layers(self) -> None:
        """torch.compile of the repeated layers only: one compilation serves all of them."""

    def latents(self, state: Any) -> "torch.Tensor":
        """The latents [1, C, F, H, W] in float32 as they are after the last step done."""


class BlockStage(Protocol):
    """Some of the denoiser's layers: one stage of a layer pipeline through which windows of latent frames pass, each
    at a step of its own. Between stages travel hidden states, rows of this rank only where ranks share the tokens.

    `device`: as in DenoiseStage. What `begin` returns is shared by all blocks of a video and never changes.
    """

    device: str

    @property
    def first(self) -> bool:
        """Whether it takes latents. It alone has blocks: `begin_block`, `latents` and `advance` are its own."""

    @property
    def last(self) -> bool:
        """Whether it gives predictions."""

    @property
    def modules(self) -> "Sequence[nn.Module]":
        """Everything that holds weights."""

    @property
    def rotation(self) -> TemporalRotation: ...

    @property
    def hidden_dtype(self) -> "torch.dtype":
        """Of hidden states, and of predictions."""

    def attach(self, parallel: StageParallel) -> None:
        """As in DenoiseStage. Branches are the caller's business: `parallel.branches` is not asked."""

    def compile_layers(self) -> None:
        """As in DenoiseStage."""

    def begin(self, request: VideoRequest, conditioning: dict[str, "torch.Tensor"]) -> Any:
        """`request.num_frames` and `request.seed` are not read."""

    def num_branches(self, state: Any) -> int:
        """Predictions of a step: 2 with guidance (conditional, unconditional), else 1."""

    def tokens_per_frame(self, state: Any) -> int:
        """Latent tokens of one latent frame."""

    def hidden_shapes(self, state: Any, branch: int, frames: int) -> tuple[tuple[int, ...], ...]:
        """Of the tensors that travel between two stages for a window of so many latent frames."""

    def begin_block(self, state: Any, noise: "torch.Tensor") -> Any:
        """A block that starts as this noise [1, C, f, H, W] float32, with a noise scheduler of its own."""

    def latents(self, block: Any) -> "torch.Tensor":
        """[1, C, f, H, W] float32, as they are after the last step applied."""

    def run(
        self, state: Any, step: int, branch: int, frames: int, given: "Sequence[torch.Tensor]"
    ) -> "tuple[torch.Tensor, ...]":
        """One forward of these layers on a window of `frames` latent frames. `given`: on the first stage the latents
        [1, C, frames, H, W] alone, else what the stage before returned. Returns hidden states, on the last stage the
        prediction [1, C, frames, H, W] alone; they may share memory with each other, never with `given`."""

    def guide(self, state: Any, step: int, predictions: "Sequence[torch.Tensor]") -> "torch.Tensor":
        """All branches' predictions, in order, as one. Any run of latent frames will do."""

    def advance(self, state: Any, block: Any, step: int, prediction: "torch.Tensor") -> None:
        """Applies the guided prediction [1, C, f, H, W] of the block's next step, and keeps nothing of it."""

    def save_block(self, state: Any, block: Any) -> dict[str, Any]:
        """All that the block is, as a tree: dictionaries with text keys, lists, tensors, and what JSON knows. The
        tensors are the block's own. Raises SnapshotError where that cannot be told."""

    def restore_block(self, state: Any, saved: dict[str, Any]) -> Any:
        """The block that was saved, bit by bit; its tensors become the block's, and are on `device`. Raises
        SnapshotError for one that does not fit."""


class DecodeStage(Protocol):
    """Clean latents -> frames, chunk by chunk in order, each once. The state belongs to one request.

    Latents may come in pieces, while later ones are still noise; frames are the same to the bit, however they were cut,
    and those of all latents at once. Latents that no chunk needs any more are let go, so that memory does not grow with
    the video.

    `device`: as in DenoiseStage.
    """

    device: str

    @property
    def modules(self) -> "Sequence[nn.Module]":
        """Everything that holds weights."""

    def begin(
        self, request: VideoRequest, latents: "torch.Tensor | None" = None, group: "RowGroup | None" = None
    ) -> Any:
        """`latents`: all of them; None where they come by `extend`. With a group of several ranks, they share the work
        on this request: each of them has begun the group, gets the same whole latents, in pieces of any size, and is
        asked for the same chunks in the same order."""

    def extend(self, state: Any, latents: "torch.Tensor") -> None:
        """The latents [1, C, f, H, W] that follow those that came before. Raises NonFiniteError."""

    def finish(self, state: Any) -> None:
        """No more latents come. Until then the end of what came may have to wait."""

    def chunk(self, state: Any, index: int) -> "np.ndarray[Any, np.dtype[np.uint8]] | None":
        """Frames of chunk `index`, [frames, height, width, 3] uint8. In a group, None on all ranks but the first. It
        must be ready (see `ModelAdapter.num_ready_chunks`)."""

    def save(self, state: Any) -> dict[str, Any]:
        """All that the state is, as a tree (see BlockStage.save_block). It must be of a rank that decodes alone."""

    def restore(self, saved: dict[str, Any]) -> Any:
        """The state that was saved, bit by bit, for a rank that decodes alone."""


class ModelAdapter(abc.ABC):
    """One model family over one checkpoint. Subclasses declare; nothing here knows of ranks or strategies."""

    family: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]  # `_class_name` in model_index.json
    prompt_frame: ClassVar[PromptFrame] = PromptFrame()
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    # -- what the checkpoint must hold --------------------------------------------------------------------------

    @abc.abstractmethod
    def config_needs(self) -> Mapping[str, ConfigNeeds]:
        """What is read from the config of each component."""

    def config_problems(self) -> list[str]:
        """What is missing or wrong in the configs, a sentence each, so that nothing else here meets it."""
        return [*config_problems(self.checkpoint, self.config_needs()), *self._scheduler_problems()]

    def _scheduler_problems(self) -> list[str]:
        try:
            config = self.checkpoint.config("scheduler")
        except CheckpointError as error:
            return [str(error)]
        problem = scheduler_problem(self.checkpoint.component_class("scheduler"), config)
        return [f"{self.checkpoint.name}: {problem}"] if problem else []

    # -- what a request may look like ---------------------------------------------------------------------------

    @property
    def defaults(self) -> RequestDefaults:
        """What the family publishes, overridden by `pipedit.json` in the model folder where there is one."""
        return dataclasses.replace(self.published_defaults, **self.checkpoint.own_defaults())

    @property
    @abc.abstractmethod
    def published_defaults(self) -> RequestDefaults: ...

    def complete(self, request: VideoRequest) -> VideoRequest:
        """The request with every open field filled from the defaults, and numbers of other libraries (numpy) as plain
        ones. The seed stays as it is."""
        plain = {field.name: _plain(getattr(request, field.name)) for field in dataclasses.fields(request)}
        return dataclasses.replace(request, **plain).complete(self.defaults)

    @property
    @abc.abstractmethod
    def size_rules(self) -> SizeRules: ...

    def extra_problems(self, request: VideoRequest) -> list[str]:
        """Problems that only this model has (a setting that it lacks, ...). The general ones are checked elsewhere."""
        return []

    def clean_prompt(self, prompt: str) -> str:
        """The prompt as the text stage tokenizes it."""
        return prompt

    @abc.abstractmethod
    def weighted_components(self) -> Sequence[str]:
        """Components that hold weights, in the order in which a request uses them."""

    @abc.abstractmethod
    def default_precision(self, device_type: str) -> Precision: ...

    # -- how the work falls apart -------------------------------------------------------------------------------

    @abc.abstractmethod
    def latent_shape(self, request: VideoRequest) -> tuple[int, int, int, int, int]:
        """[1, C, F, H, W] of the request's latents."""

    @abc.abstractmethod
    def token_layout(self, request: VideoRequest) -> TokenLayout: ...

    @abc.abstractmethod
    def attention_sites(self) -> Sequence[AttentionSite]: ...

    @property
    def heads(self) -> int:
        """Attention heads that ranks can deal out among themselves: the same at every site."""
        return self.attention_sites()[0].heads

    def attention_forwards(
        self, request: VideoRequest, precision: Precision, text_tokens: Sequence[int]
    ) -> tuple[AttentionForward, ...]:
        """The forward passes of one step of the completed request, in order. `text_tokens`: for each of them, what
        `TextStage.joint_tokens` says."""
        sites = self.attention_sites()
        assert len({(site.heads, site.head_dim) for site in sites}) == 1, "all sites have the same shape"
        return tuple(
            AttentionForward(
                sites=len(sites),
                batch=1,
                heads=sites[0].heads,
                head_dim=sites[0].head_dim,
                latent_tokens=self.token_layout(request).latent_tokens,
                text_tokens=tokens,
                dtype=precision.transformer,
            )
            for tokens in text_tokens
        )

    @abc.abstractmethod
    def layer_split(self) -> LayerSplit: ...

    @abc.abstractmethod
    def uses_guidance(self, request: VideoRequest) -> bool:
        """Whether every step of the completed request takes two forwards, with and against the prompt
        (classifier-free guidance)."""

    @abc.abstractmethod
    def num_ready_chunks(self, latent_frames: int, *, is_complete: bool, decoders: int = 1) -> int:
        """How many chunks, from the first one on, can be decoded of a video of which so many latent frames have come;
        `is_complete`: no more will. `decoders` ranks share the work of each chunk."""

    def num_decode_chunks(self, request: VideoRequest, decoders: int = 1) -> int:
        """How many chunks the frames come in, where `decoders` ranks share the work of each."""
        return self.num_ready_chunks(self.latent_shape(request)[2], is_complete=True, decoders=decoders)

    @abc.abstractmethod
    def cost(
        self, request: VideoRequest, precision: Precision, *, tiling: bool = False, decoders: int = 1
    ) -> RequestCost:
        """From the config alone. `tiling`: the VAE decodes in spatial tiles. `decoders` ranks share the decode: that
        lowers the VAE's working bytes, which are those of the first of them; operations are those of all together."""

    # -- the stages ---------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def load_text_stage(self, device: str, precision: Precision) -> TextStage: ...

    @abc.abstractmethod
    def load_denoise_stage(self, device: str, precision: Precision, layers: range | None = None) -> DenoiseStage: ...

    @abc.abstractmethod
    def load_block_stage(self, device: str, precision: Precision, layers: range) -> BlockStage:
        """Reads these layers' weights only, the front's with the first and the back's with the last one. Raises
        InvalidRequestError for a model whose tokens span several latent frames."""

    @abc.abstractmethod
    def load_decode_stage(self, device: str, precision: Precision, *, tiling: bool = False) -> DecodeStage: ...


def _plain(value: Any) -> Any:
    if type(value) in (bool, int, float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value
