"""Checkpoints: a run's state and what it belongs to, in one file that is whole or absent."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from engine.files import write_atomically
from trainer.course import course_from_tensors, course_steps, course_tensors
from trainer.errors import CheckpointError
from trainer.fingerprint import model_fingerprint
from trainer.image_tower import ImageTower
from trainer.images import TrainingImages
from trainer.initializer_search import RankedWord
from trainer.model import DiffusionModel
from trainer.options import LearnOptions
from trainer.run import LearnState
from trainer.warm_start import Warmth

FORMAT = "oneword-checkpoint/5"
_TENSORS = (
    "vectors",
    "first_moment",
    "second_moment",
    "initial_vectors",
    "best_vectors",
    "good_vectors",
    "good_first_moment",
    "good_second_moment",
    "rng_state",
)
_SCALARS = tuple(
    field.name
    for field in dataclasses.fields(LearnState)
    if field.name not in (*_TENSORS, "course")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """What must be the same for a run to go on as if it had never stopped."""

    options: Mapping[str, Any]  # fields of LearnOptions
    placeholder_token: str  # of the concept that the run ends in
    images: tuple[str, ...]  # SHA-256 of the files, in order
    masks: str  # SHA-256 of the masks as they are used; "" without any
    captions: str  # SHA-256 of the captions; "" without any
    model: str  # `model_fingerprint`
    towers: tuple[str, ...]  # identities of the image towers, in order

    @classmethod
    def of(
        cls,
        model: DiffusionModel,
        images: TrainingImages,
        options: LearnOptions,
        *,
        placeholder_token: str,
        towers: Sequence[ImageTower] = (),
        fingerprint: str | None = None,
    ) -> Self:
        """`fingerprint` is that of the model, where it has been computed already."""
        return cls(
            options=json.loads(json.dumps(dataclasses.asdict(options))),  # as it will be read
            placeholder_token=placeholder_token,
            images=images.sha256,
            masks="" if images.masks is None else _digest(images.masks.numpy().tobytes()),
            captions=_digest(json.dumps(images.captions).encode()) if images.captions else "",
            model=fingerprint or model_fingerprint(model),
            towers=tuple(tower.identity for tower in towers),
        )

    def differences(self, other: "RunIdentity") -> list[str]:
        """In words, what differs between this run and the one that wrote a checkpoint."""
        now = {**self.options, "placeholder_token": self.placeholder_token}
        then = {**other.options, "placeholder_token": other.placeholder_token}
        found = [
            f"{name} is {now.get(name)!r}, it was {then.get(name)!r}"
            for name in sorted(now.keys() | then.keys())
            if now.get(name) != then.get(name)
        ]
        if self.images != other.images:
            found.append(f"the images differ ({len(self.images)} now, {len(other.images)} then)")
        if self.masks != other.masks:
            found.append("the masks differ")
        if self.captions != other.captions:
            found.append("the captions differ")
        if self.model != other.model:
            found.append("the model is another one")
        if self.towers != other.towers:
            found.append("the image towers differ")
        return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_checkpoint(path: Path, state: LearnState, identity: RunIdentity) -> None:
    """Write a checkpoint, whole or not at all: a kill leaves the one before."""
    tensors = {name: getattr(state, name).clone() for name in _TENSORS}
    tensors |= course_tensors(state.course)
    metadata = {
        "format": FORMAT,
        # Python writes floats so that reading them gives the same bits.
        "state": json.dumps({name: getattr(state, name) for name in _SCALARS}),
        "course": json.dumps(course_steps(state.course)),
        "identity": json.dumps(dataclasses.asdict(identity)),
    }
    write_atomically(path, save_safetensors(tensors, metadata=metadata))


def read_checkpoint(path: Path, identity: RunIdentity) -> LearnState:
    """Read a checkpoint for the run `identity`.

    Raises `CheckpointError` if it is missing, broken or of another run, and says what differs.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {error.strerror}; start without --resume"
        ) from error
    state, written_by = _parse(content, path)
    if differences := identity.differences(written_by):
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(differences)}; "
            "use the same settings, or delete it and start anew without --resume"
        )
    return state


def _parse(content: bytes, path: Path) -> tuple[LearnState, RunIdentity]:
    try:
        tensors = load_safetensors(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {metadata['format']!r}, expected {FORMAT!r}; delete it "
                "and start anew without --resume"
            )
        identity = json.loads(metadata["identity"])
        course = course_from_tensors(tensors, json.loads(metadata["course"]))
        state = LearnState(**_checked(tensors), **_scalars(metadata["state"]), course=course)
        return state, RunIdentity(
            options=identity["options"],
            placeholder_token=identity["placeholder_token"],
            images=tuple(identity["images"]),
            masks=identity["masks"],
            captions=identity["captions"],
            model=identity["model"],
            towers=tuple(identity["towers"]),
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint or is damaged ({error}); delete it and start anew "
            "without --resume"
        ) from error


def _scalars(text: str) -> dict[str, Any]:
    """What JSON has as lists is tuples in a state."""
    scalars = json.loads(text)
    return {
        **scalars,
        "evaluation_losses": tuple(scalars["evaluation_losses"]),
        "initializers": tuple(RankedWord(*ranked) for ranked in scalars["initializers"]),
        "warmth": scalars["warmth"] and Warmth(*scalars["warmth"]),
    }


def _checked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if set(tensors) != set(_TENSORS):
        raise ValueError(f"it holds {sorted(tensors)}")
    shape = tuple(tensors["vectors"].shape)
    for name in _TENSORS:
        expected = torch.uint8 if name == "rng_state" else torch.float32
        found = tuple(tensors[name].shape)
        if tensors[name].dtype != expected or not (
            name == "rng_state" or _fits(name, found, shape)
        ):
            raise ValueError(f"{name} is {tensors[name].dtype} {found}")
    return dict(tensors)


def _fits(name: str, found: tuple[int, ...], vectors: tuple[int, ...]) -> bool:
    """Whether a tensor of a state has a shape that it can have beside the vectors."""
    if len(found) != 2 or found[1:] != vectors[1:]:
        return False
    rows = {
        "initial_vectors": found[0] >= vectors[0],  # with those that have yet to join
        "best_vectors": 1 <= found[0] <= vectors[0],  # without those that are dropped at the end
    }
    return rows.get(name, found == vectors)
