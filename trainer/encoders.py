"""Encoders that judge: pictures, and where they can sentences, to vectors that cosines compare.

The offline one is the evaluator that comes with the embedded model; CLIP and DINO are read from a
folder or the hub (trainer/hub_encoders.py, which needs PyTorch). A score belongs to its encoder:
numbers of two encoders cannot be compared, and each says what it can judge.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float32

from engine.requests import RgbImage
from trainer.evaluation_errors import EncoderError
from trainer.evaluator import IMAGE_FILE, SPEC_FILE, Evaluator, EvaluatorError, EvaluatorSpec

DEFAULT_ENCODER = "models/evaluator"

Embeds = Float32[np.ndarray, "count dim"]
EncoderKind = Literal["evaluator", "clip", "dino"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDescription:
    """What a report says of an encoder."""

    name: str  # as it was asked for
    kind: EncoderKind
    identity: str  # what tells its weights from others: a digest, a revision
    image_size: int  # pixels; the side that it sees
    reads_text: bool
    judges: str  # what it can judge, and what not


class Encoder(Protocol):
    """Pictures (square, levels from 0 to 255) and sentences as vectors of one space."""

    @property
    def description(self) -> EncoderDescription: ...

    def image_embeds(self, images: Sequence[RgbImage]) -> Embeds: ...

    def text_embeds(self, sentences: Sequence[str]) -> Embeds:
        """Raises `EncoderError` for text that is too long; it is never cut in silence."""
        ...


class EvaluatorEncoder:
    """The embedded model's evaluator as an encoder."""

    def __init__(self, evaluator: Evaluator, *, name: str, identity: str) -> None:
        self._evaluator = evaluator
        self._description = EncoderDescription(
            name=name,
            kind="evaluator",
            identity=identity,
            image_size=evaluator.spec.image_size,
            reads_text=True,
            judges=_what_it_knows(evaluator.spec),
        )

    @classmethod
    def open(cls, folder: Path) -> "EvaluatorEncoder":
        """The evaluator of a folder; raises `EncoderError`, which names the file."""
        try:
            evaluator = Evaluator.open(folder)
            digest = json.loads((folder / SPEC_FILE).read_bytes())["sha256"][IMAGE_FILE]
        except (EvaluatorError, OSError, ValueError, KeyError) as error:
            raise EncoderError(f"cannot open the evaluator: {error}") from error
        return cls(evaluator, name=str(folder), identity=f"SHA-256 {digest}")

    @property
    def description(self) -> EncoderDescription:
        return self._description

    def image_embeds(self, images: Sequence[RgbImage]) -> Embeds:
        return self._evaluator.image_embeds(images)

    def text_embeds(self, sentences: Sequence[str]) -> Embeds:
        try:
            return self._evaluator.text_embeds(sentences)
        except EvaluatorError as error:
            raise EncoderError(str(error)) from error


def _what_it_knows(spec: EvaluatorSpec) -> str:
    return (
        f"pictures of {len(spec.nouns)} emoji objects, {len(spec.styles)} drawing styles and plain "
        f"colours ({', '.join(spec.styles)}); a photograph, another object or another style gets "
        "a number that means nothing, and none compares with CLIP's"
    )


def open_encoder(name: str, *, device: str = "cpu") -> Encoder:
    """An encoder by folder or hub id; raises `EncoderError` that says what was looked for."""
    folder = Path(name)
    if (folder / SPEC_FILE).is_file():
        return EvaluatorEncoder.open(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise EncoderError(
            f"{folder} holds no encoder: neither {SPEC_FILE} (the embedded model's evaluator; "
            "`python -m models.recipe evaluator` makes it) nor config.json (CLIP or DINO)"
        )
    from trainer.hub_encoders import open_hub_encoder  # PyTorch, which the evaluator does without

    return open_hub_encoder(name, device=device)


def default_encoder() -> str:
    """The offline evaluator's folder; raises `EncoderError` where the command runs elsewhere."""
    # Its name could be a hub id, and must not be looked for there.
    if not Path(DEFAULT_ENCODER).is_dir():
        raise EncoderError(
            f"the offline evaluator is not here: no folder {DEFAULT_ENCODER}; run in the project's "
            "folder, or give --encoder a folder or hub id of the evaluator or a CLIP"
        )
    return DEFAULT_ENCODER
