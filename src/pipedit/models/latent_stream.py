"""The latents of one video on their way into a decoder: they come in pieces, and are let go once they are decoded.

Knows no model. Keeps single frames, so that nothing that is decoded can depend on how the latents were cut.
"""

from typing import Any

import torch


class LatentStream:
    """`num_frames` latent frames have come so far; `is_complete`: no more will. How long the video gets, nobody has to
    know before."""

    def __init__(self) -> None:
        self.num_frames = 0
        self.is_complete = False
        self._held: dict[int, torch.Tensor] = {}  # by number of the latent frame, oldest first
        self._next_chunk = 0

    def save(self) -> dict[str, Any]:
        """As a tree (see adapter.BlockStage)."""
        return {
            "num_frames": self.num_frames,
            "is_complete": self.is_complete,
            "next_chunk": self._next_chunk,
            "held": list(self._held.values()),
        }

    @classmethod
    def restore(cls, saved: dict[str, Any]) -> "LatentStream":
        stream, held = cls(), saved["held"]
        stream.num_frames, stream.is_complete = saved["num_frames"], saved["is_complete"]
        stream._next_chunk = saved["next_chunk"]
        stream._held = dict(zip(range(stream.num_frames - len(held), stream.num_frames), held, strict=True))
        return stream

    @property
    def held(self) -> range:
        """The latent frames that are kept."""
        return range(self.num_frames - len(self._held), self.num_frames)

    def extend(self, latents: torch.Tensor) -> None:
        """Takes the next frames, [1, C, f, H, W], one at least. Keeps copies, so that the piece is freed."""
        assert not self.is_complete, "latents came after the last ones"
        assert latents.ndim == 5 and latents.shape[2] > 0, latents.shape
        for frame in latents.split(1, dim=2):
            self._held[self.num_frames] = frame.clone(memory_format=torch.contiguous_format)
            self.num_frames += 1

    def finish(self) -> None:
        assert self.num_frames > 0, "a video has one latent frame at least"
        self.is_complete = True

    def begin_chunk(self, index: int, num_ready: int) -> None:
        """Asserts that chunk `index` is the next one, and one of the first `num_ready`, which can be decoded by now."""
        assert index == self._next_chunk, f"chunk {index} is asked for, and chunk {self._next_chunk} comes next"
        awaited = "" if self.is_complete else ", and more will come"
        assert index < num_ready, f"chunk {index} is not ready: {self.num_frames} latent frames have come{awaited}"
        self._next_chunk += 1

    def window(self, frames: range) -> torch.Tensor:
        """These latent frames, [1, C, len(frames), H, W], contiguous."""
        assert frames and frames[0] in self.held and frames[-1] in self.held, (frames, self.held)
        return torch.cat([self._held[number] for number in frames], dim=2)

    def release(self, before: int) -> None:
        """Nobody asks for frames before this one any more."""
        for number in range(self.held.start, min(before, self.num_frames)):
            del self._held[number]
