"""How much is measured: the whole page in about two hours on two cores, or a trial in seconds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers import BUNDLE

# By share of the capacity, in how many runs of each system it is measured; even and odd ones take
# the systems in opposite orders. A p99 is that of few images and differs much between few
# requests, most of all where few wait for others.
LATENCY_RUNS = {0.5: 6, 0.8: 6, 1.0: 4, 1.2: 3}
LOAD_RUNS = {0.5: 2, 0.8: 2, 1.0: 2, 1.2: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Counts and times of all parts."""

    bundle: Path = BUNDLE
    overhead_rounds: int = 60
    overhead_steps: int = 20
    # Of all points together; from it follows how many requests a run has.
    latency_s: float = 5700.0
    latency_runs: Mapping[float, int] = field(default_factory=LATENCY_RUNS.copy)
    load_s: float = 800.0
    load_runs: Mapping[float, int] = field(default_factory=LOAD_RUNS.copy)
    capacity_requests: int = 60
    max_run_requests: int = 600
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
            latency_runs=dict.fromkeys(LATENCY_RUNS, 2),
            load_s=15.0,
            capacity_requests=10,
            max_run_requests=5,
            cancels=4,
            shed_probes=20,
            publications=3,
            heap_requests=160,
            heap_samples=8,
        )
