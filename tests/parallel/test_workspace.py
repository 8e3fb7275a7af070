"""Buffers that stay."""

import torch

from pipedit.parallel.workspace import Workspace


def test_the_same_memory_for_the_same_name_until_it_has_to_grow() -> None:
    workspace = Workspace(torch.device("cpu"))
    large = workspace.take("a", (4, 3), torch.float32)
    small = workspace.take("a", (2, 5), torch.float32)
    assert small.shape == (2, 5) and small.data_ptr() == large.data_ptr()
    workspace.take("b", (4,), torch.float32)
    workspace.take("a", (4,), torch.float64)
    assert workspace.allocated_bytes == 12 * 4 + 4 * 4 + 4 * 8
    workspace.take("a", (20,), torch.float32)
    assert workspace.allocated_bytes == 20 * 4 + 4 * 4 + 4 * 8
    workspace.clear()
    assert workspace.allocated_bytes == 0


def test_buffers_serve_with_and_without_inference_mode() -> None:
    """Who makes a video in inference mode and the next one outside shares the buffers of both."""
    workspace = Workspace(torch.device("cpu"))
    with torch.inference_mode():
        workspace.take("a", (3,), torch.float32).fill_(1.0)
    with torch.no_grad():
        assert workspace.take("a", (3,), torch.float32).fill_(2.0).tolist() == [2.0] * 3
    with torch.inference_mode():
        assert workspace.take("a", (3,), torch.float32).fill_(3.0).tolist() == [3.0] * 3
