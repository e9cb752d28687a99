"""The icons: fetched from npm, rendered with resvg, packed into one file that training reads.

The pack is a zip of lossless WebP pictures with an `icons.json`; a machine without network or
resvg needs nothing else.
"""

import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from models.recipe.errors import RecipeError
from models.recipe.icon_sets import IconSet, read_groups, read_icon_set
from models.recipe.objects import HELD_OUT_OBJECTS, SMALL_OBJECTS, STYLES, is_concrete, noun_of
from trainer.messages import first_line

ICON_SIZE = 160  # pixels; the largest object of a 128 px composition is 122

_MAKE = "make it anew with: python -m models.recipe icons"


@dataclass(frozen=True, slots=True)
class Icon:
    """One object in one style."""

    slug: str
    noun: str
    style: str
    pixels: UInt8[np.ndarray, "height width 4"]  # RGBA, not premultiplied


def make_pack(path: Path, work_dir: Path) -> int:
    """Fetches the icon sets from npm into `work_dir` and writes the pack; returns its icon count.

    Errors:
        RecipeError: npm or resvg is missing, npm cannot reach the registry, or the disk is full.
    """
    groups = read_groups(work_dir)
    sets = {style.word: read_icon_set(style, work_dir) for style in STYLES}
    slugs = [slug for slug, group in groups.items() if is_concrete(slug, group)]
    slugs += [slug for slug in (*SMALL_OBJECTS, *HELD_OUT_OBJECTS) if slug not in slugs]
    drawn = [slug for slug in slugs if all(one.has(slug) for one in sets.values())]
    partial = path.with_suffix(".partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        count = _write_pack(partial, drawn, sets)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RecipeError(f"cannot write the icon pack {path}: {first_line(error)}") from error
    return count


def _write_pack(path: Path, slugs: list[str], sets: dict[str, IconSet]) -> int:
    index: list[dict[str, str]] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as pack:
        for slug in tqdm(slugs, desc="rendering icons", unit="object"):
            for style, icon_set in sets.items():
                picture = _webp(cropped(icon_set.render(slug, ICON_SIZE)))
                pack.writestr(f"{style}/{slug}.webp", picture)
                index.append({"slug": slug, "noun": noun_of(slug), "style": style})
        pack.writestr("icons.json", json.dumps(index, indent=0))
    return len(index)


def read_pack(path: Path, slugs: Sequence[str] | None = None) -> list[Icon]:
    """The icons of a pack: all, or those of some objects in the order of `slugs`.

    Nouns are those of today's `objects`, whatever the pack was made with.

    Errors:
        RecipeError: there is no pack, it is damaged, or it lacks an object or a style.
    """
    if not path.is_file():
        raise RecipeError(f"there is no icon pack at {path}; {_MAKE}")
    try:
        with zipfile.ZipFile(path) as pack:
            entries = [
                (str(entry["slug"]), str(entry["style"]))
                for entry in json.loads(pack.read("icons.json"))
            ]
            _check_pack(path, entries, slugs)
            order = {slug: place for place, slug in enumerate(slugs or sorted(dict(entries)))}
            wanted = [entry for entry in entries if entry[0] in order]
            wanted.sort(key=lambda entry: order[entry[0]])
            return [
                Icon(slug, noun_of(slug), style, _pixels(pack, slug, style))
                for slug, style in wanted
            ]
    # KeyError: an entry that is not there; Pillow's UnidentifiedImageError is an OSError
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"the icon pack {path} is damaged ({first_line(error)}); {_MAKE}"
        ) from error


def _check_pack(path: Path, entries: list[tuple[str, str]], slugs: Sequence[str] | None) -> None:
    """Refuses a pack of another version of the recipe."""
    packed = {slug for slug, _ in entries}
    missing = sorted({style.word for style in STYLES} - {style for _, style in entries})
    missing += [slug for slug in slugs or () if slug not in packed]
    if missing:
        raise RecipeError(f"the icon pack {path} lacks {', '.join(missing)}; {_MAKE}")


def _pixels(pack: zipfile.ZipFile, slug: str, style: str) -> UInt8[np.ndarray, "height width 4"]:
    with Image.open(io.BytesIO(pack.read(f"{style}/{slug}.webp"))) as image:
        return np.array(image.convert("RGBA"))


def cropped(image: Image.Image) -> Image.Image:
    """The icon without its margins, centred in a square: sizes in captions then mean the same.

    Errors:
        RecipeError: nothing is to be seen in it.
    """
    visible = np.asarray(image.getchannel("A")) > 8
    box = Image.fromarray(visible).getbbox()
    if box is None:
        raise RecipeError("an icon rendered to nothing; is resvg-py of the pinned version?")
    cut = image.crop(box)
    side = max(cut.size)
    square = Image.new("RGBA", (side, side))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return square


def _webp(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "WEBP", lossless=True, quality=100, method=4)
    return stream.getvalue()
