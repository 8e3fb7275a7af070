"""DualParal by its rules, in plain words and without haste: what the block denoiser must equal.

The transformer is the diffusers module, run whole, whose self-attention is replaced by one softmax over explicit keys:
the window's own and those of its neighbours, normed and rotated afresh at explicit places. Blocks are a list, what they
have left is a dictionary, and iteration follows iteration (sections 3 to 6 of the paper's algorithm; with a prefix
cache, keys of the predecessor take the place of its latents). Nothing of pipedit is used but the request.

Shape legend: C latent channels, F frames of a window, H W latent size, S latent tokens of it, T text tokens, N heads,
D head width.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from pipedit.core.request import VideoRequest

# Keys before norm and rotation, values, [1, S, N * D] each, and the attention module that made them.
Raw = tuple[torch.Tensor, torch.Tensor, Any]
Features = list[Raw]  # by layer


class Mistake(enum.Enum):
    """A rule that is broken, so that a test can tell whether it would be noticed."""

    LATE_PREFIX = "the predecessor's keys stand one frame too late"
    NO_PREFIX = "the predecessor is not seen"
    STALE_PREFIX = "the predecessor is seen as it was one step before"
    LATE_SUCCESSOR = "the successor's keys stand one frame too late"
    NO_SUCCESSOR = "the successor is not seen"
    STALE_SUCCESSOR = "the successor is seen as it was one step before"


@dataclasses.dataclass(kw_only=True)
class Sight:
    """What every self-attention of one forward pass sees: neighbours' features by layer, and where they stand, in
    frames counted from the window's beginning; and what it has left so far, by layer. Sizes are those of a frame."""

    rows: int = 0
    columns: int = 0
    neighbours: list[tuple[Features, int]] = dataclasses.field(default_factory=list)
    left: Features = dataclasses.field(default_factory=list)
    norm_of_reader: bool = True

    @property
    def per_frame(self) -> int:
        return self.rows * self.columns

    def norm(self, reader: Any, maker: Any) -> Any:
        """Of keys that `reader` reads."""
        return (reader if self.norm_of_reader else maker).norm_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """How the channels of a head are dealt out to frame, row and column."""

    channels: tuple[int, int, int]
    theta: float

    def __call__(self, heads: torch.Tensor, sight: Sight, first: int) -> torch.Tensor:
        """[1, S, N, D] whose frames are `first`, `first` + 1, ...; float64."""
        frames = torch.arange(first, first + heads.shape[1] // sight.per_frame)
        places = torch.cartesian_prod(frames, torch.arange(sight.rows), torch.arange(sight.columns)).double()
        angles = torch.cat(
            [
                places[:, axis, None] * self.theta ** (-torch.arange(0, channels, 2).double() / channels)
                for axis, channels in enumerate(self.channels)
            ],
            dim=1,
        )[None, :, None]
        even, odd = heads.double().unflatten(-1, (-1, 2)).unbind(-1)
        turned = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
        return torch.stack(turned, dim=-1).flatten(-2)


def softmax_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[1, Q, N, D], [1, K, N, D] twice -> [1, Q, N * D] float32; the sums in float64."""
    scores = torch.einsum("bqnd,bknd->bnqk", query.double(), keys.double()) / query.shape[-1] ** 0.5
    return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), values.double()).flatten(2).float()


class WanEyes:
    """Wan's self-attention. The norms of query and key span all heads."""

    def __init__(self, sight: Sight, rotary: Rotary) -> None:
        self._sight, self._rotary = sight, rotary

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Any = None,
    ) -> torch.Tensor:
        assert encoder_hidden_states is None and attention_mask is None
        sight, layer = self._sight, len(self._sight.left)

        def heads(rows: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(2, (attn.heads, -1))  # type: ignore[no-any-return]

        own = attn.to_k(hidden_states), attn.to_v(hidden_states), attn
        sight.left.append(own)
        query = self._rotary(heads(attn.norm_q(attn.to_q(hidden_states))), sight, 0)
        everybody = [(own, 0), *((features[layer], place) for features, place in sight.neighbours)]
        keys = [self._rotary(heads(sight.norm(attn, maker)(key)), sight, place) for (key, _, maker), place in everybody]
        values = [heads(value) for (_, value, _), _ in everybody]
        out: torch.Tensor = attn.to_out[0](softmax_attention(query, torch.cat(keys, dim=1), torch.cat(values, dim=1)))
        return out


class HunyuanVideoEyes:
    """Joint attention of latents and text, which has no place. Every norm is of one head."""

    def __init__(self, sight: Sight, rotary: Rotary) -> None:
        self._sight, self._rotary = sight, rotary

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sight, layer, text = self._sight, len(self._sight.left), encoder_hidden_states

        def heads(rows: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(2, (attn.heads, -1))  # type: ignore[no-any-return]

        own = attn.to_k(hidden_states), attn.to_v(hidden_states), attn
        sight.left.append(own)
        if attn.add_q_proj is None:  # single stream: the text goes the latents' way
            added = attn.to_q(text), attn.to_k(text), attn.to_v(text)
            text_norms = attn.norm_q, attn.norm_k
        else:
            added = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
            text_norms = attn.norm_added_q, attn.norm_added_k
        query = self._rotary(attn.norm_q(heads(attn.to_q(hidden_states))), sight, 0)
        everybody = [(own, 0), *((features[layer], place) for features, place in sight.neighbours)]
        keys = [self._rotary(sight.norm(attn, maker)(heads(key)), sight, place) for (key, _, maker), place in everybody]
        values = [heads(value) for (_, value, _), _ in everybody]
        result = softmax_attention(
            torch.cat([query, text_norms[0](heads(added[0]))], dim=1),
            torch.cat([*keys, text_norms[1](heads(added[1]))], dim=1),
            torch.cat([*values, heads(added[2])], dim=1),
        )
        latents, words = result[:, : hidden_states.shape[1]], result[:, hidden_states.shape[1] :]
        if attn.to_out is not None:
            latents = attn.to_out[0](latents)
        return latents, words if attn.to_add_out is None else attn.to_add_out(words)


class Model:
    """The transformers of a folder, and what it says of their use. `sight` is that of the forward pass that runs."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.is_hunyuan, self.sight = folder, kind == "hunyuan", Sight()
        self.index = diffusers.DiffusionPipeline.load_config(folder)
        names = ["transformer", "transformer_2"][: 1 + (self.index.get("boundary_ratio") is not None)]
        self.experts = [self._hunyuan_video(name) if self.is_hunyuan else self._wan(name) for name in names]

    def _hunyuan_video(self, name: str) -> Any:
        model = diffusers.HunyuanVideoTransformer3DModel.from_pretrained(self.folder, subfolder=name)
        rotary = Rotary(channels=tuple(model.config.rope_axes_dim), theta=model.config.rope_theta)
        for layer in (*model.transformer_blocks, *model.single_transformer_blocks):
            layer.attn.set_processor(HunyuanVideoEyes(self.sight, rotary))
        return model

    def _wan(self, name: str) -> Any:
        model = diffusers.WanTransformer3DModel.from_pretrained(self.folder, subfolder=name)
        width = model.config.attention_head_dim
        side = width // 6 * 2
        rotary = Rotary(channels=(width - 2 * side, side, side), theta=10000.0)
        for layer in model.blocks:
            layer.attn1.set_processor(WanEyes(self.sight, rotary))
        return model

    def noise_scheduler(self, num_steps: int) -> Any:
        """A fresh one that knows its steps; shifted as the folder says."""
        if self.is_hunyuan:
            fresh = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder, subfolder="scheduler")
            fresh.set_timesteps(sigmas=np.linspace(1.0, 0.0, num_steps + 1)[:-1])
        else:
            fresh = diffusers.UniPCMultistepScheduler.from_pretrained(self.folder, subfolder="scheduler")
            fresh.set_timesteps(num_steps)
        return fresh


class Video:
    """A video on its way. `rerun`: the predecessor's last latents run through all layers once more; else its keys and
    values of the same noise level are taken."""

    def __init__(
        self,
        model: Model,
        request: VideoRequest,
        texts: Mapping[str, torch.Tensor],
        noise: Sequence[torch.Tensor],
        *,
        context: int,
        rerun: bool,
        norm_of_reader: bool = True,
        mistake: Mistake | None = None,
    ) -> None:
        self._model, self._request, self._texts = model, request, texts
        self._context, self._rerun, self._mistake = context, rerun, mistake
        self._norm_of_reader = norm_of_reader
        self._steps = request.num_inference_steps or 0
        self._times = model.noise_scheduler(self._steps).timesteps
        self._noise_schedulers = [model.noise_scheduler(self._steps) for _ in noise]
        self._latents = [[start] for start in noise]  # of each block: at first, after step 0, after step 1, ...
        self._left: dict[tuple[int, int, str], Features] = {}  # by block, step and text: of the block's own frames

    @torch.no_grad()
    def make(self) -> list[torch.Tensor]:
        """The clean latents of each block."""
        last = len(self._latents) - 1
        for iteration in range(last + self._steps):
            for block in range(last, -1, -1):  # from the tail, the newest, to the head
                if 0 <= iteration - block < self._steps:
                    self._take_step(block, iteration - block)
        return [history[-1] for history in self._latents]

    def _take_step(self, block: int, step: int) -> None:
        own = self._latents[block][step]
        before = self._before(block, step)
        window = torch.cat([before, own], dim=2)
        texts = [text for text in ("prompt", "negative") if text in self._texts]
        predictions = []
        for text in texts:
            seen = [*self._tail(block, step, text), *self._head(block, step, text, window.shape[2])]
            prediction = self._predict(step, text, window, seen)
            first = before.shape[2]
            self._left[block, step, text] = self._of(self._model.sight.left, slice(first, None))
            predictions.append(prediction[:, :, first:])
        noise_scheduler, guided = self._noise_schedulers[block], self._guided(step, predictions)
        after = noise_scheduler.step(guided, self._times[step], own, return_dict=False)[0]
        self._latents[block].append(after)

    # -- neighbours -------------------------------------------------------------------------------------------------

    def _before(self, block: int, step: int) -> torch.Tensor:
        """The predecessor's last latents after the same step, to run once more. Without frames: none."""
        latents = self._latents[block]
        if not self._rerun or block == 0 or self._context == 0 or self._mistake is Mistake.NO_PREFIX:
            return latents[0][:, :, :0]
        done = step if self._mistake is Mistake.STALE_PREFIX else step + 1
        return self._latents[block - 1][done][:, :, -self._context :]

    def _tail(self, block: int, step: int, text: str) -> list[tuple[Features, int]]:
        """The end of the predecessor in the same step, right before the window."""
        if self._rerun or block == 0 or self._context == 0 or self._mistake is Mistake.NO_PREFIX:
            return []
        as_of = max(0, step - 1) if self._mistake is Mistake.STALE_PREFIX else step
        features = self._of(self._left[block - 1, as_of, text], slice(-self._context, None))
        frames = features[0][0].shape[1] // self._model.sight.per_frame
        return [(features, -frames + (self._mistake is Mistake.LATE_PREFIX))]

    def _head(self, block: int, step: int, text: str, frames: int) -> list[tuple[Features, int]]:
        """The beginning of the successor, which is a step behind, right after the window of so many frames."""
        is_last = block == len(self._latents) - 1
        if is_last or step == 0 or self._context == 0 or self._mistake is Mistake.NO_SUCCESSOR:
            return []
        as_of = max(0, step - 2) if self._mistake is Mistake.STALE_SUCCESSOR else step - 1
        features = self._of(self._left[block + 1, as_of, text], slice(self._context))
        return [(features, frames + (self._mistake is Mistake.LATE_SUCCESSOR))]

    def _of(self, features: Features, frames: slice) -> Features:
        """Those of some frames."""
        per_frame = self._model.sight.per_frame

        def cut(rows: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(1, (-1, per_frame))[:, frames].flatten(1, 2)  # type: ignore[no-any-return]

        return [(cut(keys), cut(values), maker) for keys, values, maker in features]

    # -- one forward pass -------------------------------------------------------------------------------------------

    def _predict(self, step: int, text: str, window: torch.Tensor, seen: list[tuple[Features, int]]) -> torch.Tensor:
        model, request, words, time = self._model, self._request, self._texts[text], self._times[step : step + 1]
        sight = model.sight
        sight.rows, sight.columns = window.shape[3] // 2, window.shape[4] // 2
        sight.neighbours, sight.left, sight.norm_of_reader = seen, [], self._norm_of_reader
        inputs: dict[str, Any] = {"hidden_states": window, "encoder_hidden_states": words, "timestep": time}
        if model.is_hunyuan:
            inputs["encoder_attention_mask"] = torch.ones(words.shape[:2])
            inputs["pooled_projections"] = self._texts["pooled" if text == "prompt" else "negative_pooled"]
            inputs["guidance"] = torch.tensor([1000.0 * (request.guidance_scale or 0.0)])
        if model.index.get("expand_timesteps"):
            inputs["timestep"] = time.expand(1, window.shape[2] * sight.per_frame).float()
        out: torch.Tensor = model.experts[self._expert(step)](**inputs, return_dict=False)[0]
        return out

    def _expert(self, step: int) -> int:
        """The second one below the boundary."""
        return int(len(self._model.experts) == 2 and self._times[step] < 1000 * self._model.index["boundary_ratio"])

    def _guided(self, step: int, predictions: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(predictions) == 1:
            return predictions[0]
        conditional, unconditional = predictions
        request = self._request
        scale = request.true_cfg_scale if self._model.is_hunyuan else request.guidance_scale
        if self._expert(step) == 1:
            scale = request.guidance_scale_2
        assert scale is not None
        return unconditional + scale * (conditional - unconditional)
