"""Pictures as PNG by Pillow, and the choice between SVG and PNG by file ending."""

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from pipedit.core.errors import InvalidRequestError
from pipedit.core.staging import Staging, target_problems, write_text_whole
from pipedit.media.label_font import drawable, label_font
from pipedit.plan.picture import Anchor, Line, Picture, Rectangle, Shape, Text
from pipedit.plan.timeline import Timeline
from pipedit.plan.timeline_layout import Panel, lay_out
from pipedit.plan.timeline_svg import render_svg

PICTURE_ENDINGS = (".svg", ".png")
_ANCHORS: dict[Anchor, str] = {"start": "ls", "middle": "ms", "end": "rs"}
_OVERSAMPLING = 2  # Pillow draws boxes without smoothing their corners


def check_picture(path: str | os.PathLike[str]) -> list[str]:
    """Why no picture can be written to `path`, one sentence each. Raises nothing, writes nothing."""
    target = Path(path)
    if os.path.isdir(target) or target.suffix.lower() in PICTURE_ENDINGS:
        return target_problems(target)
    allowed = " or ".join(PICTURE_ENDINGS)
    return [f"cannot draw {target}: the ending must be {allowed}", *target_problems(target)]


def save_picture(timeline: Timeline | Sequence[Panel], path: str | os.PathLike[str]) -> None:
    """Draws one timeline, or several titled ones, as .svg or .png. Raises InvalidRequestError (see `check_picture`)."""
    problems = check_picture(path)
    if problems:
        raise InvalidRequestError(problems)
    target = Path(path)
    picture = lay_out([Panel(timeline=timeline)] if isinstance(timeline, Timeline) else timeline)
    if target.suffix.lower() == ".svg":
        write_text_whole(target, render_svg(picture))
        return
    staging = Staging(target.parent)
    try:
        render_png(picture).save(staging.path(target.name), format="PNG", optimize=True)
        staging.publish()
    finally:
        staging.discard()


def render_png(picture: Picture, *, scale: int = 2) -> Image.Image:
    """The picture with `scale` pixels to a unit. For other than Latin letters use SVG (see `drawable`)."""
    drawn = scale * _OVERSAMPLING
    image = Image.new("RGB", (round(picture.width * drawn), round(picture.height * drawn)), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for shape in picture.shapes:
        _paint(draw, shape, drawn)
    return image.reduce(_OVERSAMPLING)


def _paint(draw: ImageDraw.ImageDraw, shape: Shape, scale: int) -> None:
    match shape:
        case Rectangle():
            left, top = round(shape.x * scale), round(shape.y * scale)
            # Pillow counts the last pixel in; a box is never thinner than one.
            right = max(left, round((shape.x + shape.width) * scale) - 1)
            bottom = max(top, round((shape.y + shape.height) * scale) - 1)
            draw.rounded_rectangle((left, top, right, bottom), radius=shape.radius * scale, fill=shape.fill)
        case Line():
            ends = tuple(round(value * scale) for value in (shape.x1, shape.y1, shape.x2, shape.y2))
            draw.line(ends, fill=shape.stroke, width=max(1, round(shape.width * scale)))
        case Text():
            at, anchor = (shape.x * scale, shape.y * scale), _ANCHORS[shape.anchor]
            weight = 0.02 * shape.size * scale if shape.bold else 0.0  # the font has no bold cut: a thin outline
            font, text = label_font(shape.size * scale), drawable(shape.text)
            draw.text(at, text, fill=shape.fill, font=font, anchor=anchor, stroke_width=weight)
