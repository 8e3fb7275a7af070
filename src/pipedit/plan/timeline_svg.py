"""Pictures as SVG text: self-contained, readable on light and dark pages because it brings its own background."""

import html
import re
from collections.abc import Sequence

from pipedit.plan.picture import Line, Picture, Rectangle, Shape, Text
from pipedit.plan.timeline import Timeline
from pipedit.plan.timeline_layout import Panel, lay_out

_FONTS = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'Noto Sans', sans-serif"
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2


def draw_svg(timeline: Timeline | Sequence[Panel]) -> str:
    """One timeline, or several titled ones above each other on a common time axis."""
    return render_svg(lay_out([Panel(timeline=timeline)] if isinstance(timeline, Timeline) else timeline))


def render_svg(picture: Picture) -> str:
    size = f"{_number(picture.width)} {_number(picture.height)}"
    width, height = size.split()
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{width}" height="{height}" '
        f'font-family="{html.escape(_FONTS)}" role="img" style="color-scheme: light">'
    )
    title = f"<title>{_escape(picture.title)}</title>"
    return "\n".join([head, title, *(_element(shape) for shape in picture.shapes), "</svg>"]) + "\n"


def _element(shape: Shape) -> str:
    match shape:
        case Rectangle():
            place = f'x="{_number(shape.x)}" y="{_number(shape.y)}"'
            size = f'width="{_number(shape.width)}" height="{_number(shape.height)}"'
            radius = f' rx="{_number(shape.radius)}"' if shape.radius else ""
            start = f'<rect {place} {size}{radius} fill="{shape.fill}"'
            return f"{start}><title>{_escape(shape.hint)}</title></rect>" if shape.hint else f"{start}/>"
        case Line():
            start, end = f'x1="{_number(shape.x1)}" y1="{_number(shape.y1)}"', f'x2="{_number(shape.x2)}"'
            end = f'{end} y2="{_number(shape.y2)}"'
            return f'<line {start} {end} stroke="{shape.stroke}" stroke-width="{_number(shape.width)}"/>'
        case Text():
            weight = ' font-weight="600"' if shape.bold else ""
            anchor = f' text-anchor="{shape.anchor}"' if shape.anchor != "start" else ""
            place = f'x="{_number(shape.x)}" y="{_number(shape.y)}" font-size="{_number(shape.size)}"'
            # Texts lie on boxes: without pointer events the box below still shows its hint.
            style = f'fill="{shape.fill}" pointer-events="none"'
            return f"<text {place}{anchor}{weight} {style}>{_escape(shape.text)}</text>"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _escape(text: str) -> str:
    return html.escape(_NOT_XML.sub("�", text), quote=False)
