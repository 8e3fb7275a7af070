"""Many frames on one picture: for model cards, READMEs and a quick look at a clip."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pipedit.media.frame_writer import Frames
from pipedit.media.label_font import drawable, label_font

_INK, _PAPER = (51, 65, 85), (255, 255, 255)


def evenly(frames: Frames, count: int) -> Frames:
    """`count` frames at equal distances, first and last included; all of them where there are no more."""
    if count >= len(frames):
        return frames
    chosen: Frames = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    return chosen


def contact_sheet(
    frames: Frames,
    *,
    columns: int,
    scale: int = 1,
    gap: int = 4,
    labels: Sequence[str] = (),
    row_titles: Sequence[str] = (),
) -> Image.Image:
    """Frames [F, H, W, 3] row by row, each pixel drawn as `scale` x `scale` ones (tiny clips stay sharp).

    `labels` are written below the single frames, `row_titles` above the rows; both may be shorter than needed.
    """
    if columns < 1 or scale < 1 or not len(frames):
        raise ValueError(f"a contact sheet needs frames, columns and a scale, not {len(frames)}, {columns}, {scale}")
    height, width = frames.shape[1] * scale, frames.shape[2] * scale
    font = label_font(13)
    above, below = (20 if row_titles else 0), (18 if labels else 0)
    rows = -(-len(frames) // columns)
    row_height = above + height + below + gap
    shown = min(columns, len(frames))
    sheet = Image.new("RGB", (gap + shown * (width + gap), gap + rows * row_height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, title in enumerate(row_titles[:rows]):
        draw.text((gap, gap + row * row_height + above - 5), drawable(title), fill=_INK, font=font, anchor="ls")
    for index, frame in enumerate(frames):
        row, column = divmod(index, columns)
        x, y = gap + column * (width + gap), gap + row * row_height + above
        sheet.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST), (x, y))
        if index < len(labels):
            draw.text((x + width / 2, y + height + 13), drawable(labels[index]), fill=_INK, font=font, anchor="ms")
    return sheet
