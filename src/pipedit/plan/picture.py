"""A picture as data: rectangles, lines and texts in painting order. Renderers (SVG, PNG) add nothing of their own."""

import dataclasses
from typing import Literal

Anchor = Literal["start", "middle", "end"]
_MEAN_CHARACTER_WIDTH, _MEAN_BOLD_WIDTH = 0.56, 0.68  # of the font size; a little more than usual fonts need


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rectangle:
    """Colours are "#rrggbb". `hint` is shown on hovering, where the format can."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    radius: float = 0.0
    hint: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    x1: float
    y1: float
    x2: float
    y2: float
    stroke: str
    width: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """`x`, `y` is the left end, middle or right end (see `anchor`) of the base line."""

    x: float
    y: float
    text: str
    size: float
    fill: str
    anchor: Anchor = "start"
    bold: bool = False


Shape = Rectangle | Line | Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    width: float
    height: float
    title: str  # what the picture shows, for those who cannot see it
    shapes: tuple[Shape, ...]


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """About how wide a text is drawn, on the safe side for Latin letters. Exact widths depend on the viewer's fonts."""
    return len(text) * size * (_MEAN_BOLD_WIDTH if bold else _MEAN_CHARACTER_WIDTH)


def shorten(text: str, size: float, width: float, *, bold: bool = False) -> str:
    """The text, or its beginning with an ellipsis, so that it fits."""
    if text_width(text, size, bold=bold) <= width:
        return text
    return text[: max(0, int(width / text_width("m", size, bold=bold)) - 1)].rstrip() + "…"


def mix(colour: str, other: str, share: float) -> str:
    """`colour` with `share` of the other one in it."""
    parts = ((int(colour[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in parts)


def is_dark(colour: str) -> bool:
    """Whether light text reads better on it (relative luminance as in WCAG 2, without its gamma)."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 160
