"""Images as bytes: what is written comes back, and what is no image is refused."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.errors import InvalidRequest
from engine.images import decode_image, encode_image, flatten, read_parameters, to_float, to_uint8

BLACK = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_parameters_travel_inside_the_image(image_format: Any) -> None:
    parameters = {"prompt": "a <x> in Zürich \n ☃", "seed": 2**64 - 1}
    picture = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    content = encode_image(picture, image_format, parameters)
    assert read_parameters(content) == parameters
    if image_format == "png":
        np.testing.assert_array_equal(decode_image(content), picture)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"<svg/>",
        encode_image(np.zeros((8, 8, 3), np.uint8))[:40],
    ],
    ids=["empty", "header", "gif", "svg", "cut"],
)
def test_an_initial_image_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequest, match="initial image"):
        decode_image(content)


def test_a_decompression_bomb_is_refused_unread() -> None:
    with pytest.raises(InvalidRequest, match="20000 x 20000|cannot be read"):
        decode_image(encode_bomb(20_000))


def encode_bomb(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def test_transparency_becomes_white_and_exif_turns_upright() -> None:
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    assert (flatten(picture) == 255).all()
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    Image.new("RGB", (4, 2)).save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue()).shape == (4, 2, 3)


def test_eight_bits_survive_the_model_range() -> None:
    picture = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    np.testing.assert_array_equal(to_uint8(to_float(picture, 8, 8))[0], picture)
