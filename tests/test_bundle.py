"""A bundle is whole, or it is refused with both sides of the mismatch."""

import random
import re
import string
from pathlib import Path

import pytest

from benchmarks.live_heap import live_heap_bytes
from engine.bundle import Bundle
from engine.errors import BundleError


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="bundle.json is missing; make one with"):
        Bundle.open(tmp_path / "nothing")


@pytest.mark.parametrize(
    "name", ["denoiser.onnx", "token_embedding.safetensors", "samplers.safetensors"]
)
def test_a_corrupted_bundle_is_refused(emoji_bundle_path: Path, tmp_path: Path, name: str) -> None:
    for file in emoji_bundle_path.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} is corrupted: SHA-256"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("precision", '"fp16"'), ("scale_factor", "16"), ("eos_token_id", "99999")]
)
def test_a_manifest_that_was_changed_is_refused(
    emoji_bundle_path: Path, tmp_path: Path, field: str, value: str
) -> None:
    text = (emoji_bundle_path / "bundle.json").read_text()
    changed = re.sub(rf'"{field}": [^,\n]+', f'"{field}": {value}', text)
    assert changed != text
    (tmp_path / "bundle.json").write_text(changed)
    with pytest.raises(BundleError, match="bundle.json was changed or damaged"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", *(f'{{"format_version": {version}}}' for version in (1, 2, 99, "null"))],
)
def test_a_broken_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "bundle.json").write_text(content)
    with pytest.raises(BundleError, match="bundle.json"):
        Bundle.open(tmp_path)


def test_words_of_callers_are_not_kept(emoji_bundle_path: Path) -> None:
    """A tokenizer by itself keeps 10,000 words: up to 80 MB of what strangers have sent."""
    tokenizer = Bundle.open(emoji_bundle_path).tokenizer
    chance = random.Random(0)
    words = ["".join(chance.choices(string.ascii_lowercase, k=250)) for _ in range(2000)]
    tokenizer.encode("a cat")
    before = live_heap_bytes()
    if before is None:
        pytest.skip("the C library does not tell what lives")
    for word in words:
        tokenizer.encode(word)
    after = live_heap_bytes()
    assert after is not None
    # Kept, they take 16 MiB. Not kept, 0.02; other threads of the tests may add something.
    assert after - before < 4 * 2**20
