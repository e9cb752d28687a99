"""The paper's figure: likeness to the right, obedience to the prompt upwards, a point a concept.

Drawn with Pillow, so that evaluating needs no plotting library. docs/evaluation.md reads it.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from engine.printing import printable
from trainer.tradeoff import TradeOffPoint, pareto_front

WIDTH, HEIGHT = 960, 680  # pixels
LEFT, TOP, RIGHT, BOTTOM = 90, 70, 930, 590  # of the plot
MARKER_RADIUS = 6
FRONT = (200, 70, 30)  # points that no other beats in both measures, and the line through them
BEATEN = (70, 110, 170)
REFERENCE = (150, 150, 150)
_INK, _PALE_INK, _GRID = (30, 30, 30), (110, 110, 110), (232, 232, 232)
# Upper bounds have one line, since a set of images is held to no prompt, and text to no image.
_VERTICAL = ("training images", "class word", "random images")
_HORIZONTAL = ("class word", "word left out", "random images")
_PADDING = 0.08  # of the range, on either side
_SMALLEST_RANGE = 0.02
_TICKS = 6
_LABEL_CHARACTERS = 28
_FARTHEST_LABEL = 200  # pixels from its point
_BESIDE = 4  # the first places of a label need no line to the point
_LEGEND = "orange: no other point is better in both; blue: one is; dashed: references"

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A linear scale from values to pixels."""

    lowest: float
    highest: float
    first_pixel: float  # of `lowest`
    last_pixel: float

    @classmethod
    def over(cls, values: Sequence[float], first_pixel: float, last_pixel: float) -> "Axis":
        """A scale with room around all values."""
        lowest, highest = min(values), max(values)
        room = max(_PADDING * (highest - lowest), (_SMALLEST_RANGE - (highest - lowest)) / 2)
        return cls(
            lowest=lowest - room,
            highest=highest + room,
            first_pixel=first_pixel,
            last_pixel=last_pixel,
        )

    def pixel(self, value: float) -> float:
        share = (value - self.lowest) / (self.highest - self.lowest)
        return self.first_pixel + share * (self.last_pixel - self.first_pixel)

    @property
    def step(self) -> float:
        """Between two ticks: 1, 2 or 5 times a power of ten, at most some `_TICKS` on the axis."""
        rough = (self.highest - self.lowest) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        return next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough)

    def ticks(self) -> list[float]:
        """The round values inside."""
        first, last = math.ceil(self.lowest / self.step), math.floor(self.highest / self.step)
        return [place * self.step for place in range(first, last + 1)]

    def tick_label(self, value: float) -> str:
        decimals = max(0, -math.floor(math.log10(self.step)))
        return f"{value:.{decimals}f}"


def figure_axes(
    points: Sequence[TradeOffPoint], references: Sequence[TradeOffPoint]
) -> tuple[Axis, Axis]:
    """The scales of image similarity (rightwards) and text similarity (upwards)."""
    image = [point.image_similarity for point in points]
    image += [line.image_similarity for line in references if line.label in _VERTICAL]
    text = [point.text_similarity for point in points]
    text += [line.text_similarity for line in references if line.label in _HORIZONTAL]
    return Axis.over(image or [0.0], LEFT, RIGHT), Axis.over(text or [0.0], BOTTOM, TOP)


def draw_figure(
    points: Sequence[TradeOffPoint],
    references: Sequence[TradeOffPoint],
    *,
    title: str,
    image_label: str,
    text_label: str,
) -> Image.Image:
    """Points with labels, references as dashed lines, the Pareto front as a line."""
    figure = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(figure)
    image_axis, text_axis = figure_axes(points, references)
    draw.text((LEFT, 22), printable(title)[:110], _INK, _font(17))
    draw.text((LEFT, 46), _LEGEND, _PALE_INK, _font(12))
    _draw_scales(draw, image_axis, text_axis)
    _draw_names(figure, draw, image_label, text_label)
    _draw_references(draw, references, image_axis, text_axis)
    _draw_points(draw, points, image_axis, text_axis)
    return figure


def figure_png(figure: Image.Image) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _draw_scales(draw: ImageDraw.ImageDraw, image_axis: Axis, text_axis: Axis) -> None:
    for value in image_axis.ticks():
        at = round(image_axis.pixel(value))
        draw.line((at, TOP, at, BOTTOM), _GRID)
        draw.text((at, BOTTOM + 6), image_axis.tick_label(value), _PALE_INK, _font(12), anchor="ma")
    for value in text_axis.ticks():
        at = round(text_axis.pixel(value))
        draw.line((LEFT, at, RIGHT, at), _GRID)
        draw.text((LEFT - 8, at), text_axis.tick_label(value), _PALE_INK, _font(12), anchor="rm")
    draw.rectangle((LEFT, TOP, RIGHT, BOTTOM), outline=_PALE_INK)


def _draw_names(
    figure: Image.Image, draw: ImageDraw.ImageDraw, image_label: str, text_label: str
) -> None:
    middle = (LEFT + RIGHT) / 2
    draw.text((middle, BOTTOM + 34), f"{image_label}  (more faithful ->)", _INK, _font(14), "ma")
    beside = Image.new("RGB", (BOTTOM - TOP, 22), "white")
    name = f"{text_label}  (more editable ->)"
    ImageDraw.Draw(beside).text((beside.width / 2, 2), name, _INK, _font(14), "ma")
    figure.paste(beside.transpose(Image.Transpose.ROTATE_90), (14, TOP))


def _draw_references(
    draw: ImageDraw.ImageDraw,
    references: Sequence[TradeOffPoint],
    image_axis: Axis,
    text_axis: Axis,
) -> None:
    for place, line in enumerate(references):
        if line.label in _VERTICAL:
            at = round(image_axis.pixel(line.image_similarity))
            _dashed(draw, (at, TOP), (at, BOTTOM))
            # Lines may be close: each name has a height of its own.
            fits = at + 4 + draw.textlength(line.label, _font(11)) < RIGHT
            beside, anchor = (at + 4, "la") if fits else (at - 4, "ra")
            height = BOTTOM - 18 - 14 * place
            draw.text((beside, height), line.label, _PALE_INK, _font(11), anchor)
        if line.label in _HORIZONTAL:
            at = round(text_axis.pixel(line.text_similarity))
            _dashed(draw, (LEFT, at), (RIGHT, at))
            draw.text((LEFT + 6 + 110 * place, at - 15), line.label, _PALE_INK, _font(11))


def _dashed(
    draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float]
) -> None:
    """A straight line, six pixels of it drawn and four left."""
    length = math.dist(start, end)

    def at(distance: float) -> tuple[float, float]:
        share = min(distance / length, 1.0)
        return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])

    for first in range(0, math.ceil(length), 10):
        draw.line((at(first), at(first + 5)), REFERENCE)


def _draw_points(
    draw: ImageDraw.ImageDraw, points: Sequence[TradeOffPoint], image_axis: Axis, text_axis: Axis
) -> None:
    def place(point: TradeOffPoint) -> tuple[float, float]:
        return image_axis.pixel(point.image_similarity), text_axis.pixel(point.text_similarity)

    front = pareto_front(points)
    if len(front) > 1:
        draw.line([place(point) for point in front], FRONT, width=2)
    taken: list[Box] = [_around(*place(point)) for point in points]
    for point in sorted(points, key=lambda point: point in front):  # the front is not covered
        draw.ellipse(_around(*place(point)), FRONT if point in front else BEATEN)
    for point in points:
        taken.append(_draw_label(draw, point.label, *place(point), taken))


def _around(x: float, y: float) -> Box:
    return (x - MARKER_RADIUS, y - MARKER_RADIUS, x + MARKER_RADIUS, y + MARKER_RADIUS)


def _draw_label(
    draw: ImageDraw.ImageDraw, label: str, x: float, y: float, taken: Sequence[Box]
) -> Box:
    """Writes beside a point where nothing else stands, if need be further off with a line to it."""
    text = printable(label)
    text = text if len(text) <= _LABEL_CHARACTERS else f"{text[: _LABEL_CHARACTERS - 3]}..."
    choices = _label_places(x, y)
    boxes = [draw.textbbox((left, top), text, _font(13), anchor) for left, top, anchor in choices]
    free = [not any(_overlap(box, other) for other in taken) and _inside(box) for box in boxes]
    chosen = free.index(True) if any(free) else 0
    left, top, anchor = choices[chosen]
    if chosen >= _BESIDE:
        share = (MARKER_RADIUS + 1) / math.dist((x, y), (left, top))
        draw.line((x + share * (left - x), y + share * (top - y), left, top), REFERENCE)
    draw.text((left, top), text, _INK, _font(13), anchor)
    return boxes[chosen]


def _label_places(x: float, y: float) -> list[tuple[float, float, str]]:
    """Right, left, above and below a point, then the same further and further off."""
    places: list[tuple[float, float, str]] = []
    for away in range(MARKER_RADIUS + 4, _FARTHEST_LABEL, 16):
        places += [
            (x + away, y, "lm"),
            (x - away, y, "rm"),
            (x, y - away, "mb"),
            (x, y + away, "mt"),
        ]
        if away > MARKER_RADIUS + 4:
            corners = ((1, 1, "lt"), (1, -1, "lb"), (-1, 1, "rt"), (-1, -1, "rb"))
            places += [(x + i * away, y + j * away, anchor) for i, j, anchor in corners]
    return places


def _overlap(one: Box, other: Box) -> bool:
    return (
        one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
    )  # fmt: skip


def _inside(box: Box) -> bool:
    return box[0] >= LEFT and box[1] >= TOP and box[2] <= RIGHT and box[3] <= BOTTOM
