"""How HunyuanVideo's transformer takes part in sequence parallelism: latents are spread, the text is on every rank and
takes part in each attention.

Shape legend: B batch, S latent tokens of all ranks, s those of this rank, T text tokens, N heads, n some of them,
D head width, C hidden width = N * D.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoTransformer3DModel,
)

from pipedit.core.errors import InvalidRequestError
from pipedit.models.head_projections import HeadProjection, HeadRows, HeadSink, OutputProjection
from pipedit.models.partial_transformer import gives_hidden_states, own_layers, takes_hidden_states
from pipedit.models.processors import outside_graphs, replace_processors
from pipedit.models.sequence import AttentionCall, Cut, SequenceBinding, SequenceParallel, Side

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [s, D] each
Norm = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(kw_only=True)
class _TextKeys:
    """Which text tokens are keys in the forward that runs now: [B, T] bool, or None: all of them."""

    mask: torch.Tensor | None = None


class HunyuanVideoSequenceBinding(SequenceBinding):
    """Raises InvalidRequestError for a transformer that takes an image."""

    def __init__(self, transformer: HunyuanVideoTransformer3DModel) -> None:
        condition = transformer.config.image_condition_type
        if condition is not None:
            raise InvalidRequestError([f"HunyuanVideo with an image ({condition}) is not supported yet"])
        self._transformer, self._text_keys = transformer, _TextKeys()

    def latent_tokens(self, inputs: Mapping[str, Any]) -> int:
        config, (frames, rows, columns) = self._transformer.config, inputs["hidden_states"].shape[2:]
        return int((frames // config.patch_size_t) * (rows // config.patch_size) * (columns // config.patch_size))

    def prepare_inputs(self, inputs: dict[str, Any], parallel: SequenceParallel) -> dict[str, Any]:
        """Cuts padding off that no row of the batch needs: without it, or where all rows are equally long, no mask is
        left, and the fast attention kernels may run. Reads the mask: one synchronisation with the device."""
        text, mask = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
        length, self._text_keys.mask = _needed_text(mask)
        return {**inputs, "encoder_hidden_states": text[:, :length], "encoder_attention_mask": mask[:, :length]}

    def cuts(self) -> Sequence[Cut]:
        positions = Cut(module="rope", side=Side.OUTPUT, dim=0)
        if takes_hidden_states(self._transformer.x_embedder):
            return (positions,)
        return (positions, Cut(module="x_embedder", side=Side.OUTPUT, dim=1))

    @property
    def gathered(self) -> str | None:
        return None if gives_hidden_states(self._transformer.single_transformer_blocks) else "proj_out"

    def install_processors(self, parallel: SequenceParallel) -> Callable[[], None]:
        model = self._transformer
        return replace_processors(
            [layer.attn for layer in own_layers(model.transformer_blocks, model.single_transformer_blocks)],
            expected=HunyuanVideoAttnProcessor2_0,
            replacement=_Processor(parallel, self._text_keys),
        )


def _needed_text(mask: torch.Tensor) -> tuple[int, torch.Tensor | None]:
    """From a mask [B, T]: how many text tokens to keep, and which of them are keys ([B, kept] bool, None: all).

    diffusers takes the number of valid tokens of each row as a length from the start. Where the valid tokens are
    elsewhere, or a row has none, the model's refiner needs to see the mask as it is, so nothing is cut.
    """
    batch, tokens = mask.shape
    counts = mask.sum(dim=1, dtype=torch.int)
    keys = torch.arange(tokens, device=mask.device) < counts[:, None]
    starts_first = (mask == keys).all(dim=1)
    *lengths, regular = torch.cat([counts, starts_first.all()[None].to(counts.dtype)]).tolist()
    longest = max(lengths)
    if not regular or min(lengths) < 1:
        longest = tokens
    return longest, None if lengths == [longest] * batch else keys[:, :longest]


class _Processor:
    """Joint attention of latents and text with the strategy's help; called by diffusers' Attention, which passes on
    only the keyword arguments that are named here."""

    def __init__(self, parallel: SequenceParallel, text_keys: _TextKeys) -> None:
        self._parallel, self._text_keys = parallel, text_keys

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, s, C] and [B, T, C] -> the same. `attention_mask` is not read: the model made it from the lengths on
        this rank, and which text tokens are keys is known already."""
        call = (attn, hidden_states, encoder_hidden_states, image_rotary_emb, self._text_keys.mask)
        return _attend(self._parallel, *call)


@outside_graphs
def _attend(
    parallel: SequenceParallel,
    attn: Any,
    latents: torch.Tensor,
    text: torch.Tensor,
    rotation: Rotation | None,
    text_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    latent_sink, text_sink = _sinks(attn)
    for run in parallel.attend(_HunyuanVideoCall(attn, latents, text, rotation, text_mask)):
        assert run.text is not None
        latent_sink.add(run.heads, run.latents)
        text_sink.add(run.heads, run.text)
    result = latent_sink.result()
    return result if attn.to_out is None else attn.to_out[1](result), text_sink.result()


def _sinks(attn: Any) -> tuple[HeadSink, HeadSink]:
    """Where latents and text go. Single-stream layers have no projections of their own here."""
    return (
        HeadRows(attn.heads) if attn.to_out is None else OutputProjection(attn.to_out[0], attn.heads),
        HeadRows(attn.heads) if attn.to_add_out is None else OutputProjection(attn.to_add_out, attn.heads),
    )


class _HunyuanVideoCall(AttentionCall):
    """Norms are per head, so every head is projected when it is asked for. Single-stream layers project the text with
    the latents' weights."""

    def __init__(
        self,
        attn: Any,
        latents: torch.Tensor,
        text: torch.Tensor,
        rotation: Rotation | None,
        text_mask: torch.Tensor | None,
    ) -> None:
        self.heads, self.head_dim = attn.heads, attn.inner_dim // attn.heads
        self.batch, self.local_tokens, self.dtype = latents.shape[0], latents.shape[1], latents.dtype
        self.text_tokens, self.text_mask = text.shape[1], text_mask
        self._rotation = rotation
        self._norms: tuple[Norm | None, Norm | None] = (attn.norm_q, attn.norm_k)
        self._latent_rows = self._projections((attn.to_q, attn.to_k, attn.to_v), latents)
        if attn.add_q_proj is None:
            self._text_norms, text_layers = self._norms, (attn.to_q, attn.to_k, attn.to_v)
        else:
            self._text_norms = attn.norm_added_q, attn.norm_added_k
            text_layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        self._text_rows = self._projections(text_layers, text)

    def _projections(self, layers: tuple[Any, Any, Any], rows: torch.Tensor) -> list[HeadProjection]:
        """Of query, key and value."""
        return [HeadProjection(layer, rows, self.head_dim) for layer in layers]

    def value(self, heads: slice) -> torch.Tensor:
        return self._latent_rows[2](heads)

    def key(self, heads: slice) -> torch.Tensor:
        return self._rotated(_normalised(self._latent_rows[1](heads), self._norms[1]))

    def query(self, heads: slice) -> torch.Tensor:
        return self._rotated(_normalised(self._latent_rows[0](heads), self._norms[0]))

    def text(self, heads: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = (project(heads) for project in self._text_rows)
        return _normalised(query, self._text_norms[0]), _normalised(key, self._text_norms[1]), value

    def _rotated(self, rows: torch.Tensor) -> torch.Tensor:
        if self._rotation is None:
            return rows
        rotated: torch.Tensor = apply_rotary_emb(rows, self._rotation, sequence_dim=1)
        return rotated


def _normalised(rows: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    return rows if norm is None else norm(rows)
