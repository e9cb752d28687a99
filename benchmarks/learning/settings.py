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


# The first is what others are compared with. All but "no word" start from the coarse word, as the
# script does; the default without an initializer is "no word".
SETTINGS: dict[str, Setting] = {
    "default": Setting(coarse_word=True),
    "no word": Setting(),
    "searched word": Setting(options={"initializer_token": "auto"}),
    "float32": Setting(coarse_word=True, precision="float32"),
    "400 steps": Setting(coarse_word=True, options={"steps": 400}),
    "independent timesteps": Setting(coarse_word=True, stratified=False),
    "antithetic noise": Setting(coarse_word=True, options={"antithetic": True}),
    "timestep focus 0.8": Setting(coarse_word=True, options={"timestep_focus": 0.8}),
    "dti": Setting(coarse_word=True, options={"optimizer": "dti"}),
    "adamw": Setting(coarse_word=True, options={"optimizer": "adamw"}),
    "dvar": Setting(coarse_word=True, options={"stop": "dvar", "eval_every": 5, "stop_window": 10}),
    "4 vectors": Setting(coarse_word=True, options={"num_vectors": 4}),
}


@contextmanager
def independent_timesteps() -> Generator[None]:
    """Training with timesteps that know nothing of each other, as other trainers draw them."""

    def independent(batch_size: int, timesteps: int, generator: torch.Generator, **_: float):
        return torch.randint(timesteps, (batch_size,), generator=generator)

    stratified = objective.stratified_timesteps
    objective.stratified_timesteps = independent
    try:
        yield
    finally:
        objective.stratified_timesteps = stratified
