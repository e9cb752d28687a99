"""CLIP and DINO as encoders, read with transformers from a folder or the hub; safetensors only.

Pictures go through the encoder's own preprocessing (its preprocessor_config.json), with Pillow's
resampling, which is what the papers used.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPModel, CLIPTokenizer

from engine.errors import quoted
from engine.files import sha256_of_file
from engine.requests import RgbImage
from trainer.encoders import Embeds, Encoder, EncoderDescription
from trainer.evaluation_errors import EncoderError
from trainer.messages import first_line
from trainer.quiet import quiet_libraries

_AT_ONCE = 32  # pictures or sentences in one call
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers")
_CLIP_JUDGES = (
    "what photographs and captions of the web hold: subjects, styles, places; weak on which one of "
    "a kind a thing is, on counts and on where things stand"
)
_DINO_JUDGES = (
    "whether pictures look alike, background and pose included, closer to the individual than CLIP "
    "(arXiv 2208.12242, section 4); it reads no text"
)


class ClipEncoder:
    """Both towers of a CLIP; text is pooled at its end, as CLIP was trained."""

    def __init__(self, name: str, config: Any, device: torch.device) -> None:
        load: Any = CLIPModel.from_pretrained
        # The `CLIPModel`, frozen, in float32.
        self.model: Any = _prepared(load(name, use_safetensors=True), device)
        self._tokenizer: Any = CLIPTokenizer.from_pretrained(name)
        self._preprocess = _preprocessor(name)
        self._device = device
        self._max_tokens = int(config.text_config.max_position_embeddings)
        self.description = EncoderDescription(
            name=name,
            kind="clip",
            identity=_identity(name, config),
            image_size=int(config.vision_config.image_size),
            reads_text=True,
            judges=_CLIP_JUDGES,
        )

    def to(self, device: torch.device) -> None:
        """Move both towers."""
        self.model.to(device)
        self._device = device

    @torch.no_grad()
    def image_embeds(self, images: Sequence[RgbImage]) -> Embeds:
        def embed(batch: Sequence[RgbImage]) -> Tensor:
            pixels = self._preprocess(batch).to(self._device)
            return self.model.visual_projection(self.model.vision_model(pixels).pooler_output)

        return _in_batches(embed, images, int(self.model.projection_dim))

    @torch.no_grad()
    def text_embeds(self, sentences: Sequence[str]) -> Embeds:
        def embed(batch: Sequence[str]) -> Tensor:
            tokens = self._tokenizer(list(batch), padding=True, return_tensors="pt")
            self._check_lengths(batch, tokens["attention_mask"].sum(dim=1).tolist())
            tokens = tokens.to(self._device)
            pooled = self.model.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            return self.model.text_projection(pooled)

        return _in_batches(embed, sentences, int(self.model.projection_dim))

    def _check_lengths(self, sentences: Sequence[str], lengths: Sequence[int]) -> None:
        for sentence, length in zip(sentences, lengths, strict=True):
            if length > self._max_tokens:
                raise EncoderError(
                    f"the text {quoted(sentence)} has {length} tokens, the encoder "
                    f"{self.description.name} reads {self._max_tokens}; shorten the prompt"
                )


class DinoEncoder:
    """A vision transformer by the output of its class token, as DreamBooth's DINO score has it."""

    def __init__(self, name: str, config: Any, device: torch.device) -> None:
        load: Any = AutoModel.from_pretrained
        # DINO's ViT has no pooler; transformers would make up a random one, which nothing reads.
        options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
        self._model: Any = _prepared(load(name, use_safetensors=True, **options), device)
        self._preprocess = _preprocessor(name)
        self._device = device
        self._dim = int(config.hidden_size)
        self.description = EncoderDescription(
            name=name,
            kind="dino",
            identity=_identity(name, config),
            image_size=int(config.image_size),
            reads_text=False,
            judges=_DINO_JUDGES,
        )

    @torch.no_grad()
    def image_embeds(self, images: Sequence[RgbImage]) -> Embeds:
        def embed(batch: Sequence[RgbImage]) -> Tensor:
            pixels = self._preprocess(batch).to(self._device)
            return self._model(pixels).last_hidden_state[:, 0]

        return _in_batches(embed, images, self._dim)

    def text_embeds(self, sentences: Sequence[str]) -> Embeds:
        raise EncoderError(
            f"{self.description.name} reads no text; give a CLIP as another --encoder"
        )


def open_hub_encoder(name: str, *, device: str = "cpu") -> Encoder:
    """A CLIP or DINO of a folder or hub id, in float32 on a device.

    Raises `EncoderError` for one that is missing, broken, pickled, or of another kind.
    """
    quiet_libraries()
    source = _source(name)
    try:
        config: Any = AutoConfig.from_pretrained(source)
        if config.model_type == "clip":
            return ClipEncoder(source, config, torch.device(device))
        if config.model_type in _DINO_TYPES:
            return DinoEncoder(source, config, torch.device(device))
    # Whatever transformers, safetensors or PyTorch make of missing and broken files and devices.
    except Exception as error:
        raise EncoderError(
            f"cannot read the encoder {name}: {first_line(error)}; give a folder with its "
            "config.json, preprocessor_config.json and model.safetensors, or a hub id that can be "
            "reached"
        ) from error
    raise EncoderError(
        f"the encoder {name} is of type {quoted(str(config.model_type))}; known: clip, "
        f"{', '.join(_DINO_TYPES)}"
    )


def _source(name: str) -> str:
    folder = Path(name)
    if folder.is_dir():
        return str(folder)
    if folder.exists() or not _HUB_ID.fullmatch(name):
        raise EncoderError(f"no such folder: {name} (and it cannot be a hub id, OWNER/NAME)")
    return name


def _prepared(model: Any, device: torch.device) -> Any:
    return model.float().requires_grad_(False).eval().to(device)


def _preprocessor(name: str) -> Callable[[Sequence[RgbImage]], Tensor]:
    load: Any = AutoImageProcessor.from_pretrained
    processor: Any = load(name, backend="pil")

    def preprocess(images: Sequence[RgbImage]) -> Tensor:
        pictures = [Image.fromarray(image) for image in images]
        return processor(pictures, return_tensors="pt")["pixel_values"]

    return preprocess


def _in_batches(
    embed: Callable[[Sequence[Any]], Tensor], things: Sequence[Any], dim: int
) -> Float32[np.ndarray, "count dim"]:
    embeds = [np.zeros((0, dim), np.float32)]
    for first in range(0, len(things), _AT_ONCE):
        embeds.append(embed(things[first : first + _AT_ONCE]).float().cpu().numpy())
    return np.concatenate(embeds)


def _identity(source: str, config: Any) -> str:
    weights = Path(source) / "model.safetensors"
    if weights.is_file():
        return f"SHA-256 {sha256_of_file(weights)}"
    if shards := sorted(Path(source).glob("model-*.safetensors")):
        digests = "".join(map(sha256_of_file, shards))
        return f"SHA-256 {hashlib.sha256(digests.encode()).hexdigest()} (of its shards')"
    commit = getattr(config, "_commit_hash", None)
    return f"commit {commit}" if commit else "of unknown revision"
