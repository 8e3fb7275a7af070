"""Video files out, and back in. The only package that imports PyAV and Pillow; knows nothing of models."""

from pipedit.media.contact_sheet import contact_sheet, evenly
from pipedit.media.encoded import LosslessWriter
from pipedit.media.frame_writer import ClipFormat, Frames, FrameWriter
from pipedit.media.metadata import VideoMetadata
from pipedit.media.names import existing_files, files_of, numbered
from pipedit.media.outputs import ENDINGS, check_output, open_writer
from pipedit.media.reading import read_frames, read_metadata, stream_frames
from pipedit.media.timeline_picture import PICTURE_ENDINGS, check_picture, render_png, save_picture

__all__ = [
    "ENDINGS",
    "PICTURE_ENDINGS",
    "ClipFormat",
    "FrameWriter",
    "Frames",
    "LosslessWriter",
    "VideoMetadata",
    "check_output",
    "check_picture",
    "contact_sheet",
    "evenly",
    "existing_files",
    "files_of",
    "numbered",
    "open_writer",
    "read_frames",
    "read_metadata",
    "render_png",
    "save_picture",
    "stream_frames",
]
