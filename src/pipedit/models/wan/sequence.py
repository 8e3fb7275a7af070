"""How Wan's transformer takes part in sequence parallelism. Only self-attention is spread: in cross-attention every
rank has the whole text, and its own queries are all it needs.

Shape legend: B batch, S latent tokens of all ranks, s those of this rank, N heads, n some of them, D head width,
C hidden width = N * D.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformer3DModel

from pipedit.core.errors import InvalidRequestError
from pipedit.models.head_projections import HeadProjection, OutputProjection
from pipedit.models.partial_transformer import gives_hidden_states, own_layers, takes_hidden_states
from pipedit.models.processors import outside_graphs, replace_processors
from pipedit.models.sequence import AttentionCall, Cut, SequenceBinding, SequenceParallel, Side

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [1, s, 1, D] each, every angle twice


class WanSequenceBinding(SequenceBinding):
    """Raises InvalidRequestError for a transformer that takes an image: its parts were never run on several ranks."""

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        config = transformer.config
        if config.image_dim is not None or config.added_kv_proj_dim is not None:
            raise InvalidRequestError(["Wan with an image (image to video) is not supported yet"])
        self._transformer = transformer

    def latent_tokens(self, inputs: Mapping[str, Any]) -> int:
        sizes = inputs["hidden_states"].shape[2:]
        return math.prod(size // patch for size, patch in zip(sizes, self._transformer.config.patch_size, strict=True))

    def prepare_inputs(self, inputs: dict[str, Any], parallel: SequenceParallel) -> dict[str, Any]:
        """TI2V gives every token a timestep of its own, [B, S]; they go with the tokens."""
        timestep = inputs["timestep"]
        return inputs if timestep.ndim < 2 else {**inputs, "timestep": parallel.shard(timestep, 1)}

    def cuts(self) -> Sequence[Cut]:
        positions = Cut(module="rope", side=Side.OUTPUT, dim=1)
        if takes_hidden_states(self._transformer.patch_embedding):
            return (positions,)
        return (positions, Cut(module="blocks.0", side=Side.INPUT, dim=1, index=0))

    @property
    def gathered(self) -> str | None:
        return None if gives_hidden_states(self._transformer.blocks) else "proj_out"

    def install_processors(self, parallel: SequenceParallel) -> Callable[[], None]:
        attentions = [block.attn1 for block in own_layers(self._transformer.blocks)]
        return replace_processors(attentions, expected=WanAttnProcessor, replacement=_Processor(parallel))


class _Processor:
    """Self-attention with the strategy's help; called by WanAttention."""

    def __init__(self, parallel: SequenceParallel) -> None:
        self._parallel = parallel

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Rotation | None = None,
    ) -> torch.Tensor:
        """[B, s, C] -> [B, s, C]."""
        assert encoder_hidden_states is None, "put on a cross-attention"
        if attention_mask is not None:
            raise InvalidRequestError(["a mask in Wan's self-attention is not supported on several ranks"])
        return _attend(self._parallel, attn, hidden_states, rotary_emb)


@outside_graphs
def _attend(
    parallel: SequenceParallel, attn: Any, hidden_states: torch.Tensor, rotation: Rotation | None
) -> torch.Tensor:
    projection = OutputProjection(attn.to_out[0], attn.heads)
    for run in parallel.attend(_WanCall(attn, hidden_states, rotation)):
        projection.add(run.heads, run.latents)
    output: torch.Tensor = attn.to_out[1](projection.result())
    return output


class _WanCall(AttentionCall):
    """The norms of query and key span all heads, so each is computed whole at the first question, and kept."""

    def __init__(self, attn: Any, rows: torch.Tensor, rotation: Rotation | None) -> None:
        self.heads, self.head_dim = attn.heads, attn.inner_dim // attn.heads
        self.batch, self.local_tokens, self.dtype = rows.shape[0], rows.shape[1], rows.dtype
        self._norms, self._rotation = (attn.norm_q, attn.norm_k), rotation
        layers = [attn.to_qkv] * 3 if attn.fused_projections else [attn.to_q, attn.to_k, attn.to_v]
        firsts = [part * self.heads if attn.fused_projections else 0 for part in range(3)]
        self._query_rows, self._key_rows, self._value_rows = (
            HeadProjection(layer, rows, self.head_dim, first_head=first)
            for layer, first in zip(layers, firsts, strict=True)
        )
        self._query: torch.Tensor | None = None
        self._key: torch.Tensor | None = None

    def value(self, heads: slice) -> torch.Tensor:
        return self._value_rows(heads)

    def key(self, heads: slice) -> torch.Tensor:
        if self._key is None:
            self._key = self._whole(self._key_rows, self._norms[1])
        return self._key[:, :, heads]

    def query(self, heads: slice) -> torch.Tensor:
        if self._query is None:
            self._query = self._whole(self._query_rows, self._norms[0])
        return self._query[:, :, heads]

    def _whole(self, project: HeadProjection, norm: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        rows = norm(project(slice(0, self.heads)).flatten(2)).unflatten(2, (self.heads, self.head_dim))
        return rows if self._rotation is None else _rotate(rows, *self._rotation)


def _rotate(rows: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turns each pair of neighbours in [B, s, N, D] by the angle of its token and pair."""
    cosine, sine = cosines[..., ::2], sines[..., 1::2]
    even, odd = rows[..., ::2], rows[..., 1::2]
    rotated = torch.empty_like(rows)
    rotated[..., ::2] = even * cosine - odd * sine
    rotated[..., 1::2] = even * sine + odd * cosine
    return rotated
