"""Images as bytes: what is written comes back, and what is no image is refused."""

import io
import random
import struct
import zlib
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
    with pytest.raises(InvalidRequest, match=r"PNG, JPEG or WebP: .*; save it anew") as caught:
        decode_image(content)
    assert "0x" not in str(caught.value)
    assert caught.value.field == "init_image"


def saved(picture: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def sideways() -> Image.Exif:
    """Exif of a camera that was held sideways."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.filterwarnings("ignore::UserWarning")  # remarks of Pillow about damaged metadata
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_are_refused_or_read_but_never_a_crash(image_format: str) -> None:
    chance = random.Random(0)
    whole = saved(Image.fromarray(BLACK), image_format, exif=sideways())
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 6)):
            damaged[chance.randrange(12, len(damaged))] = chance.randrange(256)
        try:
            decode_image(bytes(damaged))
        except InvalidRequest as error:
            refused += 1
            assert "0x" not in str(error)
    assert refused > 0


@pytest.mark.parametrize(
    "error",
    [
        TypeError("<_io.BytesIO object at 0x7f>"),
        struct.error("unpack"),
        zlib.error("-3"),
        EOFError(),
        OverflowError("too large"),
        ZeroDivisionError(),
        KeyError(0x0112),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_is_the_callers_to_mend(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("engine.images.ImageOps.exif_transpose", fail)
    with pytest.raises(InvalidRequest, match="damaged, or of another format") as caught:
        decode_image(saved(Image.new("RGB", (4, 4))))
    assert "0x" not in str(caught.value)


# Pillow warns from 89 and raises from 179 megapixels on; both are above our own limit.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [4_097, 10_000, 20_000])
def test_a_decompression_bomb_is_refused_unread(side: int) -> None:
    with pytest.raises(InvalidRequest, match=r"limit .* 16777216 pixels; scale it down"):
        decode_image(saved(Image.new("1", (side, side))))


def sixteen_bit_png(samples: np.ndarray, color_type: int) -> bytes:
    """A PNG of 16 bits a sample, which Pillow writes for grey only (PNG 1.2, section 4.1.1)."""
    height, width = samples.shape[:2]
    rows = samples.astype(">u2").reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


@pytest.mark.parametrize(("color_type", "samples"), [(0, 1), (2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("max_side", [None, 64], ids=["whole", "shrunk"])
def test_sixteen_bits_keep_their_range(color_type: int, samples: int, max_side: int | None) -> None:
    ramp = np.linspace(0, 65535, 128).astype(np.uint16)[None, :, None].repeat(128, axis=0)
    content = np.repeat(ramp, samples, axis=2)
    if color_type in (4, 6):
        content[..., -1] = 65535
    decoded = decode_image(sixteen_bit_png(content, color_type), max_side=max_side)
    levels = ramp[0, :, 0] / 257
    expected = levels if max_side is None else levels.reshape(-1, 2).mean(axis=1)
    # Pillow drops the low byte of colours (1 level); Lanczos bends the ends of a ramp by one more.
    np.testing.assert_allclose(decoded[0, :, 0], expected, atol=2)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_every_mode_of_sixteen_bit_grey_is_scaled(mode: str) -> None:
    byte_order = {"I": "=i4", "I;16B": ">u2"}.get(mode, "<u2")
    ramp = np.arange(0, 65536, 37)[None]
    picture = Image.frombytes(mode, (ramp.shape[1], 1), ramp.astype(byte_order).tobytes())
    expected = np.round(ramp / 257).astype(np.uint8)
    np.testing.assert_array_equal(flatten(picture)[..., 0], expected)


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", -1), ("I", 65536)])
def test_pixels_of_unknown_range_are_refused(mode: str, value: float) -> None:
    with pytest.raises(ValueError, match="no known range; save it as 8-bit RGB"):
        flatten(Image.new(mode, (2, 2), value))


def test_the_transparent_level_of_sixteen_bit_grey_becomes_white() -> None:
    grey = np.array([[0, 257 * 100]], np.uint16)
    decoded = decode_image(saved(Image.fromarray(grey), transparency=257 * 100))
    assert decoded[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK"])
def test_pictures_without_transparency_are_converted_once(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    picture = Image.effect_noise((16, 16), 50).convert("RGB").convert(mode)
    expected = np.asarray(picture.convert("RGB"))
    convert = Image.Image.convert
    modes: list[str] = []

    def spy(image: Image.Image, mode: str) -> Image.Image:
        modes.append(mode)
        return convert(image, mode)

    monkeypatch.setattr(Image.Image, "convert", spy)
    np.testing.assert_array_equal(flatten(picture), expected)
    opaque = {"RGB": []}.get(mode, ["RGB"])
    assert modes == (["RGBA", "RGB"] if mode.endswith("A") else opaque)


def smooth(width: int, height: int) -> Image.Image:
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, 255 - red], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    ("image_format", "mode"),
    [
        *(("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P")),
        *(("JPEG", mode) for mode in ("RGB", "L")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_a_large_picture_is_shrunk_before_it_is_converted(
    monkeypatch: pytest.MonkeyPatch, image_format: str, mode: str
) -> None:
    content = saved(smooth(640, 320).convert(mode), image_format, exif=sideways())
    sizes: list[tuple[int, int]] = []

    def spy(image: Image.Image) -> np.ndarray:
        sizes.append(image.size)
        return flatten(image)

    whole = Image.fromarray(decode_image(content))
    monkeypatch.setattr("engine.images.flatten", spy)
    decoded = decode_image(content, max_side=64)
    assert (decoded.shape, sizes) == ((64, 32, 3), [(32, 64)])
    # Lanczos in two steps, from a JPEG of reduced size at that: a few levels at the borders.
    expected = np.asarray(whole.resize((32, 64), Image.Resampling.LANCZOS), np.float32)
    np.testing.assert_allclose(decoded, expected, atol=6)


def test_a_jpeg_is_not_even_decoded_at_its_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved(smooth(1024, 1024), "JPEG")
    thumbnail = Image.Image.thumbnail
    sizes: list[tuple[int, int]] = []

    def spy(image: Image.Image, *args: Any, **kwargs: Any) -> None:
        sizes.append(image.size)
        thumbnail(image, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "thumbnail", spy)
    assert decode_image(content, max_side=64).shape == (64, 64, 3)
    assert sizes == [(128, 128)]


def test_a_colour_declared_transparent_does_not_bleed_when_shrunk() -> None:
    stripes = np.full((64, 64, 3), (0, 255, 0), np.uint8)
    stripes[:, ::2] = 255
    content = saved(Image.fromarray(stripes), transparency=(0, 255, 0))
    assert (decode_image(content, max_side=16) == 255).all()


def test_a_small_picture_is_not_enlarged() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    np.testing.assert_array_equal(decode_image(encode_image(picture), max_side=32), picture)


def test_transparency_becomes_white_and_exif_turns_upright() -> None:
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    assert (flatten(picture) == 255).all()
    content = saved(Image.new("RGB", (4, 2)), "JPEG", exif=sideways())
    assert decode_image(content).shape == (4, 2, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    content = saved(Image.fromarray(pixels), exif=sideways())
    np.testing.assert_array_equal(decode_image(content), np.rot90(pixels, -1))


def test_eight_bits_survive_the_model_range() -> None:
    picture = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    np.testing.assert_array_equal(to_uint8(to_float(picture))[0], picture)
