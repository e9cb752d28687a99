"""What a training is asked for and what a server allows: plain values, checked once.

The options carry the names that `trainer.learning.LearnOptions` gives them. Only those that were
asked for are here: the others take the defaults of the trainer, which this package cannot import.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.concepts import MAX_NUM_VECTORS, check_placeholder_token
from engine.errors import ConfigError, InvalidRequest, quoted

MAX_LEARN_SEED = 2**63 - 1  # what torch.Generator takes
MAX_INITIALIZER_CHARACTERS = 200
MAX_REQUEST_ID_CHARACTERS = 64
MAX_FILE_NAME_CHARACTERS = 255
MAX_PREVIEW_EVERY = 100_000
LEARNABLE_PROPERTIES = ("object", "style")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLimits:
    """What one training may ask of this server, and what all of them may take up."""

    max_images: int = 32
    max_image_bytes: int = 16 << 20
    max_upload_bytes: int = 128 << 20  # all images of one training
    max_uploads: int = 4  # that are being received at the same time
    max_kept_trainings: int = 1000  # that have ended; beyond, the oldest are forgotten
    max_steps: int = 10_000
    max_batch_size: int = 64

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """A word to learn."""

    placeholder_token: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])  # fields of LearnOptions
    overwrite: bool = False
    request_id: str = ""
    preview_every_steps: int = 0  # 0: no previews


def check_spec(spec: TrainingSpec, limits: TrainingLimits) -> None:
    """Raise `InvalidRequest`, naming the field, for what cannot be learned."""
    check_placeholder_token(spec.placeholder_token)
    for name, largest in (
        ("steps", limits.max_steps),
        ("batch_size", limits.max_batch_size),
        ("num_vectors", MAX_NUM_VECTORS),
    ):
        _check_range(name, spec.options.get(name, 1), 1, largest)
    _check_range("seed", spec.options.get("seed", 0), 0, MAX_LEARN_SEED)
    _check_learning_rate(spec.options.get("learning_rate", 1.0))
    _check_initializer(spec.options.get("initializer_token", " "))
    _check_request_id(spec.request_id)
    if not 0 <= spec.preview_every_steps <= MAX_PREVIEW_EVERY:
        raise InvalidRequest(
            f"preview_every_steps must be between 0 and {MAX_PREVIEW_EVERY}, "
            f"got {spec.preview_every_steps}",
            field="preview_every_steps",
        )


def _check_range(name: str, value: int, smallest: int, largest: int) -> None:
    if not smallest <= value <= largest:
        raise InvalidRequest(
            f"{name} must be between {smallest} and {largest}, got {value}", field=f"options.{name}"
        )


def _check_learning_rate(rate: float) -> None:
    if not (math.isfinite(rate) and 0.0 < rate <= 1.0):
        raise InvalidRequest(
            f"learning_rate must be above 0 and at most 1, got {rate}",
            field="options.learning_rate",
        )


def _check_initializer(text: str) -> None:
    if len(text) > MAX_INITIALIZER_CHARACTERS:
        raise InvalidRequest(
            f"initializer_token has {len(text)} characters, the limit is "
            f"{MAX_INITIALIZER_CHARACTERS}; give a word or a short phrase",
            field="options.initializer_token",
        )


def _check_request_id(request_id: str) -> None:
    printable = request_id.isascii() and request_id.isprintable()
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS or not printable:
        raise InvalidRequest(
            f"request_id must have at most {MAX_REQUEST_ID_CHARACTERS} characters of printable "
            f"ASCII, got {quoted(request_id)}; a UUID will do",
            field="request_id",
        )
