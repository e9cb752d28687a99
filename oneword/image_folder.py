"""A folder of training images as what is sent to a server: read by the trainer's rules, as files.

Pixels are the server's to judge; nothing here needs PyTorch.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InvalidRequest
from engine.images import check_image_file
from engine.training.spec import MAX_IMAGE_PIXELS
from trainer.captions import BadCaption, read_captions
from trainer.companions import Companions
from trainer.errors import NoUsableImages


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFolder:
    """The images of one word with their masks and captions, by the names of the images."""

    images: dict[str, bytes]
    masks: dict[str, bytes]
    captions: dict[str, str]
    skipped: dict[str, str]  # by name of file: why it is not sent


class _Unusable(Exception):
    """Why one file is not sent."""


def read_image_folder(folder: Path, placeholder_token: str) -> ImageFolder:
    """Read a folder; what is of no use is left out, with the reason.

    Errors:
        NoUsableImages: the folder cannot be read, or nothing in it can be sent.
    """
    paths = _files(folder)
    companions = Companions.among(paths)
    found = ImageFolder(images={}, masks={}, captions={}, skipped={})
    for path in paths:
        try:
            if companions.holds(path):
                if reason := companions.idle(path, paths):
                    raise _Unusable(reason)
                continue
            _add(found, path, companions, placeholder_token)
        except (_Unusable, InvalidRequest) as reason:
            found.skipped[path.name] = str(reason)
        except OSError as error:
            found.skipped[path.name] = f"it cannot be read: {error.strerror}"
    if not found.images:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(found.skipped.items())[:3])
        raise NoUsableImages(
            f"no usable image in {folder} ({len(found.skipped)} files skipped"
            f"{': ' if reasons else ''}{reasons}); put 3 to 5 photos of the same thing there, as "
            "JPEG, PNG or WebP"
        )
    return found


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise NoUsableImages(f"cannot read the image folder {folder}: {error.strerror}") from error


def _add(found: ImageFolder, path: Path, companions: Companions, placeholder_token: str) -> None:
    """Take an image with all that belongs to it, or nothing of it."""
    _refuse_odd(path)
    check_image_file(path, max_pixels=MAX_IMAGE_PIXELS)
    image = path.read_bytes()
    mask = _read_mask(companions.masks.get(path.stem))
    captions = _read_captions(companions.captions.get(path.stem), placeholder_token)
    found.images[path.name] = image
    if mask is not None:
        found.masks[path.name] = mask
    if captions is not None:
        found.captions[path.name] = captions


def _refuse_odd(path: Path) -> None:
    if path.name.startswith("."):
        raise _Unusable("hidden file")
    if not path.is_file():
        raise _Unusable("not a regular file (only the folder itself is read, no subfolders)")
    if not os.access(path, os.R_OK):
        raise _Unusable("it must not be read; see to its permissions")
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise _Unusable("its name is not UTF-8, so it cannot be sent; rename it") from None


def _read_mask(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        check_image_file(path, max_pixels=MAX_IMAGE_PIXELS, formats=("PNG",))
        return path.read_bytes()
    except InvalidRequest as error:
        raise _Unusable(f"its mask {path.name}: {error}") from error
    except OSError as error:
        raise _Unusable(f"its mask {path.name} cannot be read: {error.strerror}") from error


def _read_captions(path: Path | None, placeholder_token: str) -> str | None:
    """The text of a caption file that the trainer would take."""
    if path is None:
        return None
    try:
        read_captions(path, placeholder_token)
    except BadCaption as error:
        raise _Unusable(f"its caption file {path.name}: {error}") from error
    return path.read_text("utf-8-sig")
