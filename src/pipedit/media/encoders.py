"""Which encoders this build of FFmpeg brings. Knows no clip."""

import av.codec.codec


def has_h264_encoder() -> bool:
    """Whether MP4 files can be written (see `Mp4Writer`)."""
    try:
        av.codec.codec.Codec("libx264", "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True
