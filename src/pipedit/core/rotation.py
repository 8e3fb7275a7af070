"""How keys of attention turn with time: what a model declares, and what a strategy computes with."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemporalRotation:
    """Rotary positions in time. Of each head the first `channels` turn with the latent frame: in frame t, the pair of
    channels (2i, 2i + 1) by the angle t * theta ** (-2i / channels). The others turn with the place in the picture."""

    channels: int
    theta: float

    def angles(self, frames: int) -> tuple[float, ...]:
        """Of each pair, in radians, over so many latent frames (negative: back)."""
        assert self.channels % 2 == 0, self
        return tuple(frames * self.theta ** (-pair / self.channels) for pair in range(0, self.channels, 2))
