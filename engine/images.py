"""Images as bytes: PNG and WebP out, with the request's parameters inside; initial images in."""

import io
import json
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image, ImageOps, PngImagePlugin

from engine.errors import InvalidRequest
from engine.requests import RgbImage

ImageFormat = Literal["png", "webp"]
MAX_INPUT_PIXELS = 4096 * 4096
PARAMETERS_KEY = "oneword"
_EXIF_USER_COMMENT = 0x9286
_EXIF_IFD = 0x8769
_ACCEPTED_FORMATS = ("PNG", "JPEG", "WEBP")
# The modes of 16-bit grey that decoders use; Pillow itself clips them at 255 instead of scaling.
_SIXTEEN_BIT_GREY = ("I;16", "I;16L", "I;16B", "I")
_EIGHT_BIT_LEVELS = [(level + 128) // 257 for level in range(65536)]
# What the decoders and the readers of Exif raise for damaged files, found by feeding them such.
_DECODER_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    struct.error,
    zlib.error,
)


def to_uint8(images: Float32[np.ndarray, "batch 3 height width"]) -> list[RgbImage]:
    """Decoder output in [-1, 1] -> 8-bit RGB, rounded as diffusers' `VaeImageProcessor` does."""
    scaled = (np.clip(images * 0.5 + 0.5, 0.0, 1.0) * 255.0).round().astype(np.uint8)
    return list(np.ascontiguousarray(scaled.transpose(0, 2, 3, 1)))


def resize(image: RgbImage, width: int, height: int) -> UInt8[np.ndarray, "height_out width_out 3"]:
    """An image at another size, by Lanczos as diffusers does."""
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized)


def to_float(image: RgbImage) -> Float32[np.ndarray, "1 3 height width"]:
    """8-bit RGB -> encoder input in [-1, 1]."""
    return (image.astype(np.float32) / 255.0 * 2.0 - 1.0).transpose(2, 0, 1)[None]


def encode_image(
    image: RgbImage, image_format: ImageFormat = "png", parameters: Mapping[str, Any] | None = None
) -> bytes:
    """The bytes of an image file with `parameters` (JSON) as a text chunk, or as Exif in WebP."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    text = json.dumps(parameters, sort_keys=True) if parameters is not None else None
    if image_format == "png":
        chunks = PngImagePlugin.PngInfo()
        if text is not None:
            chunks.add_itxt(PARAMETERS_KEY, text)
        picture.save(buffer, "PNG", pnginfo=chunks)
    else:
        picture.save(buffer, "WEBP", quality=90, method=4, exif=_exif(text))
    return buffer.getvalue()


def _exif(text: str | None) -> bytes:
    exif = Image.Exif()
    if text is not None:
        exif.get_ifd(_EXIF_IFD)[_EXIF_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif.tobytes()


def read_parameters(content: bytes) -> dict[str, Any] | None:
    """The parameters that `encode_image` put into an image file, or None."""
    with Image.open(io.BytesIO(content)) as image:
        if image.format == "PNG":
            image.load()
            text = getattr(image, "text", {}).get(PARAMETERS_KEY)
        else:
            comment = image.getexif().get_ifd(_EXIF_IFD).get(_EXIF_USER_COMMENT)
            text = comment[8:].decode("utf-16-be") if comment else None
    return json.loads(text) if text else None


def decode_image(content: bytes, *, max_side: int | None = None) -> RgbImage:
    """Read an initial image: PNG, JPEG or WebP, upright by its Exif, alpha laid on white.

    A picture with a side longer than `max_side` pixels is shrunk to it, before it is converted.
    Raises `InvalidRequest` for what is damaged, of another format, or above `MAX_INPUT_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_ACCEPTED_FORMATS) as image:
            _refuse_large(*image.size)
            return flatten(_upright(image, max_side))
    except Image.DecompressionBombError as error:
        raise InvalidRequest(
            f"initial image has more than the limit of {MAX_INPUT_PIXELS} pixels; scale it down",
            field="init_image",
        ) from error
    except _DECODER_ERRORS as error:
        raise InvalidRequest(
            f"initial image cannot be read as PNG, JPEG or WebP: {_fault(error)}; save it anew in "
            "one of these formats",
            field="init_image",
        ) from error


def check_image_file(
    path: Path, *, max_pixels: int, formats: tuple[str, ...] = _ACCEPTED_FORMATS
) -> None:
    """Refuse a file that is none of the formats by its beginning, or too large to be decoded.

    Nothing is decoded, so a file that is damaged further on passes. Raises `InvalidRequest`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is below
            with Image.open(path, formats=formats) as image:
                width, height = image.size
    except (Image.DecompressionBombError, *_DECODER_ERRORS) as error:
        raise InvalidRequest(
            f"it is not a {' or '.join(formats)} file, or its beginning is damaged; save it anew"
        ) from error
    if width * height > max_pixels:
        raise InvalidRequest(
            f"it is {width} x {height}, the limit is {max_pixels} pixels; scale it down"
        )


def _refuse_large(width: int, height: int) -> None:
    if width * height > MAX_INPUT_PIXELS:
        raise InvalidRequest(
            f"initial image is {width} x {height}, the limit is {MAX_INPUT_PIXELS} pixels; "
            "scale it down",
            field="init_image",
        )


def _fault(error: Exception) -> str:
    """What a decoder says, where it is written for people: others name Python's own objects."""
    if type(error) in (OSError, SyntaxError, ValueError) and "0x" not in str(error):
        return str(error)
    return "it is damaged, or of another format"


def _upright(image: Image.Image, max_side: int | None) -> Image.Image:
    if max_side is not None and max(image.size) > max_side:
        # JPEG can be decoded at 1/2, 1/4 or 1/8, twice the size that is wanted; others ignore it.
        image.draft(None, (2 * max_side, 2 * max_side))
        image = _averageable(image)
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _averageable(image: Image.Image) -> Image.Image:
    """The picture in a mode whose pixels can be averaged, unlike the numbers of a palette."""
    image = _to_eight_bits(image)
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("RGB") if image.mode in ("1", "P") else image


def flatten(image: Image.Image) -> RgbImage:
    """Any picture as 8-bit RGB; what is transparent becomes white.

    Raises `ValueError` for pixels whose range of values is not known.
    """
    image = _to_eight_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and not _is_sixteen_bit(np.asarray(image))):
        raise ValueError(f"{image.mode} pixels have no known range; save it as 8-bit RGB")
    if image.mode not in _SIXTEEN_BIT_GREY:
        return image
    grey = image.convert("I").point(_EIGHT_BIT_LEVELS, "L")
    if "transparency" in grey.info:  # the level that a PNG declares transparent
        grey.info["transparency"] = _EIGHT_BIT_LEVELS[grey.info["transparency"]]
    return grey


def _is_sixteen_bit(levels: Int32[np.ndarray, "height width"]) -> bool:
    """Mode I is 32 bits wide; decoders of 16-bit files that use it stay within theirs."""
    return bool(levels.min() >= 0 and levels.max() <= 65535)
