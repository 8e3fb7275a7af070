"""The font of labels on pictures: the one that Pillow carries, so that every machine draws the same."""

import functools
import unicodedata

from PIL import ImageFont

_REPLACED = str.maketrans({"×": "x", "µ": "u", "–": "-", "‘": "'", "’": "'", "“": '"', "”": '"'})


@functools.lru_cache(maxsize=32)
def label_font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def drawable(text: str) -> str:
    """The text with what the font lacks (all but ASCII) spelled without accents, or as "?"."""
    decomposed = unicodedata.normalize("NFKD", text.translate(_REPLACED))
    letters = (letter for letter in decomposed if not unicodedata.combining(letter))
    return "".join(letter if letter.isascii() or letter == "·" else "?" for letter in letters)
