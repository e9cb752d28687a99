"""Masks: where in an image the subject is. Only there is the denoiser's error counted.

A mask is an image's own transparency, or a grey picture beside it: `cat.mask.png` for `cat.jpg`,
white where the subject is (`cat-masklabel.png`, as OneTrainer writes it, is read too).
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from trainer.messages import first_line

SUFFIXES = (".mask.png", "-masklabel.png")
_LEAST_SHARE = 0.002  # of the square: less is a mistake, or nothing that can be learned from

Levels = UInt8[np.ndarray, "height width"]


class BadMask(Exception):
    """Why a mask cannot be used."""


def masked_stem(name: str) -> str | None:
    """`cat` for `cat.mask.png`; None for a file that is no mask."""
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return None


def transparency(image: Image.Image) -> Image.Image | None:
    """The alpha channel of an image of any mode, or None if all of it is opaque."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return alpha if int(np.asarray(alpha).min()) < 255 else None


def open_mask(path: Path, image_size: tuple[int, int]) -> Image.Image:
    """The mask of an upright image of `image_size` (width, height), as levels of grey.

    Errors:
        BadMask: it is broken, or of another size.
    """
    try:
        with Image.open(path, formats=("PNG",)) as opened:
            mask = ImageOps.exif_transpose(opened).convert("L")
    except Exception as error:  # decoders raise SyntaxError, struct.error, zlib.error and more
        raise BadMask(f"its mask {path.name} is broken: {first_line(error)}") from error
    if mask.size != image_size:
        raise BadMask(
            f"its mask {path.name} is {mask.width} x {mask.height}, the upright image "
            f"{image_size[0]} x {image_size[1]}; they must be the same size"
        )
    return mask


def to_weights(mask: Image.Image, size: int) -> Float32[np.ndarray, "size size"]:
    """A square mask at the model's size, from 0 to 1, averaged.

    Errors:
        BadMask: it shows next to nothing.
    """
    small = mask.resize((size, size), Image.Resampling.BOX)
    weights = np.asarray(small, dtype=np.float32) / 255.0
    if weights.mean() < _LEAST_SHARE:
        raise BadMask(
            f"its mask shows {100 * weights.mean():.2f} % of the square that is learned from, at "
            f"least {100 * _LEAST_SHARE:.1f} % must be white there; mark the subject, or delete it"
        )
    return weights
