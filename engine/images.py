"""Images as bytes: PNG and WebP out, with the request's parameters inside; initial images in."""

import io
import json
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from engine.errors import InvalidRequest
from engine.requests import RgbImage

ImageFormat = Literal["png", "webp"]
MAX_INPUT_PIXELS = 4096 * 4096
PARAMETERS_KEY = "oneword"
_EXIF_USER_COMMENT = 0x9286
_EXIF_IFD = 0x8769
_ACCEPTED_FORMATS = ("PNG", "JPEG", "WEBP")


def to_uint8(images: Float32[np.ndarray, "batch 3 height width"]) -> list[RgbImage]:
    """Decoder output in [-1, 1] -> 8-bit RGB, rounded as diffusers' `VaeImageProcessor` does."""
    scaled = (np.clip(images * 0.5 + 0.5, 0.0, 1.0) * 255.0).round().astype(np.uint8)
    return list(np.ascontiguousarray(scaled.transpose(0, 2, 3, 1)))


def to_float(
    image: RgbImage, width: int, height: int
) -> Float32[np.ndarray, "1 3 height_out width_out"]:
    """8-bit RGB -> encoder input in [-1, 1], resized by Lanczos as diffusers does."""
    if image.shape[:2] != (height, width):
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
        image = np.asarray(resized)
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


def decode_image(content: bytes) -> RgbImage:
    """Read an initial image: PNG, JPEG or WebP, upright by its Exif, alpha laid on white."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_ACCEPTED_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_INPUT_PIXELS:
                    raise InvalidRequest(
                        f"initial image is {width} x {height}, the limit is {MAX_INPUT_PIXELS} "
                        "pixels; scale it down",
                        field="init_image",
                    )
                return flatten(ImageOps.exif_transpose(image))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError,
            Image.DecompressionBombWarning) as error:  # fmt: skip
        raise InvalidRequest(
            f"initial image cannot be read as PNG, JPEG or WebP: {error}", field="init_image"
        ) from error


def flatten(image: Image.Image) -> RgbImage:
    """Any picture as 8-bit RGB; what is transparent becomes white."""
    rgba = image.convert("RGBA")
    return np.array(
        Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert(
            "RGB"
        )
    )
