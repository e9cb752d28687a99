"""The images that words are taught from: held-out objects, and a held-out style, on backgrounds."""

import itertools
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from models.recipe import scenes
from models.recipe.errors import RecipeError
from models.recipe.icon_sets import IconSet, read_icon_set
from models.recipe.icons import cropped
from models.recipe.objects import HELD_OUT_STYLE, STYLES, Style
from models.recipe.sheets import save_sheet
from trainer.messages import first_line

SIZE = 256  # pixels
_RENDERED = 512  # pixels; larger than any object, so that it is only ever reduced

# One set each, in three styles that the model knows.
OBJECT_STYLES = {
    "crown": "noto",
    "fox": "noto",
    "guitar": "noto",
    "owl": "noto",
    "teapot": "noto",
    "octopus": "twemoji",
    "rocket": "twemoji",
    "sunflower": "twemoji",
    "tractor": "twemoji",
    "pineapple": "flat",
    "snail": "flat",
    "teddy-bear": "flat",
}
# Objects that the model knows, in the style that it does not: what they share is the style.
STYLE_OBJECTS = ("dog-face", "red-apple", "house", "bicycle", "umbrella")
# Not the colours that most of the objects have.
_PLAIN = ("beige", "gray", "pink", "turquoise")
_SCENES = ("meadow", "beach", "snow", "desert", "room", "sunset", "city", "forest")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an object stands; shares of the picture's side."""

    scale: float
    centre: tuple[float, float]
    background: str  # "white", "plain", "pattern" or "scene"


# Different in size, place and background: what stays the same is the object.
_PLACES = (
    _Place(0.86, (0.50, 0.50), "white"),
    _Place(0.58, (0.62, 0.42), "plain"),
    _Place(0.72, (0.42, 0.56), "scene"),
    _Place(0.48, (0.36, 0.40), "plain"),
    _Place(0.66, (0.56, 0.58), "pattern"),
)


def draw_concepts(target: Path, work_dir: Path) -> None:
    """Writes a folder of five images for each concept, a README, and a sheet of all of them.

    Errors:
        RecipeError: an icon set cannot be fetched or drawn, or the folder cannot be written.
    """
    by_word = {style.word: style for style in STYLES}
    sets = {word: read_icon_set(style, work_dir) for word, style in by_word.items()}
    concepts = {
        slug: draw_concept(slug, [(sets[style], slug)] * len(_PLACES))
        for slug, style in OBJECT_STYLES.items()
    }
    unknown = sets[HELD_OUT_STYLE]
    concepts[HELD_OUT_STYLE] = draw_concept(
        HELD_OUT_STYLE, [(unknown, slug) for slug in STYLE_OBJECTS]
    )
    try:
        for name, pictures in concepts.items():
            _save(pictures, target / name)
        (target / "README.md").write_text(_readme(by_word), encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot write {target}: {first_line(error)}") from error
    save_sheet(np.concatenate(list(concepts.values())), target / "sheet.png", len(_PLACES), zoom=1)


def draw_concept(
    name: str, icons: list[tuple[IconSet, str]]
) -> UInt8[np.ndarray, "images size size 3"]:
    """One image a place; the same name always gives the same images."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    colours = itertools.cycle(str(colour) for colour in rng.permutation(_PLAIN))
    pictures: list[UInt8[np.ndarray, "size size 3"]] = []
    for (icon_set, slug), place, colour in zip(icons, _PLACES, colours, strict=False):
        canvas = Image.fromarray(np.array(_background(rng, place.background, colour).pixels))
        side = round(place.scale * SIZE)
        icon = cropped(icon_set.render(slug, _RENDERED)).resize(
            (side, side), Image.Resampling.LANCZOS
        )
        left, top = (round(centre * SIZE - side / 2) for centre in place.centre)
        canvas.paste(icon, (left, top), icon)
        pictures.append(np.asarray(canvas))
    return np.stack(pictures)


def _background(rng: np.random.Generator, kind: str, colour: str) -> scenes.Background:
    if kind == "pattern":
        return scenes.pattern(rng, SIZE)
    if kind == "scene":
        return scenes.scene(rng, SIZE, str(rng.choice(_SCENES)))
    return scenes.plain(rng, SIZE, "white" if kind == "white" else colour)


def _save(pictures: UInt8[np.ndarray, "images size size 3"], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for place, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{place}.png", optimize=True)


def _readme(by_word: dict[str, Style]) -> str:
    sources = "\n".join(
        f"| {', '.join(name for name, of in OBJECT_STYLES.items() if of == word)} "
        f"| {by_word[word].author} | `{by_word[word].package}` {by_word[word].version} "
        f"| {by_word[word].licence} |"
        for word in dict.fromkeys(OBJECT_STYLES.values())
    )
    style = by_word[HELD_OUT_STYLE]
    known = ", ".join(slug.removesuffix("-face").replace("-", " ") for slug in STYLE_OBJECTS)
    return f"""\
# Words to teach: twelve objects and one style that the embedded model has never seen

Five images each, {SIZE} px, of different size and place, on white, two plain colours, a pattern and
a drawn scene. Made by `python -m models.recipe concepts` from open vector emoji:

| objects | by | npm package | licence |
|---|---|---|---|
{sources}

These names, in every style, stay out of the training data of any embedded model; so does the style
below.

## {style.word}

`{style.word}` is a style, not an object: {known}, each drawn by {style.author}
(`{style.package}` {style.version}). The drawings are licensed {style.licence}, and so are these
five images, which were scaled and set on backgrounds: whoever passes on a changed version does so
under the same licence. No other file of this project is made from them.

CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/
CC-BY-SA-4.0: https://creativecommons.org/licenses/by-sa/4.0/
"""
