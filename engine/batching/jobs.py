"""A submitted request on its way through the batcher, and an image of it that is in flight."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.batching.events import Event, Failed, Finished, Timings
from engine.batching.model import InFlight
from engine.batching.step_costs import CostTable
from engine.errors import Cancelled, DeadlineExceeded, EngineError
from engine.faults import log_fault
from engine.planner import GenerationPlan

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """A submitted request: the caller's handle, and the worker's notes."""

    plan: GenerationPlan
    on_event: Callable[[Event], None]
    tenant: str
    priority: int = 0  # 0 to MAX_PRIORITY, higher first
    deadline: float | None = None  # of the batcher's clock, or None
    number: int = 0  # of its arrival
    image_us: int = 1  # device time of one of its images in full calls, predicted at arrival
    alone_s: float = 0.0  # the same with the device to itself: it cannot be done in less
    queue_position: int = 0  # images that waited when it came
    result_keys: tuple[bytes, ...] = ()  # of its images in the result cache, if it may use it
    clock: Callable[[], float] = time.monotonic
    on_cancel: Callable[[], None] = lambda: None  # so that no step is begun for it meanwhile
    submitted: float = 0.0
    cancelled: bool = False
    closed: bool = False
    waiting: deque[int] = field(default_factory=deque[int])  # images that no slot has taken yet
    images: dict[int, InFlight] | None = None  # of those, once begun
    images_left: int = 0  # to be told
    deaths: int = 0  # of workers in a call of this request
    begun: float | None = None
    decode_s: float = 0.0
    denoiser_calls: int = 0
    batch_rows: int = 0

    def __post_init__(self) -> None:
        self.submitted = self.clock()
        self.images_left = self.plan.request.num_images
        self.waiting.extend(range(self.images_left))

    @property
    def area(self) -> int:
        """Pixels of one image."""
        return self.plan.width * self.plan.height

    @property
    def rows(self) -> int:
        """Denoiser rows of one image, in the calls that are guided."""
        return len(self.plan.weights)

    @property
    def num_steps(self) -> int:
        return len(self.plan.trajectory.rows)

    def predict(self, costs: CostTable) -> None:
        """Note what it costs by what is known now."""
        of_image = self.costs_of(self.num_steps)
        self.image_us = costs.image_us(**of_image)
        self.alone_s = costs.alone_ms(**of_image) / 1e3

    def costs_of(self, steps_left: int) -> dict[str, int]:
        """One image with so many steps left, in the words of `CostTable`."""
        guided = self.plan.guided_calls.num_left(self.num_steps - steps_left)
        return {
            "area": self.area,
            "rows": self.rows,
            "num_steps": steps_left,
            "num_single": steps_left - guided,
        }

    def cancel(self) -> None:
        """Leave at the next step; a request that is already closed stays as it is."""
        self.cancelled = True
        self.on_cancel()

    def emit(self, event: Event) -> None:
        if self.closed:
            return
        self.closed = isinstance(event, Finished | Failed)
        try:
            self.on_event(event)
        except Exception as error:
            log_fault(logger, error, "a listener failed; its request is dropped")
            self.cancelled = True

    def fail(self, error: Exception) -> None:
        self.emit(Failed(error=error))

    def reason_to_drop(self, now: float, least_left_s: float = 0.0) -> EngineError | None:
        """Why it must leave, if so; `least_left_s` is what it needs in any case."""
        if self.cancelled:
            return Cancelled("the request was cancelled")
        if self.deadline is None or now + least_left_s < self.deadline:
            return None
        if now >= self.deadline:
            what = f"the deadline passed after {now - self.submitted:.3f} s"
        else:
            what = (
                f"the deadline cannot be met: {least_left_s:.3f} s of work are left, "
                f"{self.deadline - now:.3f} s are allowed"
            )
        return DeadlineExceeded(f"{what}; allow more time, or ask for fewer steps or images")

    def timings(self) -> Timings:
        now = self.clock()
        begun = now if self.begun is None else self.begun
        return Timings(
            queue_wait_ms=1e3 * (begun - self.submitted),
            denoise_ms=1e3 * (now - begun - self.decode_s),
            decode_ms=1e3 * self.decode_s,
            total_ms=1e3 * (now - self.submitted),
            denoiser_calls=self.denoiser_calls,
            mean_batch_rows=self.batch_rows / max(self.denoiser_calls, 1),
        )


@dataclass(slots=True, eq=False)
class Slot:
    """An admitted image."""

    job: Job
    index: int
    image: InFlight
    passed_over: int = 0  # calls since its last step

    @property
    def is_wanted(self) -> bool:
        return not (self.job.cancelled or self.job.closed)

    @property
    def steps_left(self) -> int:
        return self.image.num_steps - self.image.steps_done

    def remaining_us(self, costs: CostTable) -> int:
        """Device time until it is done, in full calls."""
        return costs.image_us(**self.job.costs_of(self.steps_left))

    def alone_us(self, costs: CostTable) -> float:
        """Time until it is done, with the device to itself."""
        return 1e3 * costs.alone_ms(**self.job.costs_of(self.steps_left))


def jobs_of(slots: Sequence[Slot]) -> list[Job]:
    """The requests of these images, each once."""
    return list({id(slot.job): slot.job for slot in slots}.values())
