"""How much the batcher takes at a time."""

from dataclasses import dataclass

from engine.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class BatcherConfig:
    """Hard limits; within them, measured costs decide. Flags of `oneword serve` carry the names."""

    max_batch_rows: int = 16  # rows of one call at the model's own size; fewer of larger images
    max_images_in_flight: int = 8  # that advance together
    max_queued_images: int = 64  # waiting for a slot; more are refused
    max_queued_ms: int = 60_000  # device time of what waits, as predicted; more is refused
    # Of both limits, for one tenant while others wait. The rest is kept for the others: who holds
    # no more than it may wait even where the queue is full.
    max_tenant_share: float = 0.75
    cost_measurement_s: float = 2.0  # at start-up, on the model itself; 0: learn while serving
    result_cache_bytes: int = 0  # finished images kept for equal requests; 0: none

    def __post_init__(self) -> None:
        for name in (
            "max_batch_rows",
            "max_images_in_flight",
            "max_queued_images",
            "max_queued_ms",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.max_tenant_share <= 1.0:
            raise ConfigError(
                "max_tenant_share must be greater than 0 and at most 1, "
                f"got {self.max_tenant_share}"
            )
        for name in ("cost_measurement_s", "result_cache_bytes"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
