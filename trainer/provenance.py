"""Where results come from: what concepts and reports say of how they came to be."""

import dataclasses
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from trainer.image_tower import ImageTower
from trainer.images import TrainingImages
from trainer.model import DiffusionModel
from trainer.options import LearnOptions
from trainer.run import LearnState


def concept_metadata(
    state: LearnState,
    options: LearnOptions,
    images: TrainingImages,
    model: DiffusionModel,
    towers: Sequence[ImageTower] = (),
) -> dict[str, str]:
    """How a concept came to be, as written into its file."""
    given = {
        name: str(value)
        for name, value in dataclasses.asdict(options).items()
        if value is not None and not isinstance(value, tuple)
    }
    if options.initializer_candidates:
        given["initializer_candidates"] = json.dumps(options.initializer_candidates)
    return {
        **given,
        "learning_rate": f"{options.rate}{' of a word' if options.rate_is_relative else ''}",
        "regularization": str(options.pull),
        **_searched(state),
        **_guided(state, towers),
        "best_step": str(state.best_step),  # whose vectors these are
        "initial_evaluation_loss": f"{state.initial_evaluation_loss:.6f}",
        "final_evaluation_loss": f"{state.best_evaluation_loss:.6f}",
        "image_sha256": json.dumps(images.sha256),
        "model_name": model.name,
        "precision": str(model.unet.dtype).removeprefix("torch."),  # of the denoiser
        "trainer_version": software_version(),
        "date": now(),
    }


def _searched(state: LearnState) -> dict[str, str]:
    """What a search for the initializer found: the word, and all that were compared with it."""
    if not state.initializers:
        return {}
    return {
        "initializer_token": state.initializers[0].word,
        "initializer_losses": json.dumps(dict(state.initializers)),
    }


def _guided(state: LearnState, towers: Sequence[ImageTower]) -> dict[str, str]:
    """Which image towers had a say in where the vectors started, and what a warm start gained."""
    if not towers:
        return {}
    said = {"image_towers": json.dumps({tower.name: tower.identity for tower in towers})}
    if state.warmth:
        said["initial_similarity"] = f"{state.warmth.before:.6f}"
        said["warm_similarity"] = f"{state.warmth.after:.6f}"
    return said


def software_version() -> str:
    """Name and version of this software."""
    try:
        return f"oneword {version('oneword')}"
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "oneword (not installed)"


def now() -> str:
    """Date and time in UTC, to the second (ISO 8601)."""
    return datetime.now(UTC).isoformat(timespec="seconds")
