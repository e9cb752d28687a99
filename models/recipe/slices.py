"""A training in slices on machines that keep nothing: its state as a few small files.

A checkpoint of `base` is 236 MB. What travels is a fifth of it: the weights in float16, their
average as its difference from them in 8 bits, and no optimizer. The cost: AdamW gathers its moments
anew while the rate warms up again, 51,200 images of 6 million, and the latents are encoded again.
"""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.staging import staged_folder
from models.recipe.archives import unpack
from models.recipe.courses import read_checkpoint
from models.recipe.errors import RecipeError
from models.recipe.stages import Recipe
from trainer.messages import first_line

PART_BYTES = 15 << 20
MAX_PARTS = 4  # 60 MiB in all, beside the list of the parts
_LIST = "state.json"
_COURSES = ("autoencoder", "denoiser")
_FOLDERS = ("vae", "tokenizer")
_CPU = torch.device("cpu")


def pack_state(recipe: Recipe, target: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Writes where a training stands into files of at most `part_bytes`; returns them.

    Errors:
        RecipeError: there is nothing to pack yet, it is too large, or it cannot be written.
    """
    archive = _archive(recipe)
    parts = [archive[at : at + part_bytes] for at in range(0, len(archive), part_bytes)]
    if len(parts) > MAX_PARTS:
        raise RecipeError(
            f"the state of {recipe.folder} is {len(archive):,} bytes, more than {MAX_PARTS} files "
            f"of {part_bytes:,}; carry the checkpoints of this setting whole"
        )
    names = [f"state.{place:02d}" for place in range(len(parts))]
    listed = {
        "setting": recipe.setting.name,
        "parts": {
            name: hashlib.sha256(part).hexdigest() for name, part in zip(names, parts, strict=True)
        },
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, part in zip(names, parts, strict=True):
            (target / name).write_bytes(part)
        (target / _LIST).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot write the state to {target}: {first_line(error)}") from error
    return [target / name for name in (_LIST, *names)]


def unpack_state(recipe: Recipe, source: Path) -> None:
    """Puts a packed state in the recipe's folder, from which `train` goes on.

    Errors:
        RecipeError: a part is missing or damaged, the state is of another setting, or the folder
            is not empty.
    """
    if recipe.folder.is_dir() and any(recipe.folder.iterdir()):
        raise RecipeError(f"{recipe.folder} is not empty; move it away to unpack {source} there")
    archive = _joined(recipe, source)
    try:
        with staged_folder(recipe.folder) as staging:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                unpack(tar, staging)
            for course in _COURSES:
                path = staging / f"{course}.compact"
                if path.is_file():
                    state = expanded(read_checkpoint(path, _CPU))
                    torch.save(state, staging / f"{course}.pt")
                    path.unlink()
    except (OSError, tarfile.TarError) as error:
        raise RecipeError(
            f"cannot unpack {source} to {recipe.folder}: {first_line(error)}"
        ) from error


def compacted(state: dict[str, Any]) -> dict[str, Any]:
    """A course's checkpoint without its optimizer, in three bytes a weight."""
    weights = {name: _to_half(value) for name, value in state["module"].items()}
    differences = {
        name: _quantized(value - weights[name].float())
        for name, value in state["average"].items()
        if value.is_floating_point()
    }
    return {
        "images": state["images"],
        "losses": state["losses"],
        "module": weights,
        "differences": differences,
    }


def expanded(state: dict[str, Any]) -> dict[str, Any]:
    """What `Course` goes on from: float32 again, and no optimizer."""
    module = {name: _to_float(value) for name, value in state["module"].items()}
    average = dict(module)
    for name, (values, scale) in state["differences"].items():
        average[name] = module[name] + values.float() * scale
    return {
        "images": state["images"],
        "losses": state["losses"],
        "module": module,
        "average": average,
    }


def _quantized(difference: Tensor) -> tuple[Tensor, float]:
    """The tensor in steps of a 127th of its largest value."""
    scale = float(difference.abs().max()) / 127
    return (difference / max(scale, 1e-30)).round().to(torch.int8), scale


def _to_half(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


def _to_float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _archive(recipe: Recipe) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in _FOLDERS:
            if (recipe.folder / name).is_dir():
                tar.add(recipe.folder / name, name)
        for course in _COURSES:
            finished = course == "autoencoder" and (recipe.folder / "vae").is_dir()
            path = recipe.folder / f"{course}.pt"
            if path.is_file() and not finished:
                _add_compacted(tar, path)
            log = path.with_suffix(".log")
            if log.is_file():
                tar.add(log, log.name)
        if not tar.getmembers():
            raise RecipeError(f"there is no training in {recipe.folder} to pack yet")
    return stream.getvalue()


def _add_compacted(tar: tarfile.TarFile, path: Path) -> None:
    stream = io.BytesIO()
    torch.save(compacted(read_checkpoint(path, _CPU)), stream)
    entry = tarfile.TarInfo(f"{path.stem}.compact")
    entry.size = stream.tell()
    stream.seek(0)
    tar.addfile(entry, stream)


def _joined(recipe: Recipe, source: Path) -> bytes:
    """The archive in the parts of a packed state, each checked."""
    try:
        listed = json.loads((source / _LIST).read_text(encoding="utf-8"))
        setting, sums = str(listed["setting"]), dict[str, str](listed["parts"])
        parts = {name: (source / name).read_bytes() for name in sums}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{source} holds no whole state: {first_line(error)}") from error
    if setting != recipe.setting.name:
        raise RecipeError(
            f"{source} is a state of --setting {setting}, not of {recipe.setting.name}"
        )
    for name, part in parts.items():
        if hashlib.sha256(part).hexdigest() != sums[name]:
            raise RecipeError(f"{source / name} is damaged; copy it again")
    return b"".join(parts.values())
