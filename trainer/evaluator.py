"""The evaluator: which sentences are true of a picture, and how alike two pictures are.

Reads the folder that `models.recipe evaluator` writes and runs it with ONNX Runtime, without torch.
As with CLIP, pictures and sentences become unit vectors; unlike CLIP's, their cosine times a scale
plus a bias is the log-odds that a sentence is true (SigLIP, arXiv 2303.15343).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float32
from PIL import Image
from tokenizers import Tokenizer

from engine.errors import BundleError, OneWordError, quoted
from engine.files import sha256_of_file
from engine.requests import RgbImage
from engine.sessions import OnnxSession, Session

FORMAT = "oneword-evaluator/1"
SPEC_FILE = "evaluator.json"
IMAGE_FILE, TEXT_FILE, TOKENIZER_FILE = FILES = (
    "image_encoder.onnx",
    "text_encoder.onnx",
    "tokenizer.json",
)
_AT_ONCE = 64  # pictures or sentences in one call
_SMALLEST_SIDE = 8  # pixels

ImageEmbeds = Float32[np.ndarray, "images embed_dim"]
TextEmbeds = Float32[np.ndarray, "sentences embed_dim"]


class EvaluatorError(OneWordError):
    """The evaluator's files, or what it was given to judge, cannot be used; says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatorSpec:
    """What `evaluator.json` says: how to feed the encoders, and what they were taught."""

    image_size: int  # pixels; the side that the encoder sees
    embed_dim: int
    max_tokens: int
    pixel_mean: float  # of levels from 0 to 1
    pixel_std: float
    logit_scale: float
    logit_bias: float
    nouns: tuple[str, ...]  # all that it was taught, the held-out ones among them
    held_out_nouns: tuple[str, ...]
    styles: tuple[str, ...]
    colours: tuple[str, ...]  # of plain backgrounds


class Evaluator:
    """Judges pictures: by sentences, and by other pictures."""

    def __init__(
        self,
        spec: EvaluatorSpec,
        image_session: Session,
        text_session: Session,
        tokenizer: Tokenizer,
    ) -> None:
        self.spec = spec
        self._image_session, self._text_session = image_session, text_session
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()  # what does not fit is refused, not cut

    @classmethod
    def open(cls, folder: Path, *, num_threads: int | None = None) -> Self:
        """Read the evaluator of a folder; each file must be the one that was exported.

        Raises `EvaluatorError`, which names the file.
        """
        spec = read_spec(folder)
        try:
            return cls(
                spec,
                OnnxSession(folder / IMAGE_FILE, num_threads=num_threads),
                OnnxSession(folder / TEXT_FILE, num_threads=num_threads),
                Tokenizer.from_file(str(folder / TOKENIZER_FILE)),
            )
        except BundleError as error:
            raise EvaluatorError(f"{folder}: {error}") from error

    def image_embeds(self, images: Sequence[RgbImage]) -> ImageEmbeds:
        """Unit vectors of square pictures of any size, each of its own (levels from 0 to 255).

        Larger ones are reduced by averaging over areas, smaller ones enlarged bilinearly.
        Raises `EvaluatorError` for a picture that is not square, too small, or not of RGB levels.
        """
        squares = [
            _square(image, self.spec.image_size, place) for place, image in enumerate(images)
        ]
        embeds = [np.zeros((0, self.spec.embed_dim), np.float32)]
        for first in range(0, len(squares), _AT_ONCE):
            levels = np.stack(squares[first : first + _AT_ONCE]).astype(np.float32) / 255
            pixels = (levels - self.spec.pixel_mean) / self.spec.pixel_std
            feeds = {"pixels": pixels.transpose(0, 3, 1, 2)}
            embeds.append(self._image_session.run(feeds)["image_embeds"])
        return np.concatenate(embeds)

    def text_embeds(self, sentences: Sequence[str]) -> TextEmbeds:
        """Unit vectors of sentences, such as "a fox" or "on a blue background".

        Raises `EvaluatorError` for a sentence that is empty or too long.
        """
        embeds = [np.zeros((0, self.spec.embed_dim), np.float32)]
        for first in range(0, len(sentences), _AT_ONCE):
            encodings = self._tokenizer.encode_batch(list(sentences[first : first + _AT_ONCE]))
            masks = [encoding.attention_mask for encoding in encodings]
            for sentence, mask in zip(sentences[first:], masks, strict=False):
                self._check_length(sentence, sum(mask))
            feeds = {
                "input_ids": np.array([encoding.ids for encoding in encodings]),
                "attention_mask": np.array(masks),
            }
            embeds.append(self._text_session.run(feeds)["text_embeds"])
        return np.concatenate(embeds)

    def logits(
        self, image_embeds: ImageEmbeds, text_embeds: TextEmbeds
    ) -> Float32[np.ndarray, "images sentences"]:
        """The log-odds that a sentence is true of a picture."""
        cosines = image_embeds @ text_embeds.T
        return np.float32(self.spec.logit_scale) * cosines + np.float32(self.spec.logit_bias)

    def _check_length(self, sentence: str, num_tokens: int) -> None:
        if not num_tokens:
            raise EvaluatorError(f"the sentence {quoted(sentence)} says nothing; leave it out")
        if num_tokens > self.spec.max_tokens:
            raise EvaluatorError(
                f"the sentence {quoted(sentence)} has {num_tokens} tokens, the evaluator reads "
                f"{self.spec.max_tokens}; shorten it"
            )


def mean_similarity(images: ImageEmbeds, references: ImageEmbeds) -> float:
    """The mean cosine of every picture with every reference, like CLIP-I (arXiv 2208.12242)."""
    return float((images @ references.T).mean())


def read_spec(folder: Path) -> EvaluatorSpec:
    """What a folder's `evaluator.json` says, its other files checked against it.

    Raises `EvaluatorError`, which names the file and what is wrong with it.
    """
    stored = _read_json(folder / SPEC_FILE)
    if stored.get("format") != FORMAT:
        raise EvaluatorError(
            f"{folder / SPEC_FILE} is of format {stored.get('format')!r}, this version reads "
            f"{FORMAT!r}; {_REMEDY}"
        )
    missing = [name for name in (*_KINDS, "sha256") if name not in stored]
    if missing:
        raise EvaluatorError(f"{folder / SPEC_FILE} lacks {', '.join(missing)}; {_REMEDY}")
    for name, kinds in {**_KINDS, "sha256": (dict,)}.items():
        if not isinstance(stored[name], kinds):
            found = quoted(str(stored[name])) if isinstance(stored[name], str) else stored[name]
            raise EvaluatorError(f"{folder / SPEC_FILE}: {name} is {found}; {_REMEDY}")
    for name in FILES:
        _check_file(folder / name, stored["sha256"].get(name))
    values: dict[str, Any] = {
        name: tuple(stored[name]) if list in kinds else stored[name]
        for name, kinds in _KINDS.items()
    }
    return EvaluatorSpec(**values)


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("image_size", "embed_dim", "max_tokens"), (int,)),
    **dict.fromkeys(("pixel_mean", "pixel_std", "logit_scale", "logit_bias"), (int, float)),
    **dict.fromkeys(("nouns", "held_out_nouns", "styles", "colours"), (list,)),
}
_REMEDY = "restore the folder, or make it anew with `python -m models.recipe evaluator`"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluatorError(f"cannot read {path}: {error.strerror}; {_REMEDY}") from error
    except ValueError as error:
        raise EvaluatorError(f"{path} is not JSON ({error}); {_REMEDY}") from error
    if not isinstance(stored, dict):
        raise EvaluatorError(f"{path} does not describe an evaluator; {_REMEDY}")
    return stored


def _check_file(path: Path, sha256: str | None) -> None:
    try:
        found = sha256_of_file(path)
    except OSError as error:
        raise EvaluatorError(f"cannot read {path}: {error.strerror}; {_REMEDY}") from error
    if found != sha256:
        raise EvaluatorError(
            f"{path} is not the file that was exported: it is truncated or altered (SHA-256 "
            f"{found[:12]}..., expected {str(sha256)[:12]}...); {_REMEDY}"
        )


def _square(image: RgbImage, size: int, place: int) -> RgbImage:
    """A picture at the encoder's size."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise EvaluatorError(
            f"picture {place} has shape {image.shape} and dtype {image.dtype}; give RGB levels as "
            "uint8 of shape (height, width, 3)"
        )
    height, width, _ = image.shape
    if height != width or height < _SMALLEST_SIDE:
        raise EvaluatorError(
            f"picture {place} is {width} x {height} pixels; give a square of at least "
            f"{_SMALLEST_SIDE} pixels (crop it first)"
        )
    # Pillow's box filter is the mean over areas, also where the sizes do not divide.
    filter_ = Image.Resampling.BOX if height > size else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(image).resize((size, size), filter_))
