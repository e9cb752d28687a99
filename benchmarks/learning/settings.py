"""The courses of learning that are compared."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer import objective
from trainer.precision import Precision

PEER = "diffusers' script"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A course: how it differs from the default one."""

    options: dict[str, Any] = field(default_factory=dict[str, Any])  # of LearnOptions
    coarse_word: bool = False  # starts from the word that the script is given, too
    stratified: bool = True  # one timestep in each part of the schedule
    precision: Precision = "bfloat16"


_SHORT: dict[str, Any] = {"steps": 150, "eval_every": 25}  # a tenth of the script's samples


def _from_word(
    *, precision: Precision = "bfloat16", stratified: bool = True, **options: Any
) -> Setting:
    return Setting(
        options=_SHORT | options, coarse_word=True, stratified=stratified, precision=precision
    )


# The first is what others are compared with. All but "no word" start from the coarse word, as the
# script does.
SETTINGS: dict[str, Setting] = {
    "150 steps": _from_word(),
    "float32": _from_word(precision="float32"),
    "independent timesteps": _from_word(stratified=False),
    "dti": _from_word(optimizer="dti"),
    "adamw": _from_word(optimizer="adamw"),
    "dvar": _from_word(stop="dvar", eval_every=5, stop_window=10),
    "4 vectors": _from_word(num_vectors=4),
    "400 steps": _from_word(steps=400),
    "default, no word": Setting(),
    "150 steps, searched word": Setting(options=_SHORT | {"initializer_token": "auto"}),
}

# Measured once, found to make no difference and removed from the trainer: samples in pairs of
# opposite noise, and four fifths of the timesteps biased to noise (logit-normal, mean 1).
REMOVED = ("antithetic noise", "timestep focus 0.8")


@contextmanager
def independent_timesteps() -> Generator[None]:
    """Training with timesteps that know nothing of each other, as other trainers draw them."""

    def independent(batch_size: int, timesteps: int, generator: torch.Generator):
        return torch.randint(timesteps, (batch_size,), generator=generator)

    stratified = objective.stratified_timesteps
    objective.stratified_timesteps = independent
    try:
        yield
    finally:
        objective.stratified_timesteps = stratified
