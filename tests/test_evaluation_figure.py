"""The figure by its pixels: points, front and lines stand where the numbers say."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from trainer.tradeoff import TradeOffPoint
from trainer.tradeoff_figure import (
    BEATEN,
    BOTTOM,
    FRONT,
    HEIGHT,
    LEFT,
    MARKER_RADIUS,
    REFERENCE,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Box,
    _draw_label,
    _inside,
    _overlap,
    draw_figure,
    figure_axes,
    figure_png,
)


def _point(label: str, image: float, text: float) -> TradeOffPoint:
    return TradeOffPoint(label=label, image_similarity=image, text_similarity=text)


POINTS = [_point("a", 0.70, 0.20), _point("b", 0.55, 0.27), _point("c", 0.50, 0.22)]
LINES = [
    _point("training images", 0.85, 0.1),
    _point("class word", 0.4, 0.30),
    _point("word left out", 0.3, 0.33),
]


def _drawn(points: list[TradeOffPoint], lines: list[TradeOffPoint]) -> np.ndarray:
    return np.asarray(draw_figure(points, lines, title="t", image_label="image", text_label="text"))


def _pixel(pixels: np.ndarray, x: float, y: float) -> tuple[int, ...]:
    return tuple(int(level) for level in pixels[round(y), round(x)])


def test_an_axis_is_linear_and_leaves_room() -> None:
    axis = Axis.over([0.2, 0.4], 100, 300)
    assert axis.pixel(0.3) == pytest.approx(200)
    assert 100 < axis.pixel(0.2) < axis.pixel(0.4) < 300
    assert axis.pixel(0.4) - axis.pixel(0.2) == pytest.approx(200 / 1.16)


@pytest.mark.parametrize("values", [[0.3], [0.0, 1e-9], [-1.0, 1.0], [0.211, 0.34]])
def test_ticks_are_few_even_and_inside(values: list[float]) -> None:
    axis = Axis.over(values, 0, 100)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 7
    assert axis.lowest <= ticks[0] < ticks[-1] <= axis.highest
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_ticks_are_told_apart() -> None:
    axis = Axis.over([0.995, 1.01], 0, 100)
    labels = [axis.tick_label(value) for value in axis.ticks()]
    assert len(set(labels)) == len(labels) and "1.005" in labels
    assert Axis.over([0.0, 100.0], 0, 100).tick_label(20.0) == "20"


def test_points_land_where_their_numbers_are() -> None:
    pixels = _drawn(POINTS, LINES)
    image_axis, text_axis = figure_axes(POINTS, LINES)
    for point, colour in zip(POINTS, (FRONT, FRONT, BEATEN), strict=True):
        x = image_axis.pixel(point.image_similarity)
        y = text_axis.pixel(point.text_similarity)
        assert _pixel(pixels, x, y) == colour
        assert _pixel(pixels, x + MARKER_RADIUS - 2, y) == colour
        assert _pixel(pixels, x, y + MARKER_RADIUS + 3) != BEATEN
    # Right is more faithful, up is more editable: b stands left of and above a.
    assert image_axis.pixel(0.55) < image_axis.pixel(0.70)
    assert text_axis.pixel(0.27) < text_axis.pixel(0.20)
    beaten = np.argwhere((pixels == BEATEN).all(axis=2))
    middle = beaten.mean(axis=0)
    expected = (text_axis.pixel(0.22), image_axis.pixel(0.50))
    np.testing.assert_allclose(middle, expected, atol=1)  # half a pixel of rounding each way


def test_the_front_is_joined() -> None:
    pixels = _drawn(POINTS, [])
    image_axis, text_axis = figure_axes(POINTS, [])
    middle = image_axis.pixel(0.625), text_axis.pixel(0.235)
    assert _pixel(pixels, *middle) == FRONT


def test_references_are_lines_across_the_plot() -> None:
    pixels = _drawn(POINTS, LINES)
    image_axis, text_axis = figure_axes(POINTS, LINES)
    dashes = (pixels == REFERENCE).all(axis=2)
    for image in (0.85, 0.4):
        column = dashes[TOP + 1 : BOTTOM, round(image_axis.pixel(image))]
        assert column.mean() > 0.5
    for text in (0.30, 0.33):
        row = dashes[round(text_axis.pixel(text)), LEFT + 1 : RIGHT]
        assert row.mean() > 0.5
    # What is not held to a prompt has no line across, and what is no image none upwards.
    assert text_axis.lowest > 0.1
    assert image_axis.lowest > 0.3


def test_a_figure_without_points_and_with_strange_labels_is_drawn() -> None:
    assert _drawn([], []).shape == (HEIGHT, WIDTH, 3)
    crowd = [_point("x" * 200, 0.5, 0.2), _point("\x1b[2J\n", 0.5, 0.2), _point("", -1.0, 1.0)]
    pixels = _drawn(crowd * 5, LINES)
    image_axis, text_axis = figure_axes(crowd, LINES)
    assert _pixel(pixels, image_axis.pixel(0.5), text_axis.pixel(0.2)) == FRONT


def test_labels_of_a_crowd_find_places_of_their_own() -> None:
    draw = ImageDraw.Draw(Image.new("RGB", (WIDTH, HEIGHT)))
    middle = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    taken: list[Box] = []
    for number in range(16):
        taken.append(_draw_label(draw, f"a long label {number}", *middle, taken))
    pairs = itertools.combinations(taken, 2)
    assert not any(_overlap(one, other) for one, other in pairs)
    assert all(_inside(box) for box in taken)


def test_labels_of_neighbours_do_not_cover_each_other_or_points() -> None:
    near = [_point("one", 0.50, 0.20), _point("two", 0.505, 0.20), _point("far", 0.8, 0.4)]
    pixels = _drawn(near, [])
    image_axis, text_axis = figure_axes(near, [])
    x = image_axis.pixel(0.505)
    assert _pixel(pixels, x, text_axis.pixel(0.20)) == BEATEN


def test_the_file_is_the_picture() -> None:
    figure = draw_figure(POINTS, LINES, title="t", image_label="i", text_label="x")
    with Image.open(io.BytesIO(figure_png(figure))) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(figure))
