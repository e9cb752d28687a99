"""Where the vectors of a run start: one phrase after another."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainer.initializer import initial_vectors, phrase_vectors
from trainer.model import DiffusionModel
from trainer.objective import Vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Vectors that start from the same phrase."""

    initializer_token: str | None  # None: the mean of the vocabulary
    num_vectors: int
    nudged: bool = True  # apart; not those of which each joins when the others have moved


def starting_vectors(
    model: DiffusionModel,
    starts: Sequence[Start],
    generator: torch.Generator,
    *,
    cross: bool = False,
) -> Vectors:
    """The vectors of all, one below another; with `cross` as the text encoder gives them out.

    Raises `LearningError` for a phrase without tokens, or with too many.
    """
    return torch.cat([_vectors(model, start, generator, cross) for start in starts])


def _vectors(
    model: DiffusionModel, start: Start, generator: torch.Generator, cross: bool
) -> Vectors:
    if not start.nudged:
        return phrase_vectors(model, start.initializer_token, start.num_vectors, cross=cross)
    return initial_vectors(
        model,
        initializer_token=start.initializer_token,
        num_vectors=start.num_vectors,
        generator=generator,
        cross=cross,
    )
