"""The folder of training images: what is used, what is skipped and said to be."""

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.errors import NoUsableImages
from trainer.images import TrainingImages, read_images

SIZE = 16


def _picture(width: int = 48, height: int = 48, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def _levels(images: TrainingImages, index: int = 0) -> np.ndarray:
    """Pixels of one image as 0..255, [height, width, 3]."""
    scaled = (images.pixels[index].permute(1, 2, 0) + 1) * 127.5
    return scaled.round().numpy().astype(np.uint8)


def _reason(images: TrainingImages, name: str) -> str:
    return {file.name: file.reason for file in images.skipped}[name]


def test_square_image_is_resized_as_pillow_does(tmp_path: Path) -> None:
    picture = _picture()
    picture.save(tmp_path / "a.png")
    expected = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    images = read_images(tmp_path, size=SIZE)
    assert images.pixels.dtype == torch.float32
    np.testing.assert_array_equal(_levels(images), expected)


def test_centre_is_cropped_and_nothing_squashed(tmp_path: Path) -> None:
    picture = _picture(width=3 * SIZE, height=SIZE)
    picture.save(tmp_path / "wide.png")
    expected = np.asarray(picture)[:, SIZE : 2 * SIZE]
    np.testing.assert_array_equal(_levels(read_images(tmp_path, size=SIZE)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path: Path, orientation: int) -> None:
    stored = _picture(SIZE, SIZE)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    # The eight orientations of EXIF 2.3, tag 0x0112, as numpy operations on [row, column].
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }[orientation](np.asarray(stored))
    np.testing.assert_array_equal(_levels(read_images(tmp_path, size=SIZE)), upright)


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rgba[: SIZE // 2] = (255, 0, 0, 255)
    rgba[SIZE // 2 :] = (0, 0, 0, 0)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    levels = _levels(read_images(tmp_path, size=SIZE))
    assert (levels[: SIZE // 2] == (255, 0, 0)).all()
    assert (levels[SIZE // 2 :] == 255).all()


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, SIZE, dtype=np.uint16)[None].repeat(SIZE, axis=0)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    row = _levels(read_images(tmp_path, size=SIZE))[0, :, 0]
    np.testing.assert_array_equal(row, np.round(ramp[0] / 257).astype(np.uint8))


def test_sixteen_bit_pgm_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, SIZE, dtype=np.uint16)[None].repeat(SIZE, axis=0)
    header = f"P5 {SIZE} {SIZE} 65535\n".encode()
    (tmp_path / "a.pgm").write_bytes(header + ramp.astype(">u2").tobytes())
    row = _levels(read_images(tmp_path, size=SIZE))[0, :, 0]
    np.testing.assert_array_equal(row, np.round(ramp[0] / 257).astype(np.uint8))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_a_reason(tmp_path: Path, mode: str) -> None:
    _picture().save(tmp_path / "a.png")
    Image.new(mode, (SIZE, SIZE)).save(tmp_path / "b.tiff")
    assert "no known range" in _reason(read_images(tmp_path, size=SIZE), "b.tiff")


def test_a_fault_without_words_is_still_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_image: Image.Image) -> np.ndarray:
        raise EOFError

    _picture().save(tmp_path / "a.png")
    monkeypatch.setattr("trainer.images.flatten", fail)
    with pytest.raises(NoUsableImages, match="broken image: EOFError"):
        read_images(tmp_path, size=SIZE)


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    _picture().save(tmp_path / "photo.txt", format="PNG")
    (tmp_path / "notes.png").write_text("not an image")
    images = read_images(tmp_path, size=SIZE)
    assert images.names == ("photo.txt",)
    assert "not an image" in _reason(images, "notes.png")


def test_every_file_is_used_or_listed_with_its_reason(tmp_path: Path) -> None:
    _picture(seed=1).save(tmp_path / "b.png")
    _picture(seed=0).save(tmp_path / "a.png")
    _picture(seed=0).save(tmp_path / "c.bmp")
    _picture(seed=2).save(tmp_path / ".hidden.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jpg").touch()
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    frames = [_picture(seed=seed) for seed in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    images = read_images(tmp_path, size=SIZE)
    assert images.names == ("a.png", "b.png")
    assert {file.name for file in images.skipped} | set(images.names) == {
        path.name for path in tmp_path.iterdir()
    }
    assert _reason(images, "c.bmp") == "same pixels as a.png"
    assert _reason(images, ".hidden.png") == "hidden file"
    assert "no subfolders" in _reason(images, "folder")
    assert "broken" in _reason(images, "half.png")
    assert "(3)" in _reason(images, "moving.gif")


@pytest.mark.parametrize("side", [30, 60])
def test_image_with_too_many_pixels_is_skipped_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    # Pillow warns above its limit and raises above twice its limit: both must end in a reason.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    _picture(SIZE, SIZE).save(tmp_path / "small.png")
    _picture(side, side).save(tmp_path / "large.png")
    images = read_images(tmp_path, size=SIZE)
    assert images.names == ("small.png",)
    assert "megapixels" in _reason(images, "large.png")


def test_postscript_is_never_handed_to_an_interpreter(tmp_path: Path) -> None:
    _picture().save(tmp_path / "a.png")
    _picture().save(tmp_path / "b.png", format="EPS")
    assert "known format" in _reason(read_images(tmp_path, size=SIZE), "b.png")


def test_small_image_is_used_and_flagged(tmp_path: Path) -> None:
    _picture(SIZE - 1, 2 * SIZE).save(tmp_path / "small.png")
    _picture(SIZE, SIZE).save(tmp_path / "exact.png")
    images = read_images(tmp_path, size=SIZE)
    assert images.names == ("exact.png", "small.png")
    assert images.upscaled == ("small.png",)


def test_hash_is_that_of_the_file(tmp_path: Path) -> None:
    _picture().save(tmp_path / "a.png")
    digest = hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    assert read_images(tmp_path, size=SIZE).sha256 == (digest,)


def test_damaged_files_are_reasons_not_crashes(tmp_path: Path) -> None:
    chance = random.Random(0)
    _picture().save(tmp_path / "whole.png")
    for suffix in ("png", "jpeg", "gif", "webp", "tiff", "bmp"):
        _picture().save(tmp_path / f"whole.{suffix}")
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        for number in range(10):
            damaged = bytearray(content[: chance.randrange(1, len(content))])
            for _ in range(4):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            (tmp_path / f"damaged{number}.{suffix}").write_bytes(damaged)
    images = read_images(tmp_path, size=SIZE)
    assert len(images.names) + len(images.skipped) == len(list(tmp_path.iterdir()))
    assert all(file.reason for file in images.skipped)


def test_folder_without_images_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(NoUsableImages, match=r"notes\.txt.*not an image"):
        read_images(tmp_path, size=SIZE)


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NoUsableImages, match="No such file"):
        read_images(tmp_path / "absent", size=SIZE)
