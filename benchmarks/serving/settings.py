"""How much is measured: the whole page in about 70 minutes on two cores, or a trial in seconds."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import BUNDLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Counts and times of all parts."""

    bundle: Path = BUNDLE
    overhead_rounds: int = 60
    overhead_steps: int = 20
    # Of all points together; from it follows how many requests a point has.
    latency_s: float = 2700.0  # p99 is that of few images, and differs much between few requests
    load_s: float = 800.0
    capacity_requests: int = 60
    max_latency_requests: int = 1200  # of a point
    max_load_requests: int = 400
    cancels: int = 150  # of each kind
    shed_probes: int = 600  # of each kind
    publications: int = 30  # of each kind
    heap_requests: int = 10_000
    heap_samples: int = 40

    @classmethod
    def trial(cls, bundle: Path = BUNDLE) -> "Settings":
        """To see whether everything runs; its figures mean nothing."""
        return cls(
            bundle=bundle,
            overhead_rounds=2,
            overhead_steps=4,
            latency_s=15.0,
            load_s=15.0,
            capacity_requests=10,
            max_latency_requests=10,
            max_load_requests=10,
            cancels=4,
            shed_probes=20,
            publications=3,
            heap_requests=160,
            heap_samples=8,
        )
