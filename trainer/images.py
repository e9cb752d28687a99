"""The folder of training images: what is used, what is not and why, as one tensor.

Images are judged by their content, never by their name; beside an image, `NAME.mask.png` says
where its subject is and `NAME.txt` what it shows. Nothing is ignored in silence: each file is
used, or among `skipped` with the reason.
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
from trainer.captions import BadCaption, read_captions
from trainer.companions import Companions
from trainer.errors import NoUsableImages
from trainer.masks import BadMask, open_mask, to_weights, transparency
from trainer.messages import first_line

# Only decoders that work in this process: Pillow would hand EPS files to an external program.
# Pillow before 11.3 does not know AVIF, and takes an unknown name here for an error.
Image.init()
FORMATS = tuple(
    name
    for name in ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
)

_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")


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
    # Where the subject is, 0 to 1, ones for an image without a mask; None: no image has one.
    masks: Float32[Tensor, "images 1 height width"] | None = None
    masked: tuple[str, ...] = ()  # the images that have a mask
    # For each image the templates that were written for it; none: those that all images share.
    captions: tuple[tuple[str, ...], ...] = ()

    @property
    def captioned(self) -> dict[str, bool]:
        """Which images have captions, by name."""
        captions = self.captions or ((),) * len(self.names)
        return {name: bool(own) for name, own in zip(self.names, captions, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Square:
    """One image as it is learned from."""

    pixels: UInt8[np.ndarray, "size size 3"]
    mask: Float32[np.ndarray, "size size"] | None
    captions: tuple[str, ...]
    side: int  # of the square that was cropped


class _Unusable(Exception):
    """Why one file is skipped."""


def read_images(folder: Path, *, size: int, placeholder_token: str | None = "{}") -> TrainingImages:
    """Read all images of a folder as squares of `size` pixels: centre crop, then Lanczos.

    EXIF orientation is honoured, transparency composited on white and taken for a mask, nothing
    squashed. `placeholder_token` is the word in captions, where they do not have `{}`; None leaves
    captions unread.
    Raises `NoUsableImages` if the folder is missing or nothing in it can be used.
    """
    paths = _files(folder)
    companions = Companions.among(paths)
    squares: dict[str, _Square] = {}
    skipped: list[SkippedFile] = []
    seen: dict[bytes, str] = {}
    for path in paths:
        try:
            if companions.holds(path):
                _refuse_idle(companions.idle(path, paths))
                continue
            square = _read_square(path, size, companions, placeholder_token)
            _refuse_duplicate(square.pixels, path.name, seen)
        except (_Unusable, BadMask, BadCaption) as reason:
            skipped.append(SkippedFile(name=path.name, reason=str(reason)))
            continue
        squares[path.name] = square
    if not squares:
        raise NoUsableImages(_nothing_usable(folder, skipped))
    return _collected(folder, squares, skipped, size)


def _collected(
    folder: Path, squares: dict[str, _Square], skipped: list[SkippedFile], size: int
) -> TrainingImages:
    masked = tuple(name for name, square in squares.items() if square.mask is not None)
    captions = tuple(square.captions for square in squares.values())
    return TrainingImages(
        pixels=_to_pixels(np.stack([square.pixels for square in squares.values()])),
        names=tuple(squares),
        sha256=tuple(sha256_of_file(folder / name) for name in squares),
        upscaled=tuple(name for name, square in squares.items() if square.side < size),
        skipped=tuple(skipped),
        masks=_to_masks(list(squares.values()), size) if masked else None,
        masked=masked,
        captions=captions if any(captions) else (),
    )


def _to_masks(squares: list[_Square], size: int) -> Float32[Tensor, "images 1 height width"]:
    whole = np.ones((size, size), np.float32)
    masks = [whole if square.mask is None else square.mask for square in squares]
    return torch.from_numpy(np.stack(masks))[:, None]


def _refuse_idle(reason: str | None) -> None:
    if reason is not None:
        raise _Unusable(reason)


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


def _read_square(
    path: Path, size: int, companions: Companions, placeholder_token: str | None
) -> _Square:
    """The image as a square of `size` pixels, with what its companions say of it."""
    if path.name.startswith("."):
        raise _Unusable("hidden file")
    if not path.is_file():
        raise _Unusable("not a regular file (only the folder itself is read, no subfolders)")
    picture, mask = _decode(path, companions.masks.get(path.stem))
    resized = Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS)
    return _Square(
        pixels=np.asarray(resized),
        mask=None if mask is None else to_weights(mask, size),
        captions=_read_captions(companions.captions.get(path.stem), placeholder_token),
        side=picture.shape[0],
    )


def _read_captions(path: Path | None, placeholder_token: str | None) -> tuple[str, ...]:
    """An image whose caption is wrong is not learned from as if it had none."""
    if path is None or placeholder_token is None:
        return ()
    try:
        return read_captions(path, placeholder_token)
    except BadCaption as error:
        raise BadCaption(f"its caption file {path.name}: {error}") from error


def _decode(path: Path, mask_path: Path | None) -> tuple[RgbImage, Image.Image | None]:
    """The upright image's centre, transparent parts white (black would be learned as a
    background), and the mask's centre.

    Raises `_Unusable` or `BadMask` with the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks of the decoders about odd metadata
            # Pillow only warns between one and two times its limit of pixels.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                _refuse_unusable(image)
                upright = ImageOps.exif_transpose(image)
                mask = open_mask(mask_path, upright.size) if mask_path else transparency(upright)
                return flatten(_centre(upright)), _centre(mask) if mask else None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS or 0
        raise _Unusable(f"more than {limit // 1_000_000} megapixels; scale it down") from None
    except UnidentifiedImageError:
        raise _Unusable(_unknown_format(path)) from None
    # Decoders raise SyntaxError, struct.error, zlib.error and more for broken files.
    except (_Unusable, BadMask, MemoryError):
        raise
    except Exception as error:
        raise _Unusable(f"broken image: {first_line(error)}") from error


def _unknown_format(path: Path) -> str:
    """What to do about a file that no decoder here knows: phones write HEIC."""
    with path.open("rb") as file:
        beginning = file.read(12)
    # ISO base media files name their brand behind "ftyp" (ISO/IEC 14496-12, section 4.3).
    brand = beginning[8:12] if beginning[4:8] == b"ftyp" else b""
    if brand in _HEIF_BRANDS:
        return "a HEIC or AVIF photo that Pillow cannot decode here; save or export it as JPEG"
    return f"not an image of a known format ({', '.join(FORMATS)})"


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
