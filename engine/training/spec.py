"""What a training is asked for and what a server allows: plain values, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.concepts import check_placeholder_token
from engine.errors import ConfigError, InvalidRequest
from engine.requests import check_request_id
from engine.training.options import MAX_STEPS_BETWEEN, check_options

MAX_FILE_NAME_CHARACTERS = 255
MAX_IMAGE_PIXELS = 64 * 1024 * 1024  # below what Pillow calls a decompression bomb
MAX_CAPTIONS_BYTES = 64 << 10  # of one image: what the trainer reads


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLimits:
    """What one training may ask of this server, and what all of them may take up."""

    max_images: int = 32  # of one training
    max_image_bytes: int = 16 << 20  # of one image, and of one mask
    max_upload_bytes: int = 128 << 20  # all images of one training, with masks and captions
    max_uploads: int = 4  # that are being received at the same time
    max_kept_trainings: int = 1000  # that have ended; beyond, the oldest are forgotten
    max_steps: int = 10_000  # of one training
    max_batch_size: int = 64  # samples in a step

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
    check_options(spec.options, max_steps=limits.max_steps, max_batch_size=limits.max_batch_size)
    check_request_id(spec.request_id)
    if not 0 <= spec.preview_every_steps <= MAX_STEPS_BETWEEN:
        raise InvalidRequest(
            f"preview_every_steps must be between 0 and {MAX_STEPS_BETWEEN}, "
            f"got {spec.preview_every_steps}",
            field="preview_every_steps",
        )
