"""Wan's text stage: UMT5, cut to the real length, then padded with zeros that attention does not mask."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, UMT5EncoderModel

from pipedit.core.request import VideoRequest
from pipedit.models.adapter import Precision
from pipedit.models.checkpoint import Checkpoint
from pipedit.models.text_encoders import load_text_encoder
from pipedit.models.wan.prompt import clean


class WanTextStage:
    """Prompts -> `prompt` and, with guidance, `negative`: [1, T, D] with T = max_sequence_length."""

    def __init__(self, tokenizer: Any, encoder: UMT5EncoderModel) -> None:
        self._tokenizer, self._encoder = tokenizer, encoder

    @classmethod
    def load(cls, checkpoint: Checkpoint, device: str, precision: Precision) -> "WanTextStage":
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.tokenizer_folder("tokenizer"), local_files_only=True)
        return cls(tokenizer, load_text_encoder(UMT5EncoderModel, checkpoint, "text_encoder", device, precision))

    @property
    def modules(self) -> Sequence[nn.Module]:
        return (self._encoder,)

    @torch.inference_mode()
    def encode(self, request: VideoRequest) -> dict[str, torch.Tensor]:
        assert request.guidance_scale is not None and request.max_sequence_length is not None
        conditioning = {"prompt": self._embed(request.prompt, request.max_sequence_length)}
        if request.guidance_scale > 1.0:
            conditioning["negative"] = self._embed(request.negative_prompt or "", request.max_sequence_length)
        return conditioning

    def joint_tokens(self, conditioning: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        return (0,) * len(conditioning)

    def _embed(self, prompt: str, length: int) -> torch.Tensor:
        tokens = self._tokenizer(
            [clean(prompt)], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        device = self._encoder.device
        ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
        hidden = self._encoder(ids, mask).last_hidden_state
        # Padding must become exact zeros: the transformer attends to it.
        real = int(mask.gt(0).sum())
        return torch.cat([hidden[:, :real], hidden.new_zeros(1, length - real, hidden.shape[2])], dim=1)
