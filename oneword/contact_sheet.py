"""Contact sheets: panels of pictures with captions, for people to look at."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SIDE = 160  # pixels of a picture on the sheet
MARGIN = 10
TITLE_HEIGHT = 26
CAPTION_HEIGHT = 42
CAPTION_CHARACTERS = 26  # a line of a caption
INK = (30, 30, 30)
PALE_INK = (110, 110, 110)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file and what stands below it."""

    content: bytes
    caption: str


@dataclass(frozen=True, slots=True)
class Panel:
    """Pictures side by side under a title."""

    title: str
    pictures: Sequence[Picture]


def draw_contact_sheet(bands: Sequence[Sequence[Panel]]) -> Image.Image:
    """Bands from top to bottom, the panels of a band side by side; all pictures of one size."""
    band_height = TITLE_HEIGHT + SIDE + CAPTION_HEIGHT
    width = MARGIN + max(sum(map(_panel_width, band)) for band in bands)
    sheet = Image.new("RGB", (width, MARGIN + len(bands) * band_height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, band in enumerate(bands):
        left, top = MARGIN, MARGIN + index * band_height
        for panel in band:
            draw.text((left, top), panel.title, INK, ImageFont.load_default(15))
            for column, picture in enumerate(panel.pictures):
                at = left + column * (SIDE + MARGIN)
                _draw_picture(sheet, draw, picture, at, top + TITLE_HEIGHT)
            left += _panel_width(panel)
    return sheet


def _panel_width(panel: Panel) -> int:
    return len(panel.pictures) * (SIDE + MARGIN) + 2 * MARGIN


def _draw_picture(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, picture: Picture, left: int, top: int
) -> None:
    with Image.open(io.BytesIO(picture.content)) as image:
        scaled = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    sheet.paste(scaled, (left, top))
    draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=(220, 220, 220))
    lines = textwrap.wrap(picture.caption, CAPTION_CHARACTERS)[:2]
    draw.multiline_text(
        (left, top + SIDE + 3), "\n".join(lines), PALE_INK, ImageFont.load_default(11), spacing=2
    )
