"""HunyuanVideo's text stage: a language model's hidden states for every token, CLIP's pooled embedding for the whole.

The trimming rule: diffusers pads the text to `max_sequence_length` and masks the padding everywhere. With one prompt
at a time that equals no padding at all (the language model and CLIP are causal, the transformer's mask hides padding
keys, its refiner averages with the mask), so nothing is ever padded here, and every text token is a valid one.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, LlamaModel, PreTrainedTokenizerFast

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import Precision
from pipedit.models.checkpoint import Checkpoint
from pipedit.models.hunyuan_video.prompt import CLIP_TOKENS, PROMPT_FRAME, SKIPPED_LAYERS
from pipedit.models.text_encoders import load_text_encoder

_log = logging.getLogger(__name__)


class _ShortLlama(LlamaModel):  # type: ignore[misc]
    """The language model without its final norm; loaded without its last layers, whose weights are then not wanted."""

    _keys_to_ignore_on_load_unexpected = (r"(^|\.)layers\.\d+\.", r"(^|\.)norm\.weight$")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm = nn.Identity()


class HunyuanVideoTextStage:
    """Prompts -> `prompt` [1, T, D] and `pooled` [1, P]; with true guidance also `negative` and `negative_pooled`.

    T is the number of tokens of that prompt, at most `max_sequence_length`.
    """

    def __init__(self, tokenizer: Any, llama: LlamaModel, tokenizer_2: Any, clip: CLIPTextModel) -> None:
        self.tokenizer, self.llama, self.tokenizer_2, self.clip = tokenizer, llama, tokenizer_2, clip

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: str, precision: Precision) -> "HunyuanVideoTextStage":
        layers = checkpoint.config("text_encoder")["num_hidden_layers"] - SKIPPED_LAYERS
        return cls(
            # Not the class that model_index.json names: under transformers 5 that one rebuilds the tokenizer without
            # its byte-level rules and gives other tokens, silently.
            PreTrainedTokenizerFast.from_pretrained(checkpoint.tokenizer_folder("tokenizer"), local_files_only=True),
            load_text_encoder(_ShortLlama, checkpoint, "text_encoder", device, precision, num_hidden_layers=layers),
            CLIPTokenizer.from_pretrained(checkpoint.tokenizer_folder("tokenizer_2"), local_files_only=True),
            load_text_encoder(CLIPTextModel, checkpoint, "text_encoder_2", device, precision),
        )

    @property
    def modules(self) -> Sequence[nn.Module]:
        return (self.llama, self.clip)

    @torch.inference_mode()
    def encode(self, request: VideoRequest) -> dict[str, torch.Tensor]:
        assert request.true_cfg_scale is not None and request.max_sequence_length is not None
        length = request.max_sequence_length
        conditioning = {"prompt": self._tokens(request.prompt, length), "pooled": self._pooled(request.prompt)}
        if request.true_cfg_scale > 1.0 and request.negative_prompt is not None:
            conditioning["negative"] = self._tokens(request.negative_prompt, length)
            conditioning["negative_pooled"] = self._pooled(request.negative_prompt)
        return conditioning

    def joint_tokens(self, conditioning: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        return tuple(conditioning[name].shape[1] for name in ("prompt", "negative") if name in conditioning)

    def _tokens(self, prompt: str, length: int) -> torch.Tensor:
        crop = PROMPT_FRAME.cropped_tokens
        text = PROMPT_FRAME.before + prompt + PROMPT_FRAME.after
        tokens = self.tokenizer(text, truncation=True, max_length=crop + length, return_tensors="pt")
        output = self.llama(input_ids=tokens.input_ids.to(self.llama.device), use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden[:, crop:]

    def _pooled(self, prompt: str) -> torch.Tensor:
        tokens = self.tokenizer_2(prompt, return_offsets_mapping=True, verbose=False)
        ids = tokens.input_ids
        if len(ids) > CLIP_TOKENS:
            unseen = prompt[tokens.offset_mapping[CLIP_TOKENS - 1][0] :]
            _log.warning(
                "CLIP reads %d tokens, only the language model sees the rest of the prompt: %r", CLIP_TOKENS, unseen
            )
            ids = [*ids[: CLIP_TOKENS - 1], ids[-1]]  # the end token stays: its state is the pooled embedding
        pooled: torch.Tensor = self.clip(input_ids=torch.tensor([ids], device=self.clip.device)).pooler_output
        return pooled
