"""Operations, parameters and memory of Open-Sora-Plan's VAE decoder (WFVAE), from config values alone.

Wavelet transforms have fixed filters of 2 x 2 x 2 on each channel: they count as nothing.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from pipedit.plan.costs import Operations

CHUNK = 2  # latent frames that are decoded together, as upstream does; later ones see one frame ahead
_WAVELET_2D, _WAVELET_3D = 12, 24  # channels of a picture's and of a video's bands


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Convolution:
    """One convolution. Its output has `space` times the latents' rows and columns, and frames doubled in time where
    `doubled` (n frames become 2n - 1). `is_attention`: a projection of an attention over each frame."""

    in_channels: int
    out_channels: int
    kernel: int
    space: int = 1
    doubled: bool = False

    @property
    def parameters(self) -> int:
        return self.in_channels * self.out_channels * self.kernel + self.out_channels

    def positions(self, frames: int, rows: int, columns: int) -> int:
        return (2 * frames - 1 if self.doubled else frames) * rows * columns * self.space**2


def _residual_block(inputs: int, outputs: int, space: int, *, doubled: bool) -> Iterator[_Convolution]:
    yield _Convolution(in_channels=inputs, out_channels=outputs, kernel=27, space=space, doubled=doubled)
    yield _Convolution(in_channels=outputs, out_channels=outputs, kernel=27, space=space, doubled=doubled)
    if inputs != outputs:
        yield _Convolution(in_channels=inputs, out_channels=outputs, kernel=1, space=space, doubled=doubled)


def _connection(config: dict[str, Any], bands: int, space: int, *, doubled: bool) -> Iterator[_Convolution]:
    """What turns the energy channels into the bands of a wavelet transform."""
    energy = _energy(config)
    for _ in range(config.get("connect_res_layer_num", 1)):
        yield from _residual_block(energy, energy, space, doubled=doubled)
    yield _Convolution(in_channels=energy, out_channels=bands, kernel=9, space=space, doubled=doubled)


def _energy(config: dict[str, Any]) -> int:
    return int(config.get("decoder_energy_flow_hidden_size", 128))


def _has_attention(config: dict[str, Any]) -> bool:
    return bool(config.get("use_attention", True))


def _convolutions(config: dict[str, Any]) -> Iterator[_Convolution]:
    """Every convolution of the decoder in order, the attention's projections included."""
    c, energy, blocks = config["base_channels"], _energy(config), config.get("decoder_num_resblocks", 2)
    wide = 4 * c
    yield _Convolution(in_channels=config["latent_dim"], out_channels=wide, kernel=27)
    yield from _residual_block(wide, wide, 1, doubled=False)
    if _has_attention(config):
        yield _Convolution(in_channels=wide, out_channels=4 * wide, kernel=1)
    yield from _residual_block(wide, wide + energy, 1, doubled=False)
    yield from _connection(config, _WAVELET_3D, 1, doubled=False)
    for _ in range(blocks):
        yield from _residual_block(wide, wide, 1, doubled=False)
    yield _Convolution(in_channels=wide, out_channels=wide, kernel=27, space=2, doubled=True)
    yield from _residual_block(wide, wide + energy, 2, doubled=True)
    yield from _connection(config, _WAVELET_2D, 2, doubled=True)
    for block in range(blocks):
        yield from _residual_block(wide if block == 0 else 2 * c, 2 * c, 2, doubled=True)
    yield _Convolution(in_channels=2 * c, out_channels=2 * c, kernel=9, space=4, doubled=True)
    yield from _residual_block(2 * c, 2 * c, 4, doubled=True)
    yield from _residual_block(2 * c, c, 4, doubled=True)
    yield from _residual_block(c, c, 4, doubled=True)
    yield _Convolution(in_channels=c, out_channels=_WAVELET_3D, kernel=9, space=4, doubled=True)


def decoder_parameters(config: dict[str, Any]) -> int:
    """Parameters of the decoder, all that text-to-video loads; the wavelets' filters are none."""
    convolutions = list(_convolutions(config))
    # A norm before every 3x3x3 convolution of a residual block; `conv_in` and the upsampling have none.
    norms = sum(2 * c.in_channels for c in convolutions if c.kernel == 27)
    wide, c = 4 * config["base_channels"], config["base_channels"]
    norms += 2 * c - 2 * config["latent_dim"] - 2 * wide + (2 * wide if _has_attention(config) else 0)
    return int(sum(convolution.parameters for convolution in convolutions) + norms)


def decode_operations(config: dict[str, Any], *, frames: int, rows: int, columns: int) -> Operations:
    """Decoding a whole video of `frames` x `rows` x `columns` latents. Each frame attends to itself."""
    convolution = sum(
        2 * c.in_channels * c.out_channels * c.kernel * c.positions(frames, rows, columns)
        for c in _convolutions(config)
    )
    width = 4 * config["base_channels"] if _has_attention(config) else 0
    return Operations(convolution=convolution, attention=4 * frames * (rows * columns) ** 2 * width)


def chunk_operations(config: dict[str, Any], *, frames: range, total: int, rows: int, columns: int) -> Operations:
    """Decoding latent frames `frames` of `total` as one chunk with kept states. A chunk that is not the last one sees
    one more frame, whose cost comes on top."""
    seen = len(frames) + (frames.stop < total)
    whole = decode_operations(config, frames=seen + 1, rows=rows, columns=columns)
    first = decode_operations(config, frames=1, rows=rows, columns=columns)
    if frames.start == 0:
        return decode_operations(config, frames=seen, rows=rows, columns=columns)
    # Frames after the first one give two frames each where time is doubled.
    return Operations(convolution=whole.convolution - first.convolution, attention=whole.attention - first.attention)


def decode_working_bytes(config: dict[str, Any], *, frames: int, rows: int, columns: int, element: int) -> int:
    """Peak of decoding `frames` latent frames at once: in the last residual blocks, at a quarter of the video's rows
    and columns, where input, norm, and output are alive together."""
    c = config["base_channels"]
    positions = (2 * frames - 1) * rows * columns * 4**2
    video = 3 * (4 * frames - 3) * rows * columns * 8**2
    return int(positions * 4 * 2 * c * element + 2 * video * element)
