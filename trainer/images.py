"""The folder of training images: what is used, what is not and why, as one tensor.

Every file is judged by its content, never by its name. Nothing is ignored in silence: each file is
either among `names` or among `skipped`, with the reason.
"""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from engine.files import sha256_of_file
from engine.images import flatten
from engine.requests import RgbImage
from trainer.errors import NoUsableImages

# Only decoders that work in this process: Pillow would hand EPS files to an external program.
# Pillow before 11.3 does not know AVIF, and takes an unknown name here for an error.
Image.init()
FORMATS = tuple(
    name
    for name in ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedFile:
    """A file that is not learned from."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingImages:
    """The images of one concept, in the order of their file names."""

    pixels: Float32[Tensor, "images 3 height width"]  # in [-1, 1]
    names: tuple[str, ...]
    sha256: tuple[str, ...]  # of the files, as hex
    upscaled: tuple[str, ...]  # used, but smaller than the model's size: they will look soft
    skipped: tuple[SkippedFile, ...]


class _Unusable(Exception):
    """Why one file is skipped."""


def read_images(folder: Path, *, size: int) -> TrainingImages:
    """Read all images of a folder as squares of `size` pixels: centre crop, then Lanczos.

    EXIF orientation is honoured, transparency composited on white, nothing squashed.
    Raises `NoUsableImages` if the folder is missing or nothing in it can be used.
    """
    squares: dict[str, UInt8[np.ndarray, "size size 3"]] = {}
    upscaled: list[str] = []
    skipped: list[SkippedFile] = []
    seen: dict[bytes, str] = {}
    for path in _files(folder):
        try:
            square, side = _read_square(path, size)
            _refuse_duplicate(square, path.name, seen)
        except _Unusable as reason:
            skipped.append(SkippedFile(name=path.name, reason=str(reason)))
            continue
        squares[path.name] = square
        if side < size:
            upscaled.append(path.name)
    if not squares:
        raise NoUsableImages(_nothing_usable(folder, skipped))
    return TrainingImages(
        pixels=_to_pixels(np.stack(list(squares.values()))),
        names=tuple(squares),
        sha256=tuple(sha256_of_file(folder / name) for name in squares),
        upscaled=tuple(upscaled),
        skipped=tuple(skipped),
    )


def _files(folder: Path) -> list[Path]:
    """The entries of the folder by name, so that a run does not depend on the file system."""
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise NoUsableImages(f"cannot read the image folder {folder}: {error.strerror}") from error


def _nothing_usable(folder: Path, skipped: list[SkippedFile]) -> str:
    reasons = "; ".join(f"{file.name}: {file.reason}" for file in skipped[:3])
    return (
        f"no usable image in {folder} ({len(skipped)} files skipped{': ' if reasons else ''}"
        f"{reasons}); put 3 to 5 photos of the same thing there, as JPEG, PNG or WebP"
    )


def _read_square(path: Path, size: int) -> tuple[UInt8[np.ndarray, "size size 3"], int]:
    """The image as a square of `size` pixels, and the side of the square that was cropped."""
    if path.name.startswith("."):
        raise _Unusable("hidden file")
    if not path.is_file():
        raise _Unusable("not a regular file (only the folder itself is read, no subfolders)")
    picture = _decode_square(path)
    side = picture.shape[0]
    square = Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(square), side


def _decode_square(path: Path) -> RgbImage:
    """The upright image's centre, transparent parts white: black would be learned as a background.

    Raises `_Unusable` with the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks of the decoders about odd metadata
            # Pillow only warns between one and two times its limit of pixels.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                _refuse_unusable(image)
                return flatten(_centre(ImageOps.exif_transpose(image)))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS or 0
        raise _Unusable(f"more than {limit // 1_000_000} megapixels; scale it down") from None
    except UnidentifiedImageError:
        raise _Unusable(f"not an image of a known format ({', '.join(FORMATS)})") from None
    # Decoders raise SyntaxError, struct.error, zlib.error and more for broken files.
    except (_Unusable, MemoryError):
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise _Unusable(f"broken image: {reason}") from error


def _centre(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _refuse_unusable(image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    # A camera's MPO is a JPEG with a preview or a second view behind the photo.
    if frames > 1 and image.format != "MPO":
        raise _Unusable(f"animated or of several pages ({frames}); save one frame as an image")
    # Pillow reads 16-bit PGM as mode I, with white at 65535; nothing says that of a TIFF.
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise _Unusable(f"{image.mode} pixels have no known range; save it as 8-bit RGB")


def _refuse_duplicate(
    square: UInt8[np.ndarray, "size size 3"], name: str, seen: dict[bytes, str]
) -> None:
    first = seen.setdefault(hashlib.sha256(square.tobytes()).digest(), name)
    if first != name:
        raise _Unusable(f"same pixels as {first}")


def _to_pixels(
    squares: UInt8[np.ndarray, "images height width 3"],
) -> Float32[Tensor, "images 3 height width"]:
    pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous()
    return pixels.to(torch.float32) / 127.5 - 1.0
