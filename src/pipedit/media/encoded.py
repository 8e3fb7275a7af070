"""MP4, GIF and lossless video by PyAV, frame by frame. Memory does not grow with the length of the clip."""

import contextlib
import os
from fractions import Fraction
from pathlib import Path

import av
import av.container
import av.filter
import av.video.format
import av.video.stream
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from pipedit.core.staging import Staging
from pipedit.media.frame_writer import ClipFormat, Frames, FrameWriter
from pipedit.media.metadata import VideoMetadata

_BT709 = 1  # the code of ITU-R BT.709 for primaries, transfer and matrix alike (ISO/IEC 23091-2)
# Every thread and every frame of look-ahead holds frames in memory, and the default number of threads grows with the
# machine, so that the same clip would become another file elsewhere.
_X264 = {"crf": "17", "preset": "medium", "rc-lookahead": "20", "threads": "4"}
_FFV1 = {"level": "3", "slicecrc": "1"}
_GIF_TRAILER = b"\x3b"
MIN_GIF_FPS = 0.002  # at most 65535 hundredths of a second for a frame
MIN_MP4_FPS, MAX_MP4_FPS = 0.001, 100_000  # the container counts in 32 bits
MAX_GIF_FPS = 50  # GIF counts hundredths of a second, and browsers slow down below two of them


def mp4_problems(clip_width: int | None, clip_height: int | None, fps: float | None) -> list[str]:
    """H.264 with 4:2:0 chroma has one colour sample for 2 x 2 pixels, so both sizes must be even."""
    problems, sizes = [], f"{clip_width} x {clip_height}"
    if any(size is not None and size % 2 for size in (clip_width, clip_height)):
        problems.append(f"MP4 needs an even width and height, not {sizes}; use even sizes, .gif, .png or .npy")
    if fps is not None and not MIN_MP4_FPS <= fps <= MAX_MP4_FPS:
        allowed = f"{MIN_MP4_FPS} to {MAX_MP4_FPS} frames per second"
        problems.append(f"MP4 can show {allowed}, {fps:g} were asked for; use a rate between, .png or .npy")
    return problems


def gif_problems(fps: float | None) -> list[str]:
    if fps is None or MIN_GIF_FPS <= fps <= MAX_GIF_FPS:
        return []
    if fps < MIN_GIF_FPS:
        return [f"GIF cannot show less than {MIN_GIF_FPS} frames per second, {fps:g} were asked for; use more or .npy"]
    return [f"GIF cannot show more than {MAX_GIF_FPS} frames per second, {fps:g} were asked for; use fewer or .mp4"]


class _EncodedWriter(FrameWriter):
    """What MP4 and GIF share: one container with one video stream."""

    _container: av.container.OutputContainer | None = None
    _stream: av.video.stream.VideoStream

    def __init__(
        self, target: str, clip: ClipFormat, metadata: VideoMetadata | None, *, replace: bool, series: str | None
    ) -> None:
        super().__init__(target, clip, metadata, replace=replace, series=series)
        self._name = Path(target).name
        self._rate = Fraction(clip.fps).limit_denominator(10_000)

    def _timed(self, picture: av.VideoFrame) -> av.VideoFrame:
        picture.pts, picture.time_base = self.num_written, 1 / self._rate
        return picture

    def _encode(self, picture: av.VideoFrame | None) -> None:
        """None flushes the encoder."""
        assert self._container is not None
        for packet in self._stream.encode(picture):
            self._container.mux(packet)

    def _close_container(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def _drop(self) -> None:
        with contextlib.suppress(av.FFmpegError):  # it is thrown away; the first error is the one to show
            self._close_container()


class Mp4Writer(_EncodedWriter):
    """H.264, yuv420p, BT.709, index in front so that it plays while it loads. Metadata in the tags."""

    def _begin(self, staging: Staging) -> None:
        path = staging.path(self._name)
        self._container = av.open(_plain(path), "w", format="mp4", options={"movflags": "+faststart"})
        if self._metadata is not None:
            self._container.metadata.update(comment=self._metadata.to_json(), title=self._metadata.title)
        stream = self._container.add_stream("libx264", rate=self._rate, options=_X264)
        stream.width, stream.height, stream.pix_fmt = self._clip.width, self._clip.height, "yuv420p"
        context = stream.codec_context
        # Untagged video is BT.601 to some players and BT.709 to others: colours would shift.
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        self._stream = stream

    def _put(self, frame: Frames) -> None:
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.AREA,  # averages chroma: in tiny clips the others bleed over visible edges
        )
        self._encode(self._timed(picture))

    def _finish(self) -> None:
        self._encode(None)
        self._close_container()


class GifWriter(_EncodedWriter):
    """Endless loop, 256 colours of its own for each frame. Metadata in a comment block before the trailer."""

    def _begin(self, staging: Staging) -> None:
        self._path = staging.path(self._name)
        self._container = av.open(_plain(self._path), "w", format="gif", options={"loop": "0"})
        self._stream = self._container.add_stream("gif", rate=self._rate)
        self._stream.width, self._stream.height, self._stream.pix_fmt = self._clip.width, self._clip.height, "pal8"
        self._stream.codec_context.time_base = Fraction(1, 100)
        self._graph = self._palette_graph()

    def _palette_graph(self) -> av.filter.Graph:
        """A palette for each frame, not one for all: that would need every frame before the first is written."""
        graph = av.filter.Graph()
        width, height = self._clip.width, self._clip.height
        rgb = av.video.format.VideoFormat("rgb24", width, height)
        source = graph.add_buffer(width=width, height=height, format=rgb, time_base=1 / self._rate)
        split = graph.add("split")
        palette = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
        # An ordered pattern stands still; error diffusion would crawl over plain backgrounds.
        paint = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=4")
        sink = graph.add("buffersink")
        source.link_to(split)
        split.link_to(palette, 0, 0)
        split.link_to(paint, 1, 0)
        palette.link_to(paint, 0, 1)
        paint.link_to(sink)
        graph.configure()
        return graph

    def _put(self, frame: Frames) -> None:
        self._graph.push(self._timed(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        self._drain()

    def _drain(self) -> None:
        while True:
            try:
                picture = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            assert isinstance(picture, av.VideoFrame)
            self._encode(picture)

    def _finish(self) -> None:
        self._graph.push(None)
        self._drain()
        self._encode(None)
        self._close_container()
        if self._metadata is not None:
            _append_gif_comment(self._path, self._metadata.to_json().encode("ascii"))


class LosslessWriter(_EncodedWriter):
    """FFV1 in Matroska (RFC 9043), RGB: every bit of every frame. Unlike other clips it is on disk when it is closed,
    whatever happens then."""

    def _begin(self, staging: Staging) -> None:
        self._path = staging.path(self._name)
        self._container = av.open(_plain(self._path), "w", format="matroska")
        self._stream = self._container.add_stream("ffv1", rate=self._rate, options=_FFV1)
        self._stream.width, self._stream.height, self._stream.pix_fmt = self._clip.width, self._clip.height, "bgr0"

    def _put(self, frame: Frames) -> None:
        self._encode(self._timed(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")))

    def _finish(self) -> None:
        self._encode(None)
        self._close_container()
        with self._path.open("rb+") as file:
            os.fsync(file.fileno())


def _plain(path: Path) -> str:
    """FFmpeg takes `12:30.mp4` for something of the protocol `12`; with a folder in front it is a file."""
    return os.path.abspath(path)


def _append_gif_comment(path: Path, comment: bytes) -> None:
    """A comment extension (GIF89a, section 24) in front of the trailer; FFmpeg's muxer writes none by itself."""
    pieces = [comment[start : start + 255] for start in range(0, len(comment), 255)]
    block = b"\x21\xfe" + b"".join(bytes([len(piece)]) + piece for piece in pieces) + b"\x00"
    with path.open("r+b") as file:
        file.seek(-1, 2)
        assert file.read(1) == _GIF_TRAILER
        file.seek(-1, 2)
        file.write(block + _GIF_TRAILER)
