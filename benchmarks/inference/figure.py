"""Time of an image as a multiple of OneWord's in float32, a bar for each system."""

from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.inference.cases import CASES
from benchmarks.inference.page import case_results
from benchmarks.serving.results import Results

WIDTH, ROW, TITLE, MARGIN = 900, 26, 44, 24  # pixels
LEFT, RIGHT = 200, 820
OURS, THEIRS, OTHER_PRECISION = (200, 70, 30), (70, 110, 170), (150, 170, 200)
_INK, _PALE_INK = (30, 30, 30), (110, 110, 110)


def draw_figure(results: Results) -> Image.Image:
    """A panel for each case; paler bars compute in less than float32."""
    panels = {name: _bars(case_results(results, name)) for name in CASES}
    panels = {name: bars for name, bars in panels.items() if len(bars) > 1}
    height = 2 * MARGIN + sum(TITLE + ROW * len(bars) for bars in panels.values())
    figure = Image.new("RGB", (WIDTH, height), "white")
    draw, top = ImageDraw.Draw(figure), MARGIN
    for name, bars in panels.items():
        draw.text((MARGIN, top), CASES[name].title, _INK, _font(16))
        top += TITLE - 12
        longest = max(ratio for _, ratio, _ in bars)
        for system, ratio, colour in bars:
            end = LEFT + (RIGHT - LEFT) * ratio / longest
            draw.text((LEFT - 8, top + ROW / 2), system, _INK, _font(13), anchor="rm")
            draw.rectangle((LEFT, top + 4, end, top + ROW - 4), colour)
            draw.text((end + 6, top + ROW / 2), f"{ratio:.2f}", _PALE_INK, _font(13), anchor="lm")
            top += ROW
        top += 12
    return figure


def _bars(rows: dict[str, dict[str, Any]]) -> list[tuple[str, float, tuple[int, int, int]]]:
    bars = [("OneWord", 1.0, OURS)]
    for system, result in rows.items():
        if "missing" not in result:
            exact = result["precision"] == "float32"
            bars.append((system, result["image"]["ratio"], THEIRS if exact else OTHER_PRECISION))
    return sorted(bars, key=lambda bar: bar[1])


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
