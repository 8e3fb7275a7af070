"""The part of a pipeline's stage that all families share: windows of latents through some layers of each transformer.

Shape legend: B batch, C latent channels, F latent frames of a window, H W latent size, s latent tokens of this rank,
T text tokens, D hidden width.
"""

import abc
from collections.abc import Sequence
from typing import Any, Generic

import torch
from torch import nn

from pipedit.core.errors import InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.core.rotation import TemporalRotation
from pipedit.models.adapter import StageParallel
from pipedit.models.course import CourseT, NoisyLatents
from pipedit.models.layout import Layout
from pipedit.models.partial_transformer import PartialTransformer
from pipedit.models.sequence import attach
from pipedit.models.sequence_bindings import binding_of


class TransformerBlockStage(abc.ABC, Generic[CourseT]):
    """A `BlockStage` (see adapter.py). `parts`: the same layers of each expert."""

    def __init__(self, layout: Layout, device: str, dtype: torch.dtype, parts: Sequence[PartialTransformer]) -> None:
        self._layout, self.device, self._dtype, self._parts = layout, device, dtype, tuple(parts)
        self._parallel: StageParallel | None = None

    @abc.abstractmethod
    def begin(self, request: VideoRequest, conditioning: dict[str, torch.Tensor]) -> CourseT: ...

    @property
    def first(self) -> bool:
        return self._parts[0].first

    @property
    def last(self) -> bool:
        return self._parts[0].last

    @property
    def modules(self) -> Sequence[nn.Module]:
        return [part.transformer for part in self._parts]

    @property
    def rotation(self) -> TemporalRotation:
        return self._layout.temporal_rotation

    @property
    def hidden_dtype(self) -> torch.dtype:
        return self._dtype

    def attach(self, parallel: StageParallel) -> None:
        for transformer in self.modules:
            attach(transformer, binding_of(transformer), parallel)
        self._parallel = parallel

    def compile_layers(self) -> None:
        for part in self._parts:
            # The exchanges of attention on several ranks break graphs.
            part.transformer.compile_repeated_blocks(fullgraph=self._parallel is None)

    def num_branches(self, state: CourseT) -> int:
        return state.num_branches

    def tokens_per_frame(self, state: CourseT) -> int:
        return self._tokens(state, 1)

    def hidden_shapes(self, state: CourseT, branch: int, frames: int) -> tuple[tuple[int, ...], ...]:
        """Latents [B, s, D], and where the text is in the same attention, that too: [B, T, D]."""
        config = self._layout.transformer_config
        width, text = config["num_attention_heads"] * config["attention_head_dim"], state.joint_tokens(branch)
        latents = (1, self._own_tokens(self._tokens(state, frames)), width)
        return (latents, (1, text, width)) if text else (latents,)

    # -- blocks, on the first stage ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def begin_block(self, state: CourseT, noise: torch.Tensor) -> NoisyLatents:
        assert self.first, "only the first stage has latents"
        return state.start(noise.to(self.device))

    def latents(self, block: NoisyLatents) -> torch.Tensor:
        return block.latents.float()

    @torch.inference_mode()
    def advance(self, state: CourseT, block: NoisyLatents, step: int, prediction: torch.Tensor) -> None:
        block.advance(prediction, state.timesteps[step])

    def save_block(self, state: CourseT, block: NoisyLatents) -> dict[str, Any]:
        return state.save(block)

    def restore_block(self, state: CourseT, saved: dict[str, Any]) -> NoisyLatents:
        assert self.first, "only the first stage has latents"
        return state.restore(saved)

    # -- forward passes ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(
        self, state: CourseT, step: int, branch: int, frames: int, given: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        part, window = self._parts[state.expert(step)], self._layout.window_shape(state.request, frames)
        if self.first:
            (latents,) = given
            assert latents.shape == window, (tuple(latents.shape), window)
            return part.run((), state.inputs(step, branch, latents.to(self._dtype)))
        shapes = tuple(tuple(hidden.shape) for hidden in given)
        assert shapes == self.hidden_shapes(state, branch, frames), shapes
        # Positions, timesteps and the number of tokens follow from the shape of latents; these take no memory.
        stand_in = torch.empty(1, dtype=self._dtype, device=self.device).expand(window)
        return part.run(given, state.inputs(step, branch, stand_in))

    @torch.inference_mode()
    def guide(self, state: CourseT, step: int, predictions: Sequence[torch.Tensor]) -> torch.Tensor:
        return state.guide(step, predictions)

    def _tokens(self, state: CourseT, frames: int) -> int:
        return self._layout.tokens(self._layout.window_shape(state.request, frames))

    def _own_tokens(self, tokens: int) -> int:
        """How many of a window's tokens this rank has."""
        if self._parallel is None:
            return tokens
        self._parallel.begin_forward(tokens)
        return self._parallel.shard(torch.empty(tokens, device="meta"), 0).shape[0]


def check_patch(layout: Layout) -> None:
    """Raises InvalidRequestError where a token spans several latent frames: blocks are cut between any two of them."""
    if layout.patch[0] != 1:
        raise InvalidRequestError(
            [
                f"{layout.checkpoint.name} makes one token of {layout.patch[0]} latent frames, so its videos cannot be "
                "made in blocks; use another strategy"
            ]
        )
