"""Backgrounds: plain, patterned, and simple drawn scenes, each with the words that describe it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from models.recipe.objects import COLOURS

Rgb = tuple[int, int, int]
_OVERSAMPLING = 2  # drawn larger and averaged down: edges are smooth


@dataclass(frozen=True, slots=True)
class Background:
    """A painted background and what is true of it."""

    pixels: UInt8[np.ndarray, "size size 3"]
    kind: str  # "plain", "pattern" or "scene"
    phrase: str  # "on a blue background"
    name: str  # colour of a plain one, pattern or scene: what the evaluator is asked for


def draw_background(rng: np.random.Generator, size: int) -> Background:
    """One background of `size` pixels: white or plain mostly, then scenes and patterns."""
    draw = rng.random()
    if draw < 0.26:
        return plain(rng, size, "white")
    if draw < 0.68:
        return plain(rng, size, str(rng.choice(list(COLOURS))))
    if draw < 0.80:
        return pattern(rng, size)
    return scene(rng, size, str(rng.choice(list(SCENES))))


def plain(rng: np.random.Generator, size: int, colour: str) -> Background:
    """One colour, a little off its mean, so that the word covers its shades."""
    tint = np.array(COLOURS[colour], dtype=np.float64)
    if colour != "white":
        tint = tint + rng.normal(0, 5, 3)
    pixels = np.broadcast_to(_clip(tint), (size, size, 3))
    phrase = str(
        rng.choice([f"on a {colour} background", f"on {colour}", f"in front of a {colour} wall"])
        if rng.random() < 0.35
        else f"on a {colour} background"
    )
    return Background(pixels, "plain", phrase, colour)


def pattern(rng: np.random.Generator, size: int) -> Background:
    """Two colours in stripes, squares or dots."""
    first, second = (str(name) for name in rng.choice(list(COLOURS), 2, replace=False))
    kind = str(rng.choice(["striped", "checkered", "dotted"]))
    rows, columns = np.mgrid[0 : size * _OVERSAMPLING, 0 : size * _OVERSAMPLING]
    cell = size * _OVERSAMPLING / rng.uniform(3.5, 6.5)
    if kind == "striped":
        angle = rng.choice([0.0, np.pi / 4, np.pi / 2])
        along = columns * np.cos(angle) + rows * np.sin(angle)
        mask = (along / cell) % 2 < 1
    elif kind == "checkered":
        mask = (rows // cell + columns // cell) % 2 < 1
    else:
        mask = np.hypot(rows % cell - cell / 2, columns % cell - cell / 2) < 0.28 * cell
    weights = _averaged(mask.astype(np.float64), size)[..., None]
    pixels = weights * np.array(COLOURS[second]) + (1 - weights) * np.array(COLOURS[first])
    phrase = f"on a {first} and {second} {kind} background"
    return Background(_clip(pixels), "pattern", phrase, kind)


def scene(rng: np.random.Generator, size: int, name: str) -> Background:
    """A drawn scene by its name in `SCENES`."""
    paint, phrases = SCENES[name]
    canvas = Image.new("RGB", (size * _OVERSAMPLING, size * _OVERSAMPLING))
    paint(rng, ImageDraw.Draw(canvas), canvas.width)
    pixels = np.asarray(canvas.resize((size, size), Image.Resampling.BOX))
    return Background(pixels, "scene", str(rng.choice(phrases)), name)


def _vertical_gradient(brush: ImageDraw.ImageDraw, side: int, top: Rgb, bottom: Rgb) -> None:
    for row in range(side):
        share = row / side
        brush.line(
            (0, row, side, row),
            fill=tuple(
                round((1 - share) * a + share * b) for a, b in zip(top, bottom, strict=True)
            ),
        )


def _near(rng: np.random.Generator, colour: Rgb, spread: float = 8) -> Rgb:
    red, green, blue = (int(value) for value in _clip(np.array(colour) + rng.normal(0, spread, 3)))
    return red, green, blue


def _ground(
    rng: np.random.Generator, brush: ImageDraw.ImageDraw, side: int, height: float, colour: Rgb
) -> None:
    """A gently rolling ground that begins at `height` of the picture."""
    phase, waves, swell = rng.uniform(0, 6.28), rng.uniform(0.5, 1.2), rng.uniform(0, 0.03)
    line = [
        (x, side * (height + swell * np.sin(phase + waves * 6.28 * x / side)))
        for x in range(0, side + 4, 4)
    ]
    brush.polygon([*line, (side + 4, side), (0, side)], fill=colour)


def _discs(
    rng: np.random.Generator,
    brush: ImageDraw.ImageDraw,
    side: int,
    *,
    count: int,
    radius: tuple[float, float],
    colour: Rgb,
    below: float = 1.0,
) -> None:
    for _ in range(count):
        x, y = rng.uniform(0, side), rng.uniform(0, below * side)
        r = side * rng.uniform(*radius)
        brush.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _meadow(rng: np.random.Generator, brush: ImageDraw.ImageDraw, side: int) -> None:
    _vertical_gradient(brush, side, _near(rng, (120, 190, 245)), (215, 238, 252))
    _ground(rng, brush, side, rng.uniform(0.55, 0.7), _near(rng, (95, 175, 70)))


def _beach(rng: np.random.Generator, brush: ImageDraw.ImageDraw, side: int) -> None:
    _vertical_gradient(brush, side, _near(rng, (130, 205, 250)), (210, 240, 252))
    horizon = rng.uniform(0.36, 0.46)
    brush.rectangle((0, side * horizon, side, side), fill=_near(rng, (40, 140, 200)))
    _ground(rng, brush, side, horizon + rng.uniform(0.2, 0.28), _near(rng, (242, 218, 160)))


def _night(rng: np.random.Generator, brush: ImageDraw.ImageDraw, side: int) -> None:
    _vertical_gradient(brush, side, _near(rng, (12, 14, 50)), _near(rng, (40, 44, 100)))
    _discs(rng, brush, side, count=26, radius=(0.004, 0.012), colour=(250, 245, 210))


def _snow(rng: np.random.Generator, brush: ImageDraw.ImageDraw, side: int) -> None:
    _vertical_gradient(brush, side, _near(rng, (150, 180, 215)), (205, 222, 238))
    _ground(rng, brush, side, rng.uniform(0.58, 0.7), (244, 248, 252))
    _discs(rng, brush, side, count=24, radius=(0.008, 0.018), colour=(252, 253, 255))


def _water(rng: np.random.Generator, brush: ImageDraw.ImageDraw, side: int) -> None:
    _vertical_gradient(brush, side, _near(rng, (60, 170, 215)), _near(rng, (10, 60, 120)))
    for _ in range(9):
        x, y = rng.uniform(0, side), rng.uniform(0, side)
        r = side * rng.uniform(0.01, 0.03)
        brush.ellipse((x - r, y - r, x + r, y + r), outline=(190, 230, 245), width=2)


def _desert(rng: np.random.Generator, brush: ImageDraw.ImageDraw, side: int) -> None:
    _vertical_gradient(brush, side, _near(rng, (250, 200, 130)), (253, 232, 190))
    _ground(rng, brush, side, rng.uniform(0.52, 0.62), _near(rng, (222, 165, 90)))
    _ground(rng, brush, side, rng.uniform(0.74, 0.84), _near(rng, (205, 142, 72)))


def _forest(rng: np.random.Generator, brush: ImageDraw.ImageDraw, side: int) -> None:
    _vertical_gradient(brush, side, _near(rng, (150, 195, 150)), (95, 145, 90))
    for x in np.arange(-0.05, 1.05, 0.12) + rng.uniform(-0.03, 0.03, 10):
        width, top = side * rng.uniform(0.09, 0.14), side * rng.uniform(0.02, 0.2)
        centre = side * x
        brush.polygon(
            [(centre - width, side * 0.72), (centre, top), (centre + width, side * 0.72)],
            fill=_near(rng, (35, 95, 50), 10),
        )
    _ground(rng, brush, side, 0.7, _near(rng, (75, 110, 55)))


def _sunset(rng: np.random.Generator, brush: ImageDraw.ImageDraw, side: int) -> None:
    _vertical_gradient(brush, side, _near(rng, (120, 70, 140)), _near(rng, (255, 160, 80)))
    x, r = side * rng.uniform(0.15, 0.85), side * 0.13
    brush.ellipse((x - r, side * 0.62 - r, x + r, side * 0.62 + r), fill=(255, 225, 120))
    _ground(rng, brush, side, rng.uniform(0.68, 0.76), _near(rng, (60, 35, 70)))


def _room(rng: np.random.Generator, brush: ImageDraw.ImageDraw, side: int) -> None:
    brush.rectangle((0, 0, side, side), fill=_near(rng, (235, 222, 200)))
    floor = side * rng.uniform(0.66, 0.74)
    brush.rectangle((0, floor, side, side), fill=_near(rng, (165, 115, 75)))
    x = side * rng.choice([0.1, 0.62])
    frame = (x, side * 0.1, x + side * 0.28, side * 0.4)
    brush.rectangle(frame, fill=(165, 215, 245), outline=(250, 250, 250), width=max(2, side // 40))


def _city(rng: np.random.Generator, brush: ImageDraw.ImageDraw, side: int) -> None:
    _vertical_gradient(brush, side, _near(rng, (165, 200, 230)), (225, 235, 242))
    x = 0.0
    while x < side:
        width, top = side * rng.uniform(0.1, 0.18), side * rng.uniform(0.12, 0.5)
        shade = _near(rng, (120, 128, 145), 16)
        brush.rectangle((x, top, x + width, side), fill=shade)
        for y in np.arange(top + side * 0.04, side * 0.75, side * 0.08):
            for step in (0.25, 0.6):
                corner = x + step * width
                window = (corner, y, corner + side * 0.025, y + side * 0.035)
                brush.rectangle(window, fill=(240, 225, 150))
        x += width
    brush.rectangle((0, side * 0.78, side, side), fill=(85, 88, 95))


Painter = Callable[[np.random.Generator, ImageDraw.ImageDraw, int], None]
SCENES: dict[str, tuple[Painter, tuple[str, ...]]] = {
    "meadow": (_meadow, ("on grass", "in a meadow", "in a green field")),
    "beach": (_beach, ("on the beach", "at the beach", "by the sea")),
    "night": (_night, ("at night", "in the night sky", "under the stars")),
    "snow": (_snow, ("in the snow", "in a snowy field", "in winter")),
    "water": (_water, ("under water", "in the ocean")),
    "desert": (_desert, ("in the desert", "on sand dunes")),
    "forest": (_forest, ("in the forest", "in the woods")),
    "sunset": (_sunset, ("at sunset", "in front of a sunset")),
    "room": (_room, ("in a room", "at home")),
    "city": (_city, ("in the city", "on a city street")),
}


def _averaged(values: np.ndarray, size: int) -> np.ndarray:
    return values.reshape(size, _OVERSAMPLING, size, _OVERSAMPLING).mean(axis=(1, 3))


def _clip(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
