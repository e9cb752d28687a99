"""Checkpoints: a run's state and what it belongs to, in one file that is whole or absent."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from engine.files import write_atomically
from trainer.errors import CheckpointError
from trainer.images import TrainingImages
from trainer.learning import LearnOptions, LearnState
from trainer.model import DiffusionModel

FORMAT = "oneword-checkpoint/1"
_TENSORS = ("vectors", "first_moment", "second_moment", "best_vectors", "rng_state")
_SCALARS = tuple(
    field.name for field in dataclasses.fields(LearnState) if field.name not in _TENSORS
)
# Enough of each weight to tell a fine-tune from its origin, without reading gigabytes.
_VALUES_PER_WEIGHT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """What must be the same for a run to go on as if it had never stopped."""

    options: Mapping[str, Any]  # fields of LearnOptions
    images: tuple[str, ...]  # SHA-256 of the files, in order
    model: str  # `model_fingerprint`

    @classmethod
    def of(cls, model: DiffusionModel, images: TrainingImages, options: LearnOptions) -> Self:
        return cls(
            options=dataclasses.asdict(options),
            images=images.sha256,
            model=model_fingerprint(model),
        )

    def differences(self, other: "RunIdentity") -> list[str]:
        """In words, what differs between this run and the one that wrote a checkpoint."""
        names = sorted(self.options.keys() | other.options.keys())
        found = [
            f"{name} is {self.options.get(name)!r}, it was {other.options.get(name)!r}"
            for name in names
            if self.options.get(name) != other.options.get(name)
        ]
        if self.images != other.images:
            found.append(f"the images differ ({len(self.images)} now, {len(other.images)} then)")
        if self.model != other.model:
            found.append("the model is another one")
        return found


def model_fingerprint(model: DiffusionModel) -> str:
    """SHA-256 over the names, shapes and first values of all weights, and the noise schedule."""
    schedule = json.dumps(model.scheduler_config, sort_keys=True, default=str)
    digest = hashlib.sha256(schedule.encode())
    for part in (model.text_encoder, model.unet, model.vae):
        for name, weight in part.state_dict().items():
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            values = weight.flatten()[:_VALUES_PER_WEIGHT].float().cpu().contiguous()
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def write_checkpoint(path: Path, state: LearnState, identity: RunIdentity) -> None:
    """Write a checkpoint, whole or not at all: a kill leaves the one before."""
    tensors = {name: getattr(state, name).clone() for name in _TENSORS}
    metadata = {
        "format": FORMAT,
        # Python writes floats so that reading them gives the same bits.
        "state": json.dumps({name: getattr(state, name) for name in _SCALARS}),
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
            "use the same settings, or start anew without --resume"
        )
    return state


def _parse(content: bytes, path: Path) -> tuple[LearnState, RunIdentity]:
    try:
        tensors = load_safetensors(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {metadata['format']!r}, expected {FORMAT!r}")
        identity = json.loads(metadata["identity"])
        state = LearnState(**_checked(tensors), **json.loads(metadata["state"]))
        return state, RunIdentity(
            options=identity["options"],
            images=tuple(identity["images"]),
            model=identity["model"],
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint or is damaged ({error}); start anew without --resume"
        ) from error


def _checked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if set(tensors) != set(_TENSORS):
        raise ValueError(f"it holds {sorted(tensors)}")
    shape = tensors["vectors"].shape
    for name in _TENSORS:
        expected = torch.uint8 if name == "rng_state" else torch.float32
        wrong_shape = name != "rng_state" and tensors[name].shape != shape
        if tensors[name].dtype != expected or wrong_shape:
            raise ValueError(f"{name} is {tensors[name].dtype} {tuple(tensors[name].shape)}")
    return dict(tensors)
