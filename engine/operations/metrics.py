"""What the server counts: plain numbers, for `oneword status`, and for Prometheus if it is asked.

No label takes a value that a caller can invent: methods and reasons come from lists of ours, and
tenants are told apart only as far as the operator allows. A counter that grew a row for each name
that somebody sends would be a way to fill the server's memory.
"""

import dataclasses
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Labels = tuple[str, ...]
OTHER = "other"

RPC_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ROWS = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)


class Counter:
    """A sum that only grows, for each value of its labels; for any thread."""

    def __init__(self, name: str, summary: str, labels: Labels = ()) -> None:
        self.name = name
        self.summary = summary
        self.labels = labels
        self._lock = threading.Lock()
        self._sums: dict[Labels, float] = {} if labels else {(): 0.0}

    def add(self, *labels: str, by: float = 1.0) -> None:
        with self._lock:
            self._sums[labels] = self._sums.get(labels, 0.0) + by

    def read(self) -> dict[Labels, float]:
        with self._lock:
            return dict(self._sums)

    @property
    def total(self) -> float:
        return sum(self.read().values())

    def by_label(self) -> dict[str, int]:
        """Of a counter with one label, in whole numbers."""
        return {labels[0]: round(value) for labels, value in self.read().items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """How many observations were at most as large as each bound, and their sum."""

    counts: tuple[int, ...]  # between one bound and the next; the last one has what is larger
    sum: float

    @property
    def count(self) -> int:
        return sum(self.counts)


class Histogram:
    """A distribution for each value of its labels; for any thread."""

    def __init__(
        self, name: str, summary: str, bounds: tuple[float, ...], labels: Labels = ()
    ) -> None:
        self.name = name
        self.summary = summary
        self.bounds = bounds
        self.labels = labels
        self._lock = threading.Lock()
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def observe(self, value: float, *labels: str) -> None:
        with self._lock:
            if labels not in self._counts:
                self._counts[labels] = [0] * (len(self.bounds) + 1)
            self._counts[labels][bisect_left(self.bounds, value)] += 1
            self._sums[labels] = self._sums.get(labels, 0.0) + value

    def read(self) -> dict[Labels, Distribution]:
        with self._lock:
            return {
                labels: Distribution(counts=tuple(counts), sum=self._sums[labels])
                for labels, counts in self._counts.items()
            }

    def of(self, *labels: str) -> Distribution:
        nothing = Distribution(counts=(0,) * (len(self.bounds) + 1), sum=0.0)
        return self.read().get(labels, nothing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauge:
    """A value that is looked up when somebody asks; the labels' values are its keys."""

    name: str
    summary: str
    labels: Labels = ()
    read: Callable[[], Mapping[Labels, float]]


@dataclass(slots=True, kw_only=True, eq=False)
class Metrics:
    """All that is counted, from the start of the server to its end, whatever bundle it serves."""

    max_tenants: int = 0  # told apart by name; the rest are "other". 0: none
    started: float = field(default_factory=time.monotonic)
    rpcs: Counter = field(
        default_factory=lambda: Counter(
            "oneword_rpcs", "Calls that ended, by method and status code.", ("method", "code")
        )
    )
    rpc_seconds: Histogram = field(
        default_factory=lambda: Histogram(
            "oneword_rpc_seconds", "Duration of calls.", RPC_SECONDS, ("method",)
        )
    )
    requests: Counter = field(
        default_factory=lambda: Counter(
            "oneword_requests", "Requests for images that the batcher took, by end.", ("outcome",)
        )
    )
    shed: Counter = field(
        default_factory=lambda: Counter(
            "oneword_shed", "Requests refused at once for want of room or time.", ("reason",)
        )
    )
    cancelled: Counter = field(
        default_factory=lambda: Counter(
            "oneword_cancelled", "Requests given up before their end.", ("reason",)
        )
    )
    deadline_missed: Counter = field(
        default_factory=lambda: Counter(
            "oneword_deadline_missed", "Requests whose deadline passed while they waited or ran."
        )
    )
    queue_wait_seconds: Histogram = field(
        default_factory=lambda: Histogram(
            "oneword_queue_wait_seconds", "From a request to its first slot.", RPC_SECONDS
        )
    )
    stage_seconds: Histogram = field(
        default_factory=lambda: Histogram(
            "oneword_stage_seconds",
            "Time of a finished request in each stage; calls that it shared count in full.",
            RPC_SECONDS,
            ("stage",),
        )
    )
    step_seconds: Histogram = field(
        default_factory=lambda: Histogram(
            "oneword_step_seconds", "Duration of a denoiser call.", STEP_SECONDS
        )
    )
    batch_rows: Histogram = field(
        default_factory=lambda: Histogram(
            "oneword_batch_rows", "Rows of a denoiser call; guidance makes two of an image.", ROWS
        )
    )
    images: Counter = field(
        default_factory=lambda: Counter("oneword_images", "Images that were finished.")
    )
    tenant_images: Counter = field(
        default_factory=lambda: Counter(
            "oneword_tenant_images", "Images that were finished, by tenant.", ("tenant",)
        )
    )
    cache_hits: Counter = field(
        default_factory=lambda: Counter(
            "oneword_cache_hits", "Images that were not drawn again.", ("cache",)
        )
    )
    worker_restarts: Counter = field(
        default_factory=lambda: Counter(
            "oneword_worker_restarts", "Times that the model's process was started again."
        )
    )
    gauges: list[Gauge] = field(default_factory=list[Gauge])
    _tenants: set[str] = field(default_factory=set[str])
    _model_serves: bool = True

    @property
    def counters(self) -> list[Counter]:
        """All that are to be shown."""
        hidden = None if self.max_tenants else self.tenant_images
        counters = [value for value in self._families() if isinstance(value, Counter)]
        return [counter for counter in counters if counter is not hidden]

    @property
    def histograms(self) -> list[Histogram]:
        return [value for value in self._families() if isinstance(value, Histogram)]

    def _families(self) -> list[object]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self.started

    def count_image(self, tenant: str) -> None:
        self.images.add()
        if self.max_tenants:
            self.tenant_images.add(self._tenant_label(tenant))

    def model_serves(self, serves: bool) -> None:
        """Told of each change: a model that serves again after it did not was started again."""
        if serves and not self._model_serves:
            self.worker_restarts.add()
        self._model_serves = serves

    def _tenant_label(self, tenant: str) -> str:
        if tenant not in self._tenants and len(self._tenants) >= self.max_tenants:
            return OTHER
        self._tenants.add(tenant)
        return tenant
