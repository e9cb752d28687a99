"""CLIP and DINO as transformers computes them, on tiny random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from engine.requests import RgbImage
from tests.tiny_model import BOS, EOS, make_tokenizer
from trainer.encoders import Encoder, open_encoder
from trainer.evaluation_errors import EncoderError

MAX_TOKENS = 20
SIDE = 24  # pixels that the tiny encoders see
# float32 sums of some hundred products in another order.
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
_TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_MEAN, _STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def _preprocessing(folder: Path, kind: str, **more: object) -> None:
    """As the hub's preprocessor_config.json files are written."""
    config = {
        "image_processor_type": kind, "do_resize": True, "do_rescale": True, "do_normalize": True,
        "rescale_factor": 1 / 255, "image_mean": _MEAN, "image_std": _STD, "resample": 3, **more,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer: Any = make_tokenizer(MAX_TOKENS)
    text = {
        **_TINY, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.convert_tokens_to_ids(BOS),
        "eos_token_id": tokenizer.convert_tokens_to_ids(EOS),
    }  # fmt: skip
    vision = {**_TINY, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    make: Any = CLIPModel
    make(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    _preprocessing(
        folder, "CLIPImageProcessor", size={"shortest_edge": SIDE}, do_center_crop=True,
        crop_size=square, do_convert_rgb=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Encoder:
    return open_encoder(str(clip_folder))


def _pictures(count: int, side: int = SIDE) -> list[RgbImage]:
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def _pixels(pictures: list[RgbImage]) -> torch.Tensor:
    """Preprocessing by its definition, of pictures that need no resizing."""
    levels = np.stack(pictures).astype(np.float64) / 255
    return torch.from_numpy((levels - _MEAN) / _STD).float().permute(0, 3, 1, 2)


SENTENCES = ["a photo of a cat", "the red dog in the morning", "a"]


@torch.no_grad()
def test_clip_embeds_as_its_own_forward_pass(clip: Encoder, clip_folder: Path) -> None:
    load: Any = CLIPModel.from_pretrained
    tokenizer: Any = make_tokenizer(MAX_TOKENS)
    pictures = _pictures(3)
    images = clip.image_embeds(pictures)
    texts = clip.text_embeds(SENTENCES)
    model = load(clip_folder).eval()
    for place, sentence in enumerate(SENTENCES):
        output = model(
            input_ids=tokenizer([sentence], return_tensors="pt")["input_ids"],
            pixel_values=_pixels(pictures),
        )
        expected = output.text_embeds[0].numpy()
        found = texts[place] / np.linalg.norm(texts[place])
        np.testing.assert_allclose(found, expected, **TOLERANCE)
        units = images / np.linalg.norm(images, axis=1, keepdims=True)
        np.testing.assert_allclose(units, output.image_embeds.numpy(), **TOLERANCE)


def test_pictures_are_resized_as_clip_was_trained(clip: Encoder) -> None:
    (large,) = _pictures(1, 64)
    small = Image.fromarray(large).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(
        clip.image_embeds([large]), clip.image_embeds([np.asarray(small)]), **TOLERANCE
    )


def test_embeddings_do_not_depend_on_their_batch(clip: Encoder) -> None:
    pictures = _pictures(40)  # more than one call takes
    together = clip.image_embeds(pictures)
    np.testing.assert_allclose(together[39:], clip.image_embeds(pictures[39:]), **TOLERANCE)
    assert clip.image_embeds([]).shape == (0, 12)
    assert clip.text_embeds([]).shape == (0, 12)


def test_long_texts_are_refused_not_cut(clip: Encoder) -> None:
    with pytest.raises(EncoderError, match=r"has 32 tokens, the encoder .* reads 20; shorten"):
        clip.text_embeds(["a cat", "cat " * 30])


def test_clip_says_what_it_is(clip: Encoder) -> None:
    description = clip.description
    assert (description.kind, description.image_size, description.reads_text) == (
        "clip",
        SIDE,
        True,
    )
    assert description.identity.startswith("SHA-256 ")


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
@torch.no_grad()
def test_dino_is_the_class_token(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": SIDE, "patch_size": 8}
    make: Any = ViTModel if kind == "vit" else Dinov2Model
    config: Any = (ViTConfig if kind == "vit" else Dinov2Config)(**_TINY, **sizes)
    options: dict[str, Any] = {"add_pooling_layer": False} if kind == "vit" else {}
    model = make(config, **options).eval()
    model.save_pretrained(tmp_path)
    _preprocessing(tmp_path, "ViTImageProcessor", size={"height": SIDE, "width": SIDE})
    encoder = open_encoder(str(tmp_path))
    pictures = _pictures(3)
    expected = model(_pixels(pictures)).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(encoder.image_embeds(pictures), expected, **TOLERANCE)
    assert (encoder.description.kind, encoder.description.reads_text) == ("dino", False)
    with pytest.raises(EncoderError, match="reads no text; give a CLIP"):
        encoder.text_embeds(["a"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "cannot read the encoder"),
        ("config.json", b'{"model_type": "bert"}', "is of type 'bert'; known: clip, vit"),
        ("model.safetensors", None, "cannot read the encoder .*; give a folder with its config"),
        ("model.safetensors", b"\0" * 100, "cannot read the encoder"),
        ("preprocessor_config.json", None, "cannot read the encoder"),
    ],
)
def test_broken_encoders_are_refused(
    clip_folder: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EncoderError, match=message) as error:
        open_encoder(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_device_that_is_not_there_is_said(clip_folder: Path) -> None:
    with pytest.raises(EncoderError, match="cannot read the encoder"):
        open_encoder(str(clip_folder), device="warp")


def test_names_that_are_neither_folder_nor_hub_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="no such folder: /no/such/encoder"):
        open_encoder("/no/such/encoder")
    (tmp_path / "file").touch()
    with pytest.raises(EncoderError, match="no such folder"):
        open_encoder(str(tmp_path / "file"))
