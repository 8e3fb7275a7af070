"""Contact sheets and timeline pictures: what must be where, seen in the pixels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipedit.core.errors import InvalidRequestError
from pipedit.core.spans import Span
from pipedit.media import contact_sheet, evenly, render_png, save_picture
from pipedit.media.label_font import drawable
from pipedit.plan.picture import Line, Picture, Rectangle, Text
from pipedit.plan.timeline import Timeline


def test_contact_sheet_places_and_enlarges() -> None:
    frames = np.zeros((5, 2, 3, 3), np.uint8)
    frames[:, :, :, 0] = np.arange(5)[:, None, None] * 50
    frames[3, 0, 0] = (9, 99, 199)
    sheet = contact_sheet(frames, columns=3, scale=4, gap=2)
    assert sheet.size == (3 * (12 + 2) + 2, 2 * (8 + 2) + 2)
    pixels = np.asarray(sheet)
    assert (pixels[2:10, 16:28] == (50, 0, 0)).all()  # frame 1, no pixel of the gap in it
    assert (pixels[12:16, 2:6] == (9, 99, 199)).all()  # the first pixel of frame 3, four by four
    assert (pixels[12:, 30:] == 255).all()  # no sixth frame


def test_contact_sheet_makes_room_for_words() -> None:
    frames = np.zeros((4, 30, 40, 3), np.uint8)
    plain = contact_sheet(frames, columns=2)
    labelled = contact_sheet(frames, columns=2, labels=["0", "1", "2", "3"], row_titles=["a red ball", "größer ×2"])
    assert labelled.width == plain.width
    assert labelled.height > plain.height
    with pytest.raises(ValueError, match="needs frames"):
        contact_sheet(frames[:0], columns=2)


def test_evenly_keeps_both_ends() -> None:
    frames = np.arange(49, dtype=np.uint8).reshape(49, 1, 1, 1).repeat(3, axis=3)
    assert evenly(frames, 5)[:, 0, 0, 0].tolist() == [0, 12, 24, 36, 48]
    assert len(evenly(frames, 100)) == 49


def test_shapes_are_painted_in_order() -> None:
    shapes = (
        Rectangle(x=0, y=0, width=40, height=20, fill="#0000ff"),
        Rectangle(x=10, y=5, width=10, height=10, fill="#ff0000"),
        Line(x1=0, y1=18, x2=40, y2=18, stroke="#00ff00", width=2),
        Text(x=30, y=12, text="w", size=12, fill="#ffffff", anchor="middle", bold=True),
    )
    pixels = np.asarray(render_png(Picture(width=40, height=20, title="test", shapes=shapes), scale=2))
    assert pixels.shape == (40, 80, 3)
    assert pixels[20, 30].tolist() == [255, 0, 0]
    assert pixels[4, 4].tolist() == [0, 0, 255]
    assert pixels[36, 40].tolist() == [0, 255, 0]
    assert pixels[:, 50:70].max() == 255  # the letter
    assert pixels[10:30, 20:40].tolist() == [[[255, 0, 0]] * 20] * 20


def test_font_lacks_are_spelled() -> None:
    assert drawable("größer ×2 … 球") == "groBer x2 ... ?".replace("B", "?")


def test_save_picture_by_ending(tmp_path: Path) -> None:
    span = Span(request_id="r0", rank=0, role="denoiser", what="step", start_s=0.0, end_s=1.0, index=0)
    timeline = Timeline(spans=(span,))
    save_picture(timeline, tmp_path / "t.svg")
    save_picture(timeline, tmp_path / "t.png")
    assert (tmp_path / "t.svg").read_text(encoding="utf-8").startswith("<svg")
    with Image.open(tmp_path / "t.png") as image:
        assert image.width == 2400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.png", "t.svg"]
    with pytest.raises(InvalidRequestError, match=r"must be \.svg or \.png"):
        save_picture(timeline, tmp_path / "t.pdf")
