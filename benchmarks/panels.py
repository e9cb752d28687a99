"""Curves in panels beside each other, drawn with Pillow."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from trainer.tradeoff_figure import Axis

HEIGHT = 420  # pixels
TOP, BOTTOM = 84, 360  # of the panels
PANEL_WIDTH, FIRST_LEFT, GAP = 340, 70, 75
MARKER_RADIUS = 4
COLOURS = ((200, 70, 30), (70, 110, 170), (130, 130, 130))  # of the curves' names, in their order
_INK, _PALE_INK, _GRID = (30, 30, 30), (110, 110, 110), (232, 232, 232)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Values over places on the axis; measured ones have markers, a fit is a line alone."""

    x: Sequence[float]
    y: Sequence[float]
    has_line: bool = True
    has_markers: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One diagram; the vertical axis begins at 0."""

    title: str
    x_label: str
    x_ticks: dict[float, str]
    curves: dict[str, Curve]  # by name, the same names in all panels of a figure


def draw_panels(panels: Sequence[Panel]) -> Image.Image:
    """The panels from left to right under a legend."""
    width = FIRST_LEFT + len(panels) * (PANEL_WIDTH + GAP) - GAP + 20
    figure = Image.new("RGB", (width, HEIGHT), "white")
    draw = ImageDraw.Draw(figure)
    _draw_legend(draw, list(panels[0].curves))
    for place, panel in enumerate(panels):
        _draw_panel(draw, panel, FIRST_LEFT + place * (PANEL_WIDTH + GAP))
    return figure


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw_legend(draw: ImageDraw.ImageDraw, names: list[str]) -> None:
    left = FIRST_LEFT
    for colour, name in zip(COLOURS, names, strict=False):
        draw.line((left, 28, left + 30, 28), colour, width=3)
        draw.text((left + 38, 28), name, _INK, _font(15), anchor="lm")
        left += 70 + round(draw.textlength(name, _font(15)))


def _draw_panel(draw: ImageDraw.ImageDraw, panel: Panel, left: int) -> None:
    right = left + PANEL_WIDTH
    curves = panel.curves.values()
    across = Axis.over([*panel.x_ticks, *(x for curve in curves for x in curve.x)], left, right)
    up = Axis.over([0.0, *(y for curve in curves for y in curve.y)], BOTTOM, TOP)
    draw.text((left, TOP - 26), panel.title, _INK, _font(14))
    free = float(left)  # where the next label may begin
    for tick, label in panel.x_ticks.items():
        at, half = across.pixel(tick), draw.textlength(label, _font(12)) / 2
        draw.line((at, TOP, at, BOTTOM), _GRID)
        if at - half >= free:
            draw.text((at, BOTTOM + 6), label, _PALE_INK, _font(12), anchor="ma")
            free = at + half + 4
    for tick in up.ticks():
        at = up.pixel(tick)
        draw.line((left, at, right, at), _GRID)
        draw.text((left - 6, at), up.tick_label(tick), _PALE_INK, _font(12), anchor="rm")
    draw.rectangle((left, TOP, right, BOTTOM), outline=_PALE_INK)
    middle = (left + right) / 2
    draw.text((middle, BOTTOM + 28), panel.x_label, _PALE_INK, _font(12), anchor="ma")
    for colour, curve in reversed(list(zip(COLOURS, curves, strict=False))):
        places = [(across.pixel(x), up.pixel(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        if curve.has_line:
            draw.line(places, colour, width=3)
        for x, y in places if curve.has_markers else ():
            box = (x - MARKER_RADIUS, y - MARKER_RADIUS, x + MARKER_RADIUS, y + MARKER_RADIUS)
            draw.ellipse(box, colour)
