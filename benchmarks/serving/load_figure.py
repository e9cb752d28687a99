"""Latency and goodput against load, a line for each system; drawn with Pillow."""

from collections.abc import Callable
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from trainer.tradeoff_figure import Axis

WIDTH, HEIGHT = 1260, 420  # pixels
TOP, BOTTOM = 84, 360  # of the panels
PANEL_WIDTH, FIRST_LEFT, GAP = 340, 70, 75
MARKER_RADIUS = 4
COLOURS = ((200, 70, 30), (70, 110, 170), (130, 130, 130))  # of the systems, in their order
_INK, _PALE_INK, _GRID = (30, 30, 30), (110, 110, 110), (232, 232, 232)

Point = dict[str, Any]  # of one system under one load (benchmarks/serving/open_loop.py)
Value = Callable[[Point], float]
PANELS: dict[str, Value] = {
    "median latency, ms": lambda point: point["latency_ms"].get("median", 0.0),
    "p99 latency, ms": lambda point: point["latency_ms"].get("p99", 0.0),
    "images in time, 1/s": lambda point: point["goodput_per_s"],
}


def draw_load_figure(loads: dict[str, dict[str, Point]]) -> Image.Image:
    """Three panels beside each other; the loads are shares of the capacity."""
    figure = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(figure)
    systems = list(next(iter(loads.values())))
    _draw_legend(draw, systems)
    for place, (title, value) in enumerate(PANELS.items()):
        left = FIRST_LEFT + place * (PANEL_WIDTH + GAP)
        _draw_panel(draw, loads, systems, title, value, left)
    return figure


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw_legend(draw: ImageDraw.ImageDraw, systems: list[str]) -> None:
    left = FIRST_LEFT
    for colour, name in zip(COLOURS, systems, strict=False):
        draw.line((left, 28, left + 30, 28), colour, width=3)
        draw.text((left + 38, 28), name, _INK, _font(15), anchor="lm")
        left += 70 + round(draw.textlength(name, _font(15)))


def _draw_panel(
    draw: ImageDraw.ImageDraw,
    loads: dict[str, dict[str, Point]],
    systems: list[str],
    title: str,
    value: Value,
    left: int,
) -> None:
    right = left + PANEL_WIDTH
    shares = [100.0 * float(load) for load in loads]
    curves = {name: [value(points[name]) for points in loads.values()] for name in systems}
    across = Axis.over(shares, left, right)
    up = Axis.over([0.0, *(one for curve in curves.values() for one in curve)], BOTTOM, TOP)
    draw.text((left, TOP - 26), title, _INK, _font(14))
    for share in shares:
        at = across.pixel(share)
        draw.line((at, TOP, at, BOTTOM), _GRID)
        draw.text((at, BOTTOM + 6), f"{share:.0f} %", _PALE_INK, _font(12), anchor="ma")
    for tick in up.ticks():
        at = up.pixel(tick)
        draw.line((left, at, right, at), _GRID)
        draw.text((left - 6, at), up.tick_label(tick), _PALE_INK, _font(12), anchor="rm")
    draw.rectangle((left, TOP, right, BOTTOM), outline=_PALE_INK)
    middle = (left + right) / 2
    draw.text((middle, BOTTOM + 28), "load, share of capacity", _PALE_INK, _font(12), anchor="ma")
    for colour, name in reversed(list(zip(COLOURS, systems, strict=False))):
        places = [
            (across.pixel(share), up.pixel(one))
            for share, one in zip(shares, curves[name], strict=True)
        ]
        draw.line(places, colour, width=3)
        for x, y in places:
            box = (x - MARKER_RADIUS, y - MARKER_RADIUS, x + MARKER_RADIUS, y + MARKER_RADIUS)
            draw.ellipse(box, colour)
