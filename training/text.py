"""Tokenizer and text encoder of the tiny model. The vocabulary is written by hand: a trained one splits rare words."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from training import world

TEXT_DIM = 96


def build_tokenizer(folder: Path | None = None) -> PreTrainedTokenizerFast:
    """Unigram tokenizer: whole words of the world first, single letters for everything else."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -30.0)]
    pieces += [("▁" + word, -3.0) for word in world.words()]
    pieces += [(c, -10.0) for c in "▁" + string.ascii_lowercase + string.digits + ".,:;!?'\"-()"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    punctuation = pre_tokenizers.Punctuation()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([punctuation, pre_tokenizers.Metaspace(prepend_scheme="always")])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    if folder is not None:
        fast.save_pretrained(folder)
    return fast


def build_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=24,
        num_heads=4,
        num_layers=2,
        d_ff=192,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config)


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both [B, L]; the mask's last column is always 0, so that every caption has padding."""
    batch = tokenizer(captions, padding=True, return_tensors="pt")
    ids, mask = batch.input_ids, batch.attention_mask
    one = torch.zeros(len(captions), 1, dtype=ids.dtype)
    return torch.cat([ids, one], 1), torch.cat([mask, one], 1)
