"""How a server learns: what `oneword serve` can be told about it."""

from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import ConfigError
from engine.training.spec import TrainingLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """What `oneword serve` can be told about learning."""

    training_model: Path | None = None  # diffusers folder; None: this server does not learn
    training_dir: Path | None = None  # None: beside the stored concepts
    training_device: str | None = None  # PyTorch's name; None: a GPU if it has one
    max_training_jobs: int = 1  # that learn at the same time
    max_queued_trainings: int = 16  # that wait; more are refused
    checkpoint_every_s: float = 5.0  # what a killed process loses at most, besides a step
    max_attempts: int = 3  # of a training whose process or server dies of it
    retry_delay_s: float = 5.0  # between a crash and the next attempt
    stop_grace_s: float = 20.0  # for a process to save when it is told to stop
    upload_timeout_s: float = 600.0  # from the spec to the last image
    limits: TrainingLimits = field(default_factory=TrainingLimits)

    def __post_init__(self) -> None:
        for name in ("max_training_jobs", "max_queued_trainings", "max_attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("checkpoint_every_s", "retry_delay_s", "stop_grace_s", "upload_timeout_s"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
