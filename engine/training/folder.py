"""One training on disk: a folder that server and learning process share.

`spec.json` is written once, when the training is created; `state.json` by the server alone; the
rest by the learning process. The images are named by their index and the SHA-256 of their content,
their masks and captions as the trainer looks for them beside an image, so that nothing a caller
chooses becomes a path. A field that a later version adds needs a default: records without it are
then read as before.
"""

import dataclasses
import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from engine.errors import StorageFull, StoreError
from engine.files import is_full, sync_path, write_atomically
from engine.store.concept_store import DEFAULT_TENANT
from engine.training.reports import Progress, Skipped
from engine.training.spec import TrainingSpec

FORMAT = "oneword-training/1"
Status = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
Part = Literal["image", "mask", "captions"]  # what is sent of an image
# Beside an image, its companions are called as the trainer looks for them.
_SUFFIXES: dict[Part, str] = {"image": "", "mask": ".mask.png", "captions": ".txt"}
ENDED: frozenset[Status] = frozenset(("succeeded", "failed", "cancelled"))


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadedImage:
    """An image as it was received."""

    file_name: str  # what the caller calls it; never a path
    sha256: str
    mask_sha256: str = ""  # empty: it came without a mask
    captions_sha256: str = ""  # empty: it came without captions


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecord:
    """What a training is: never changes."""

    training_id: str
    create_time: float  # seconds since the epoch, UTC
    spec: TrainingSpec
    images: tuple[UploadedImage, ...]
    tenant: str = DEFAULT_TENANT  # whose it is; records of before there were tenants lack it

    def asks_the_same_as(self, spec: TrainingSpec, images: tuple[UploadedImage, ...]) -> bool:
        """Whether another request is this one once more."""
        return (spec, images) == (self.spec, self.images)

    def to_json(self) -> bytes:
        return _to_json({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, content: bytes) -> "TrainingRecord":
        """Raises `ValueError`, `KeyError` or `TypeError` for what is no record of this version."""
        fields = json.loads(content)
        if fields.pop("format") != FORMAT:
            raise ValueError(f"not of the format {FORMAT}")
        spec = _read_spec(fields.pop("spec"))
        images = tuple(UploadedImage(**image) for image in fields.pop("images"))
        return cls(spec=spec, images=images, **fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Where a training is in its life."""

    status: Status = "queued"
    start_time: float | None = None  # seconds since the epoch, UTC
    end_time: float | None = None
    progress: Progress | None = None
    skipped: tuple[Skipped, ...] = ()
    attempts: int = 0  # processes that were started, less those that the server told to stop
    error: str = ""
    concept_id: str = ""

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    def to_json(self) -> bytes:
        return _to_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, content: bytes) -> "TrainingState":
        """Raises `ValueError`, `KeyError` or `TypeError` for what is no state."""
        fields = json.loads(content)
        if fields["status"] not in get_args(Status):
            raise ValueError(f"unknown status {fields['status']!r}")
        if "crashes" in fields:  # its name in records of before
            fields["attempts"] = fields.pop("crashes")
        progress = fields.pop("progress")
        skipped = tuple(Skipped(**skipped) for skipped in fields.pop("skipped"))
        return cls(
            progress=None if progress is None else Progress(**progress), skipped=skipped, **fields
        )


def _read_spec(fields: dict[str, Any]) -> TrainingSpec:
    """What JSON has as lists is tuples in a spec."""
    options = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.pop("options").items()
    }
    return TrainingSpec(options=options, **fields)


def _to_json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, indent=1, sort_keys=True).encode()


@dataclass(frozen=True, slots=True)
class TrainingFolder:
    """Where the parts of one training are."""

    path: Path

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def concept(self) -> Path:
        """The result; there once learning has ended well."""
        return self.path / "concept.safetensors"

    @property
    def preview(self) -> Path:
        return self.path / "preview.png"

    @property
    def log(self) -> Path:
        """What the last learning process wrote to its standard error."""
        return self.path / "worker.log"

    @property
    def lock(self) -> Path:
        """Held by the learning process while it runs."""
        return self.path / "worker.lock"

    @staticmethod
    def image_name(index: int, sha256: str) -> str:
        """The file name of an image: in the order of the upload, and with no suffix to go by."""
        return f"{index:04d}-{sha256}"

    def part(self, index: int, sha256: str, part: Part) -> Path:
        """Where an image is, or what belongs to it."""
        return self.images / f"{self.image_name(index, sha256)}{_SUFFIXES[part]}"

    def read_record(self) -> TrainingRecord:
        return TrainingRecord.from_json((self.path / "spec.json").read_bytes())

    def write_record(self, record: TrainingRecord) -> None:
        write_atomically(self.path / "spec.json", record.to_json())

    def read_state(self) -> TrainingState:
        return TrainingState.from_json((self.path / "state.json").read_bytes())

    def write_state(self, state: TrainingState) -> None:
        """When this returns, the state survives a power cut."""
        with storage_errors():
            write_atomically(self.path / "state.json", state.to_json())
            sync_path(self.path)

    def shed(self) -> None:
        """Remove what a training that has ended needs no more: images and checkpoint."""
        with storage_errors():
            shutil.rmtree(self.images, ignore_errors=True)
            self.checkpoint.unlink(missing_ok=True)
            self.lock.unlink(missing_ok=True)


@contextmanager
def storage_errors() -> Generator[None]:
    """Turn what the disk refuses into `StorageFull` or `StoreError`."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise StorageFull(
                "the disk of the trainings is full; delete trainings that have ended, or make room"
            ) from error
        raise StoreError(
            f"the trainings cannot be stored now: {error.strerror}; see to their disk"
        ) from error
