"""Training pictures of the recipe: the same for the same index, true to their captions, and clean.

Clean: no held-out object and no held-out style in any picture that a training composes.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from models.recipe import scenes
from models.recipe.compositions import Composer, Composition, repainted
from models.recipe.concepts import OBJECT_STYLES, STYLE_OBJECTS, draw_concept
from models.recipe.errors import RecipeError
from models.recipe.icons import Icon, cropped, read_pack
from models.recipe.objects import (
    BASE_OBJECTS,
    COLOURS,
    HELD_OUT_OBJECTS,
    HELD_OUT_STYLE,
    OBJECT_COLOURS,
    SMALL_OBJECTS,
    STYLES,
    TRAINING_STYLES,
    noun_of,
    plural,
    with_article,
)
from models.recipe.settings import SETTINGS
from models.recipe.stages import for_training
from tests.recipe_toy import SLUGS, UNSEEN, tiny_recipe, toy_icons, write_pack

COUNT = 500  # compositions: each relation is met a dozen times


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> list[Icon]:
    return toy_icons(tmp_path_factory.mktemp("pack"))


@pytest.fixture(scope="module")
def composer(icons: list[Icon]) -> Composer:
    return Composer(for_training(icons), 64)


@pytest.fixture(scope="module")
def compositions(composer: Composer) -> list[Composition]:
    return [composer.compose(index) for index in range(COUNT)]


def test_a_composition_depends_on_its_index_alone(
    icons: list[Icon], compositions: list[Composition]
) -> None:
    fresh = Composer(list(reversed(for_training(icons))), 64)
    for index in (17, 3, 400, 3):
        again = fresh.compose(index)
        np.testing.assert_array_equal(again.pixels, compositions[index].pixels)
        assert again.caption == compositions[index].caption
        assert again.shown == compositions[index].shown


def test_another_seed_composes_others(icons: list[Icon], compositions: list[Composition]) -> None:
    other = Composer(for_training(icons), 64, seed=1)
    assert other.compose(0).caption != compositions[0].caption


def test_captions_say_what_is_shown(compositions: list[Composition]) -> None:
    for composition in compositions:
        for item in composition.shown:
            noun = item.noun if item.count == 1 else plural(item.noun)
            words = f"{item.colour} {noun}" if item.colour else noun
            assert words in composition.caption, composition.caption
        named = [word for word in ("two", "three") if word in composition.caption.split()]
        count = composition.shown[0].count
        assert named == {1: [], 2: ["two"], 3: ["three"]}[count], composition.caption
        assert count in (1, len(composition.shown))


def test_captions_name_no_object_that_is_not_shown(compositions: list[Composition]) -> None:
    for composition in compositions:
        shown = {item.noun for item in composition.shown}
        for noun in set(map(noun_of, SLUGS)) - shown:
            said = re.search(rf"\b({noun}|{plural(noun)})\b", composition.caption)
            assert not said, composition.caption


def test_captions_name_only_the_style_and_the_background_that_are_there(
    compositions: list[Composition],
) -> None:
    unnamed = 0
    for composition in compositions:
        caption = composition.caption
        (style,) = {item.style for item in composition.shown}
        named = {word for word in TRAINING_STYLES if re.search(rf"\b{word}\b", caption)}
        assert named <= {style}, caption
        if composition.background_kind == "plain":
            place = rf"(on|in front of) (a )?{composition.background}( background| wall)?\b"
            if not re.search(place, caption):
                assert composition.background == "white", caption
                unnamed += 1
        elif composition.background_kind == "pattern":
            assert f"{composition.background} background" in caption
        else:
            phrases = scenes.SCENES[composition.background][1]
            assert any(phrase in caption for phrase in phrases), caption
    assert 0 < unnamed < 0.3 * COUNT


def test_relations_agree_with_the_boxes(compositions: list[Composition]) -> None:
    seen: Counter[str] = Counter()
    for composition in compositions:
        caption = composition.caption
        if len(composition.shown) != 2 or composition.shown[0].count > 1:
            continue
        (one, other) = ((left, top) for left, top, _ in (s.box for s in composition.shown))
        first, second = (item.noun for item in composition.shown)
        assert caption.index(first) < caption.index(second) or first in second
        if "above" in caption or "on top of" in caption:
            seen["above"] += 1
            assert one[1] < other[1], caption
        elif "to the right of" in caption or "on the right of" in caption:
            seen["right"] += 1
            assert one[0] > other[0], caption
        else:
            seen["left"] += 1
            assert one[0] < other[0], caption
    assert min(seen.values()) > 10 and len(seen) == 3


def test_objects_are_painted_inside_their_boxes_and_nowhere_else(
    compositions: list[Composition],
) -> None:
    for index, composition in enumerate(compositions[:100]):
        # The background is what the generator of this index draws first.
        background = scenes.draw_background(np.random.default_rng((0, index)), 64).pixels
        changed = (composition.pixels != background).any(axis=-1)
        for left, top, side in (item.box for item in composition.shown):
            inside = np.s_[max(top, 0) : top + side, max(left, 0) : left + side]
            # The thinnest shape, a ring of 3 pixels, covers over a third of its box.
            assert changed[inside].mean() > 0.3
        for left, top, side in (item.box for item in composition.shown):
            changed[max(top, 0) : top + side, max(left, 0) : left + side] = False
        assert not changed.any()


@pytest.mark.parametrize("colour", OBJECT_COLOURS)
def test_repainted_things_have_the_colour_that_the_caption_says(colour: str) -> None:
    icon = Image.new("RGBA", (8, 8), (110, 150, 130, 255))
    painted = np.asarray(repainted(icon, colour))
    palette = np.array([COLOURS[name] for name in OBJECT_COLOURS], dtype=float)
    distances = np.linalg.norm(palette - painted[..., :3].mean(axis=(0, 1)), axis=1)
    assert OBJECT_COLOURS[int(distances.argmin())] == colour
    assert (painted[..., 3] == 255).all()


@pytest.mark.parametrize("kind", ["striped", "checkered", "dotted"])
def test_patterns_are_made_of_the_two_colours_that_are_named(kind: str) -> None:
    drawn = (scenes.pattern(np.random.default_rng(seed), 64) for seed in range(40))
    found = next(background for background in drawn if background.name == kind)
    first, second = re.findall(r"\b(" + "|".join(COLOURS) + r")\b", found.phrase)
    pixels = found.pixels.reshape(-1, 3)
    for name in (first, second):
        # Edges are averaged, so a quarter of the pixels in the plain colour is enough.
        assert (pixels == COLOURS[name]).all(axis=1).mean() > 0.15, found.phrase


def test_no_held_out_object_or_style_is_ever_composed(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    packed = read_pack(recipe.pack)
    assert UNSEEN in {icon.slug for icon in packed}
    assert HELD_OUT_STYLE in {icon.style for icon in packed}
    for every_object in (False, True):
        composer = recipe.composer(every_object=every_object)
        assert noun_of(UNSEEN) not in composer.nouns
        assert set(composer.styles) == set(TRAINING_STYLES)
    kept = for_training(packed)
    assert len(kept) == len(SLUGS) * len(TRAINING_STYLES)
    assert not {icon.slug for icon in kept} & set(HELD_OUT_OBJECTS)


def test_settings_name_no_held_out_object() -> None:
    for setting in SETTINGS.values():
        assert not set(setting.slugs) & set(HELD_OUT_OBJECTS)
        assert not {noun_of(slug) for slug in setting.slugs} & {
            noun_of(slug) for slug in HELD_OUT_OBJECTS
        }
    assert HELD_OUT_STYLE not in TRAINING_STYLES
    assert len(TRAINING_STYLES) == len(STYLES) - 1


def test_every_object_has_a_noun_of_its_own() -> None:
    nouns = Counter(BASE_OBJECTS.values())
    assert max(nouns.values()) == 1
    assert not set(nouns) & {*COLOURS, *TRAINING_STYLES}, "captions would be ambiguous"
    # A plural that is another object's noun would be, too.
    assert not {plural(noun) for noun in nouns if plural(noun) != noun} & set(nouns)
    assert BASE_OBJECTS.items() >= SMALL_OBJECTS.items()
    assert {BASE_OBJECTS[slug] for slug in SMALL_OBJECTS} == set(SMALL_OBJECTS.values())


@pytest.mark.parametrize(
    ("noun", "one", "many"),
    [
        ("dog", "a dog", "dogs"),
        ("apple", "an apple", "apples"),
        ("unicorn", "a unicorn", "unicorns"),
        ("umbrella", "an umbrella", "umbrellas"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("grapes", "grapes", "grapes"),
        ("french fries", "french fries", "french fries"),
        ("toilet paper", "toilet paper", "toilet paper"),
        ("ice cream", "an ice cream", "ice cream"),
        ("mouse", "a mouse", "mice"),
        ("maple leaf", "a maple leaf", "maple leaves"),
        ("strawberry", "a strawberry", "strawberries"),
        ("monkey", "a monkey", "monkeys"),
        ("toothbrush", "a toothbrush", "toothbrushes"),
    ],
)
def test_articles_and_plurals(noun: str, one: str, many: str) -> None:
    assert with_article(noun) == one
    assert with_article(noun, definite=True) == f"the {noun}"
    assert plural(noun) == many


def test_an_icon_is_cut_to_what_is_seen_of_it() -> None:
    image = Image.new("RGBA", (40, 40))
    image.paste((200, 10, 10, 255), (10, 20, 30, 26))
    square = np.asarray(cropped(image))
    assert square.shape == (20, 20, 4)
    rows = np.flatnonzero(square[..., 3].max(axis=1))
    assert rows.tolist() == list(range(7, 13))
    with pytest.raises(RecipeError, match="rendered to nothing"):
        cropped(Image.new("RGBA", (40, 40)))


def test_a_pack_that_is_missing_cut_off_or_of_another_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "icons.zip"
    with pytest.raises(RecipeError, match="no icon pack at .*models.recipe icons"):
        read_pack(path)
    whole = write_pack(path).read_bytes()
    with pytest.raises(RecipeError, match="lacks unicorn; make it anew"):
        read_pack(path, ["dog-face", "unicorn"])
    assert [icon.slug for icon in read_pack(path, SLUGS)][:: len(STYLES)] == list(SLUGS)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecipeError, match="is damaged .*make it anew"):
        read_pack(path)
    damaged = bytearray(whole)
    damaged[200:260] = bytes(60)
    path.write_bytes(damaged)
    with pytest.raises(RecipeError, match="is damaged .*make it anew"):
        read_pack(path)


class DiscSet:
    """An emoji set that draws a red disc for everything."""

    def render(self, slug: str, size: int) -> Image.Image:
        image = Image.new("RGBA", (size, size))
        ImageDraw.Draw(image).ellipse((4, 4, size - 5, size - 5), fill=(230, 20, 20, 255))
        return image


def test_a_concept_shows_its_object_in_five_places_on_five_backgrounds() -> None:
    discs: Any = DiscSet()
    images = draw_concept("fox", [(discs, "fox")] * 5)
    np.testing.assert_array_equal(images, draw_concept("fox", [(discs, "fox")] * 5))
    red = (images == (230, 20, 20)).all(axis=-1)
    areas = red.mean(axis=(1, 2))
    assert len(set(areas.round(2))) == 5 and areas.min() > 0.1
    centres = {tuple(np.argwhere(one).mean(axis=0).round(-1)) for one in red}
    assert len(centres) == 5
    corners = [tuple(one[2, 2]) for one in images]
    assert corners[0] == (255, 255, 255)
    colours = [len(np.unique(one[~seen], axis=0)) for one, seen in zip(images, red, strict=True)]
    # Edges of the disc are blends: a plain background has few other colours, a scene has many.
    assert colours[2] > colours[1] and len(set(corners[:2] + corners[3:4])) == 3


def test_concepts_are_what_no_training_sees() -> None:
    assert set(OBJECT_STYLES) == set(HELD_OUT_OBJECTS)
    assert set(OBJECT_STYLES.values()) < set(TRAINING_STYLES)
    assert set(STYLE_OBJECTS) <= set(SMALL_OBJECTS)


def test_one_object_is_not_enough(icons: list[Icon]) -> None:
    with pytest.raises(RecipeError, match="two objects or more"):
        Composer([icon for icon in icons if icon.slug == SLUGS[0]], 64)
