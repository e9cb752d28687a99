"""What stands beside a training image: where its subject is, and what it shows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.captions import MAX_CAPTIONS, MAX_FILE_BYTES, BadCaption, read_captions
from trainer.images import TrainingImages, read_images
from trainer.masks import BadMask, masked_stem, open_mask, to_weights

SIZE = 16
TOKEN = "<cat-toy>"


def picture(width: int = SIZE, height: int = SIZE, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def left_half(width: int = SIZE, height: int = SIZE) -> Image.Image:
    levels = np.zeros((height, width), np.uint8)
    levels[:, : width // 2] = 255
    return Image.fromarray(levels)


def reason(images: TrainingImages, name: str) -> str:
    return {file.name: file.reason for file in images.skipped}[name]


def captions_of(text: str | bytes, tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "cat.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_captions(path, TOKEN)


@pytest.mark.parametrize("suffix", [".mask.png", "-masklabel.png"])
def test_a_mask_beside_an_image_says_where_its_subject_is(tmp_path: Path, suffix: str) -> None:
    picture(seed=1).save(tmp_path / "cat.png")
    picture(seed=2).save(tmp_path / "dog.png")
    left_half().save(tmp_path / f"cat{suffix}")
    images = read_images(tmp_path, size=SIZE)
    assert images.names == ("cat.png", "dog.png") and images.masked == ("cat.png",)
    assert not images.skipped and images.masks is not None
    cat, dog = images.masks[:, 0]
    assert torch.equal(cat[:, : SIZE // 2], torch.ones(SIZE, SIZE // 2))
    assert torch.equal(cat[:, SIZE // 2 :], torch.zeros(SIZE, SIZE // 2))
    assert torch.equal(dog, torch.ones(SIZE, SIZE))


def test_a_mask_is_cropped_as_its_image_is(tmp_path: Path) -> None:
    picture(3 * SIZE, SIZE).save(tmp_path / "cat.jpg")
    levels = np.zeros((SIZE, 3 * SIZE), np.uint8)
    levels[:, SIZE + 4 : 2 * SIZE] = 255  # 4 pixels into the centre square
    Image.fromarray(levels).save(tmp_path / "cat.mask.png")
    masks = read_images(tmp_path, size=SIZE).masks
    assert masks is not None
    assert masks[0, 0].sum(dim=0).tolist() == [0.0] * 4 + [float(SIZE)] * (SIZE - 4)


def test_a_mask_is_averaged_down(tmp_path: Path) -> None:
    weights = to_weights(left_half(4 * SIZE + 2 * 2, 4 * SIZE + 2 * 2), SIZE)
    # Box averages keep the share of white up to the rounding of 8-bit levels.
    assert abs(float(weights.mean()) - 0.5) < 1 / 255


def test_transparency_is_a_mask(tmp_path: Path) -> None:
    image = picture().convert("RGBA")
    image.putalpha(left_half())
    image.save(tmp_path / "cat.png")
    picture(seed=3).convert("RGBA").save(tmp_path / "opaque.png")
    images = read_images(tmp_path, size=SIZE)
    assert images.masked == ("cat.png",) and images.masks is not None
    assert float(images.masks[0].mean()) == 0.5
    assert torch.equal(images.pixels[0, :, :, SIZE // 2 :], torch.ones(3, SIZE, SIZE // 2))


def test_without_masks_there_is_no_tensor_of_them(tmp_path: Path) -> None:
    picture().save(tmp_path / "cat.png")
    images = read_images(tmp_path, size=SIZE)
    assert images.masks is None and images.masked == () and images.captions == ()


def test_an_image_with_a_wrong_mask_is_not_learned_from_as_if_it_had_none(tmp_path: Path) -> None:
    for place, name in enumerate(("small", "black", "broken", "good")):
        picture(seed=place).save(tmp_path / f"{name}.png")
    left_half(SIZE - 1, SIZE).save(tmp_path / "small.mask.png")
    Image.new("L", (SIZE, SIZE)).save(tmp_path / "black.mask.png")
    (tmp_path / "broken.mask.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    images = read_images(tmp_path, size=SIZE)
    assert images.names == ("good.png",)
    assert "is 15 x 16, the upright image 16 x 16" in reason(images, "small.png")
    assert "0.00 %" in reason(images, "black.png")
    assert "broken" in reason(images, "broken.png")


def test_masks_without_an_image_and_second_masks_are_listed(tmp_path: Path) -> None:
    picture().save(tmp_path / "cat.png")
    left_half().save(tmp_path / "cat.mask.png")
    left_half().save(tmp_path / "cat-masklabel.png")
    left_half().save(tmp_path / "dog.mask.png")
    images = read_images(tmp_path, size=SIZE)
    assert images.names == ("cat.png",)
    # By name, "cat-masklabel.png" comes first.
    assert "has the mask cat-masklabel.png already" in reason(images, "cat.mask.png")
    assert "no image is named 'dog', whose mask" in reason(images, "dog.mask.png")


def test_names_that_only_end_like_masks_are_images() -> None:
    assert masked_stem("cat.mask.png") == "cat"
    assert masked_stem("Cat-MaskLabel.PNG") == "Cat"
    for name in ("cat.png", ".mask.png", "mask.png", "cat.mask.jpg"):
        assert masked_stem(name) is None


def test_an_open_mask_fits_its_image(tmp_path: Path) -> None:
    left_half().save(tmp_path / "m.png")
    assert open_mask(tmp_path / "m.png", (SIZE, SIZE)).mode == "L"
    with pytest.raises(BadMask, match="must be the same size"):
        open_mask(tmp_path / "m.png", (SIZE, SIZE + 1))


def test_captions_stand_with_their_image(tmp_path: Path) -> None:
    for place, name in enumerate(("a", "b")):
        picture(seed=place).save(tmp_path / f"{name}.png")
    (tmp_path / "b.txt").write_text(f"{TOKEN} on a table\n\n# by hand\na photo of {{}} at night\n")
    images = read_images(tmp_path, size=SIZE, placeholder_token=TOKEN)
    assert images.captions == ((), ("{} on a table", "a photo of {} at night"))
    assert not images.skipped


def test_an_image_with_a_wrong_caption_is_listed_with_the_line(tmp_path: Path) -> None:
    picture(seed=0).save(tmp_path / "a.png")
    picture(seed=1).save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("a photo of {}\na photo of a table")
    images = read_images(tmp_path, size=SIZE, placeholder_token=TOKEN)
    assert images.names == ("a.png",)
    assert "b.txt: line 2 has the word 0 times" in reason(images, "b.png")


def test_what_prompts_interpret_is_only_text_in_a_caption(tmp_path: Path) -> None:
    (caption,) = captions_of("{} (left) [old] <other> with {braces} and 50 % \\", tmp_path)
    assert caption.format(TOKEN) == (
        f"{TOKEN} \\(left\\) \\[old\\] \\<other\\> with {{braces}} and 50 % \\\\"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no caption"),
        ("# only a remark\n", "no caption"),
        ("{} and {}", "the word 2 times"),
        (b"{} \xff", "not UTF-8 text \\(byte 3\\)"),
        ("{} x\n" * (MAX_CAPTIONS + 1), f"{MAX_CAPTIONS + 1} captions"),
        ("{} " + "x" * MAX_FILE_BYTES, "larger than 64 KB"),
    ],
    ids=["empty", "remark", "twice", "bytes", "many", "huge"],
)
def test_bad_caption_files_say_what_is_wrong(
    text: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadCaption, match=message):
        captions_of(text, tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert captions_of(b"\xef\xbb\xbfa photo of {}", tmp_path) == ("a photo of {}",)


def test_a_photo_in_a_format_without_decoder_says_what_to_do(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "phone.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(64))
    images = read_images(tmp_path, size=SIZE)
    assert "save or export it as JPEG" in reason(images, "phone.heic")
