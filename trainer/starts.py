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
    model: DiffusionModel, starts: Sequence[Start], generator: torch.Generator
) -> Vectors:
    """The vectors of all, one below another. Raises `LearningError` for a phrase without tokens."""
    return torch.cat([_vectors(model, start, generator) for start in starts])


def _vectors(model: DiffusionModel, start: Start, generator: torch.Generator) -> Vectors:
    if not start.nudged:
        return phrase_vectors(model, start.initializer_token, start.num_vectors)
    return initial_vectors(
        model,
        initializer_token=start.initializer_token,
        num_vectors=start.num_vectors,
        generator=generator,
    )
