"""Text encoders from transformers, loaded by its own streaming loader."""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from pipedit.core.errors import CheckpointError
from pipedit.models.adapter import Precision
from pipedit.models.checkpoint import Checkpoint

EncoderT = TypeVar("EncoderT", bound=PreTrainedModel)


def load_text_encoder(
    cls: type[EncoderT],
    checkpoint: Checkpoint,
    component: str,
    device: str,
    precision: Precision,
    **config_changes: Any,
) -> EncoderT:
    """The component in eval mode on `device`. transformers reads safetensors tensor by tensor onto the device and
    knows the renames between its versions, so its loader is used rather than ours. Pickled weights are refused, and
    so are missing ones, which transformers would fill with random numbers. `config_changes` replace values of the
    component's config."""
    checkpoint.whole_weights(component)
    with _quiet():
        encoder, report = cls.from_pretrained(
            checkpoint.path(component),
            dtype=getattr(torch, precision.text_encoder),
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **config_changes,
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{component}: {len(missing)} tensors are missing, {missing[0]} among them")
    frozen: EncoderT = encoder.eval().requires_grad_(False)
    return frozen


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers: stderr is ours to write."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
