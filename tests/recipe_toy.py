"""The recipe in a size for tests: drawn shapes for icons, and a setting that trains in seconds."""

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from models.recipe.icons import Icon, read_pack
from models.recipe.objects import HELD_OUT_OBJECTS, STYLES
from models.recipe.settings import TOY, Setting
from models.recipe.stages import Recipe

SLUGS = ("dog-face", "red-apple", "grapes", "mouse-face")  # one plain, a vowel, two odd plurals
UNSEEN = HELD_OUT_OBJECTS[0]

TINY: Setting = replace(
    TOY,
    name="tiny",
    image_size=32,
    slugs=SLUGS,
    warmup_images=16,
    autoencoder_channels=(8, 16, 16),
    autoencoder_groups=1,
    autoencoder_crop=16,
    autoencoder_images=400,
    autoencoder_batch=8,
    vocabulary_size=700,
    text_width=16,
    denoiser_channels=(16, 16),
    denoiser_images=64,
    denoiser_batch=8,
    pool_images=64,
)


def write_pack(path: Path) -> Path:
    """A pack of four objects and a held-out one in every style, each another shape and colour."""
    index: list[dict[str, str]] = []
    with zipfile.ZipFile(path, "w") as pack:
        for row, slug in enumerate((*SLUGS, UNSEEN)):
            for column, style in enumerate(STYLES):
                stream = io.BytesIO()
                _shape(row, (60 + 40 * column, 40 + 40 * row, 90)).save(
                    stream, "WEBP", lossless=True
                )
                pack.writestr(f"{style.word}/{slug}.webp", stream.getvalue())
                index.append({"slug": slug, "noun": slug, "style": style.word})
        pack.writestr("icons.json", json.dumps(index))
    return path


def toy_icons(folder: Path) -> list[Icon]:
    """All icons of the toy pack, the held-out ones too."""
    return read_pack(write_pack(folder / "icons.zip"))


def tiny_recipe(folder: Path, setting: Setting = TINY) -> Recipe:
    """The recipe on the toy pack."""
    pack = folder / "icons.zip"
    if not pack.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_pack(pack)
    return Recipe(
        setting=setting, folder=folder / setting.name, pack=pack, device=torch.device("cpu")
    )


def _shape(kind: int, colour: tuple[int, int, int]) -> Image.Image:
    """A disc, a square, a triangle, a ring or a cross that touches all four sides."""
    image = Image.new("RGBA", (48, 48))
    brush = ImageDraw.Draw(image)
    full = (0, 0, 47, 47)
    if kind == 0:
        brush.ellipse(full, fill=colour)
    elif kind == 1:
        brush.rectangle(full, fill=colour)
    elif kind == 2:
        brush.polygon([(0, 47), (24, 0), (47, 47)], fill=colour)
    elif kind == 3:
        brush.ellipse(full, outline=colour, width=12)
    else:
        brush.rectangle((18, 0, 29, 47), fill=colour)
        brush.rectangle((0, 18, 47, 29), fill=colour)
    return image
