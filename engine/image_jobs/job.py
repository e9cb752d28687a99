"""A job, and what jobs may take up: plain values."""

from dataclasses import dataclass
from typing import Literal

from engine.errors import ConfigError

Status = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
ENDED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLimits:
    """What jobs may take up, for each tenant."""

    max_open_jobs: int = 1000  # that have not ended
    keep_s: float = 24 * 3600.0  # after its end
    max_kept_bytes: int = 4 << 30  # of images; beyond, the oldest ended jobs are forgotten

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageJob:
    """A job as it is on disk, without its images."""

    job_id: str
    tenant: str
    request_id: str  # of its caller; "" for none
    body: bytes  # digest of the request
    shown: bytes  # GenerateRequest without files
    priority: int
    status: Status
    create_time: float  # seconds since the epoch, UTC
    start_time: float | None
    end_time: float | None
    attempts: int  # to carry it out, the present one included
    failure: bytes | None  # Failure
    summary: bytes | None  # Summary
    num_images_done: int

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED
