"""Windows of a video that know nothing of each other, decoded by a group of ranks of which each gets all of them."""

from collections.abc import Callable, Sequence

import torch

from pipedit.models.rows import VideoGroup


def decode_windows(
    windows: Sequence[torch.Tensor], decode: Callable[[torch.Tensor], torch.Tensor], group: VideoGroup
) -> list[torch.Tensor]:
    """What `decode` makes of each of `windows`, in their order, on every rank; all ranks call it with the same ones.

    In each round a rank decodes one window. Large ones come first, so that those of a round are about equal.
    """
    order = sorted(range(len(windows)), key=lambda number: -windows[number].numel())
    decoded: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), group.size):
        numbers = order[start : start + group.size]
        own = decode(windows[numbers[group.index]]) if group.index < len(numbers) else None
        for number, video in zip(numbers, group.gather_all(own), strict=False):
            assert video is not None
            decoded[number] = video
    return [decoded[number] for number in range(len(windows))]
