"""Fixtures of tests that decode."""

import pytest
import torch


@pytest.fixture
def values_not_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames as the VAE's own values in float32, before they are rounded to 256 levels."""

    def values(video: torch.Tensor) -> torch.Tensor:
        return video[0].permute(1, 2, 3, 0).contiguous()

    for family in ("wan", "hunyuan_video"):
        monkeypatch.setattr(f"pipedit.models.{family}.decode.to_levels", values)
        monkeypatch.setattr(f"pipedit.models.{family}.decode.to_frames", lambda video: values(video).numpy())


@pytest.fixture
def slabs_of_any_height(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are shared down to a row for each rank, though that would not pay."""
    monkeypatch.setattr("pipedit.models.wan.slabs.LEAST_ROWS", 1)
