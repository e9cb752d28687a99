"""Training pictures composed on the fly: objects on a background, a caption, and what is true.

Composition `index` of a seed is always the same picture, whoever composes it and in what order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from models.recipe import captions, scenes
from models.recipe.errors import RecipeError
from models.recipe.icons import Icon
from models.recipe.objects import COLOURS, OBJECT_COLOURS, plural, with_article

_SINGLE, _PAIR = 0.64, 0.26  # the rest shows two or three of one object

Box = tuple[int, int, int]  # left, top, side; pixels
Order = Literal["left", "right", "above"]  # where the first-named of a pair is


@dataclass(frozen=True, slots=True)
class Shown:
    """An object in a composition."""

    noun: str
    style: str
    colour: str | None  # repainted in this colour; None: as its set draws it
    box: Box
    count: int = 1  # how many of its noun the picture shows


@dataclass(frozen=True, slots=True)
class Composition:
    """A picture, its caption, and the facts that the caption was chosen from."""

    pixels: UInt8[np.ndarray, "size size 3"]
    caption: str
    shown: tuple[Shown, ...]
    background_kind: str
    background: str


class Composer:
    """Composes pictures of `size` pixels from icons."""

    def __init__(self, icons: Sequence[Icon], size: int, seed: int = 0) -> None:
        self.size = size
        self._seed = seed
        self.nouns = sorted({icon.noun for icon in icons})
        self.styles = sorted({icon.style for icon in icons})
        if len(self.nouns) < 2:
            raise RecipeError(f"compositions need two objects or more, got {self.nouns}")
        # Half again the largest object that is drawn: enough for a good reduction, quick to reduce.
        side = min(icons[0].pixels.shape[0], round(1.5 * size))
        self._icons = {
            (icon.noun, icon.style): Image.fromarray(icon.pixels).resize(
                (side, side), Image.Resampling.LANCZOS
            )
            for icon in icons
        }

    def compose(self, index: int) -> Composition:
        """The composition of this index."""
        rng = np.random.default_rng((self._seed, index))
        background = scenes.draw_background(rng, self.size)
        style = str(rng.choice(self.styles))
        shown, subject = self._subject(rng, style)
        where = background.phrase
        if background.name == "white" and rng.random() < 0.5:
            where = ""
        return Composition(
            self._painted(background, shown),
            captions.new_caption(rng, subject, style, where),
            shown,
            background.kind,
            background.name,
        )

    def show(
        self, noun: str, style: str, background: scenes.Background, scale: float = 0.8
    ) -> UInt8[np.ndarray, "size size 3"]:
        """One object in the middle of a given background, `scale` of the picture's side."""
        side = round(scale * self.size)
        corner = (self.size - side) // 2
        return self._painted(background, (Shown(noun, style, None, (corner, corner, side)),))

    def _subject(self, rng: np.random.Generator, style: str) -> tuple[tuple[Shown, ...], str]:
        """The objects, and the words for them."""
        draw = rng.random()
        if draw < _SINGLE:
            return self._single(rng, style)
        if draw < _SINGLE + _PAIR:
            return self._pair(rng, style)
        return self._several(rng, style)

    def _single(self, rng: np.random.Generator, style: str) -> tuple[tuple[Shown, ...], str]:
        noun = str(rng.choice(self.nouns))
        colour = _repainting(rng, 0.14)
        adjective = ""
        if rng.random() < 0.1:
            scale, adjective = rng.uniform(0.34, 0.5), "small"
        elif rng.random() < 0.12:
            scale, adjective = rng.uniform(0.86, 0.95), "large"
        else:
            scale = rng.uniform(0.62, 0.86)
        side = round(scale * self.size)
        reach = 0.5 * (self.size - side)
        left, top = (round(reach + rng.uniform(-0.8, 0.8) * reach) for _ in range(2))
        words = " ".join(word for word in (adjective, colour, noun) if word)
        subject = with_article(words, definite=rng.random() < 0.25)
        return (Shown(noun, style, colour, (left, top, side)),), subject

    def _pair(self, rng: np.random.Generator, style: str) -> tuple[tuple[Shown, ...], str]:
        nouns = [str(noun) for noun in rng.choice(self.nouns, 2, replace=False)]
        colours = [_repainting(rng, 0.1) for _ in range(2)]
        boxes, order = self._pair_of_boxes(rng)
        shown = tuple(
            Shown(noun, style, colour, box)
            for noun, colour, box in zip(nouns, colours, boxes, strict=True)
        )
        one, other = (
            with_article(f"{colour} {noun}" if colour else noun)
            for noun, colour in zip(nouns, colours, strict=True)
        )
        return shown, str(rng.choice(captions.relations(one, other, order)))

    def _pair_of_boxes(self, rng: np.random.Generator) -> tuple[list[Box], Order]:
        """Two boxes in two halves of the picture, and where the first of them is."""
        sides = [round(rng.uniform(0.42, 0.5) * self.size) for _ in range(2)]
        upright = rng.random() < 0.2
        along = [
            round(0.25 * self.size - side / 2 + rng.uniform(-0.02, 0.02) * self.size)
            for side in sides
        ]
        along[1] += self.size // 2
        across = [round((self.size - side) * (0.5 + rng.uniform(-0.3, 0.3))) for side in sides]
        swapped = bool(rng.random() < 0.3) and not upright
        if swapped:
            along = [along[0] + self.size // 2, along[1] - self.size // 2]
        lefts, tops = (across, along) if upright else (along, across)
        boxes = list(zip(lefts, tops, sides, strict=True))
        return boxes, "above" if upright else "right" if swapped else "left"

    def _several(self, rng: np.random.Generator, style: str) -> tuple[tuple[Shown, ...], str]:
        noun = str(rng.choice(self.nouns))
        colour = _repainting(rng, 0.1)
        count = int(rng.choice([2, 3]))
        side = round((0.46 if count == 2 else 0.32) * rng.uniform(0.92, 1.04) * self.size)
        pitch = self.size / count
        top = round((self.size - side) * (0.5 + rng.uniform(-0.25, 0.25)))
        item = Shown(noun, style, colour, (0, top, side), count)
        shown = tuple(
            replace(item, box=(round((place + 0.5) * pitch - side / 2), top, side))
            for place in range(count)
        )
        words = f"{colour} {plural(noun)}" if colour else plural(noun)
        return shown, f"{'two' if count == 2 else 'three'} {words}"

    def _painted(
        self, background: scenes.Background, shown: tuple[Shown, ...]
    ) -> UInt8[np.ndarray, "size size 3"]:
        canvas = Image.fromarray(np.array(background.pixels))
        for item in shown:
            left, top, side = item.box
            icon = self._icons[item.noun, item.style].resize(
                (side, side), Image.Resampling.BICUBIC, reducing_gap=2.0
            )
            if item.colour is not None:
                icon = repainted(icon, item.colour)
            canvas.paste(icon, (left, top), icon)
        return np.asarray(canvas)


def _repainting(rng: np.random.Generator, chance: float) -> str | None:
    """A colour to repaint an object in, or mostly none."""
    return str(rng.choice(OBJECT_COLOURS)) if rng.random() < chance else None


def repainted(icon: Image.Image, colour: str) -> Image.Image:
    """The icon in shades of one colour: lightness stays, all but black and white takes the hue."""
    pixels = np.asarray(icon).astype(np.float32)
    rgb, alpha = pixels[..., :3], pixels[..., 3:]
    light = rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32)[:, None] / 255
    target = np.array(COLOURS[colour], dtype=np.float32)
    # Black below, the colour itself at middle lightness, white above.
    shade = np.where(
        light < 0.6,
        target * np.clip(0.35 + 1.08 * light, 0, 1),
        target + (255 - target) * (light - 0.6) / 0.6,
    )
    painted = 0.88 * shade + 0.12 * rgb
    return Image.fromarray(np.concatenate([painted, alpha], axis=-1).clip(0, 255).astype(np.uint8))
