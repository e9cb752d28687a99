"""A batcher whose requests, calls and images are counted, and can all be told to end at once.

It looks on from outside: at what goes into the model and what comes back to the callers. So it
counts the same whatever happens between the two.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.batching.batcher import (
    Batcher,
    BatcherConfig,
    Event,
    Failed,
    Finished,
    ImageDone,
    Job,
    StepDone,
)
from engine.batching.model import Span
from engine.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineError,
    NumericalError,
    QueueFull,
    ShuttingDown,
)
from engine.faults import log_fault
from engine.operations.calls import Call, current_call
from engine.operations.metrics import Metrics
from engine.planner import GenerationPlan

logger = logging.getLogger(__name__)

# How a request that the batcher took can end; what is not here is "failed".
_OUTCOMES: dict[type[Exception], str] = {
    Cancelled: "cancelled",
    DeadlineExceeded: "deadline",
    ShuttingDown: "shutting_down",
    NumericalError: "numerical_error",
}
_GIVEN_UP: dict[type[Exception], str] = {
    Cancelled: "caller",
    DeadlineExceeded: "deadline",
    ShuttingDown: "shutting_down",
}
_SHED: dict[type[Exception], str] = {
    QueueFull: "queue_full",
    DeadlineExceeded: "deadline",
    ShuttingDown: "shutting_down",
}


@dataclass(slots=True, eq=False, kw_only=True)
class Watched:
    """One request in the batcher: what its caller is told goes through here."""

    plan: GenerationPlan
    tenant: str
    call: Call | None
    on_event: Callable[[Event], None]
    observation: "Observation"
    submitting: int = field(default_factory=threading.get_ident)  # the thread
    submitted_ns: int = field(default_factory=time.time_ns)
    encode_s: float = 0.0
    closed: bool = False
    images_left: int = 0
    tell_span: Callable[["Watched", Event], None] | None = None
    _steps: dict[int, int] = field(default_factory=dict[int, int])  # done, by image

    def __post_init__(self) -> None:
        self.images_left = self.plan.request.num_images

    @property
    def row_steps_left(self) -> int:
        """Denoiser rows times steps that are still to do."""
        steps = self.plan.request.num_images * len(self.plan.trajectory.rows)
        return len(self.plan.weights) * (steps - sum(self._steps.values()))

    def tell(self, event: Event) -> None:
        """Pass an event on, from any thread; nothing after the last one."""
        with self.observation.lock:
            if self.closed:
                return
            self.closed = isinstance(event, Finished | Failed)
            if isinstance(event, StepDone):
                self._steps[event.image_index] = event.step
        self.observation.saw(self, event)
        self.on_event(event)


class Observation:
    """The requests of all batchers of a server, now and so far."""

    def __init__(self, metrics: Metrics | None = None) -> None:
        self.metrics = metrics or Metrics()
        self.lock = threading.Lock()
        self.trace: Callable[[], Callable[[Watched, Event], None] | None] = lambda: None
        self._running: dict[int, Watched] = {}

    def running(self) -> list[Watched]:
        """The requests that have not ended."""
        with self.lock:
            return list(self._running.values())

    def abandon(self, error: EngineError) -> int:
        """End every request with an error, whatever the model does just now; returns how many."""
        running = self.running()
        for watched in running:
            try:
                watched.tell(Failed(error=error))
            except Exception as fault:  # of one listener: the others must be told
                log_fault(logger, fault, "a listener failed while its request was abandoned")
        return len(running)

    def watch(
        self, plan: GenerationPlan, on_event: Callable[[Event], None], tenant: str
    ) -> Watched:
        watched = Watched(
            plan=plan,
            tenant=tenant,
            call=current_call(),
            on_event=on_event,
            observation=self,
            tell_span=self.trace(),
        )
        with self.lock:
            self._running[id(watched)] = watched
        return watched

    def refused(self, watched: Watched, error: Exception) -> None:
        """The batcher did not take it."""
        self._forget(watched)
        self.count_shed(error)

    def count_shed(self, error: Exception) -> None:
        if reason := _SHED.get(type(error)):
            self.metrics.shed.add(reason)

    def began(self, plan: GenerationPlan, elapsed_s: float) -> None:
        """The first latents of a request are there, its prompts encoded."""
        for watched in self.running():
            if watched.plan is plan:
                watched.encode_s += elapsed_s

    def saw(self, watched: Watched, event: Event) -> None:
        match event:
            case ImageDone():
                watched.images_left -= 1
                self.metrics.count_image(watched.tenant)
                if threading.get_ident() == watched.submitting:  # no model call was made for it
                    self.metrics.cache_hits.add("result")
            case Finished(timings=timings):
                self._forget(watched)
                self.metrics.requests.add("finished")
                self.metrics.queue_wait_seconds.observe(timings.queue_wait_ms / 1e3)
                denoise_s = max(timings.denoise_ms / 1e3 - watched.encode_s, 0.0)
                self.metrics.stage_seconds.observe(watched.encode_s, "encode")
                self.metrics.stage_seconds.observe(denoise_s, "denoise")
                self.metrics.stage_seconds.observe(timings.decode_ms / 1e3, "decode")
            case Failed(error=error):
                self._forget(watched)
                self._count_failure(error)
            case StepDone():
                pass
        if watched.tell_span is not None:
            watched.tell_span(watched, event)

    def _count_failure(self, error: Exception) -> None:
        self.metrics.requests.add(_OUTCOMES.get(type(error), "failed"))
        if reason := _GIVEN_UP.get(type(error)):
            self.metrics.cancelled.add(reason)
        if isinstance(error, DeadlineExceeded):
            self.metrics.deadline_missed.add()

    def _forget(self, watched: Watched) -> None:
        with self.lock:
            self._running.pop(id(watched), None)


class ObservedModel:
    """A model whose calls are timed. Everything else of it is as it was."""

    def __init__(self, model: Any, observation: Observation) -> None:
        self._model = model
        self._observation = observation

    def begin(self, plan: GenerationPlan) -> Any:
        started = time.perf_counter()
        images = self._model.begin(plan)
        self._observation.began(plan, time.perf_counter() - started)
        return images

    def step(self, images: Sequence[Any], *, at_most: int = 1) -> Sequence[Span] | None:
        rows, started = sum(image.rows for image in images), time.monotonic()
        spans: Sequence[Span] | None = self._model.step(images, at_most=at_most)
        for begin, end in spans or [(started, time.monotonic())]:
            self._observation.metrics.step_seconds.observe(end - begin)
            self._observation.metrics.batch_rows.observe(float(rows))
        return spans

    def hold(self) -> None:
        self._model.hold()

    def decode(self, images: Sequence[Any]) -> Any:
        return self._model.decode(images)

    def preview(self, image: Any) -> Any:
        return self._model.preview(image)

    def row_cost(self, image: Any) -> float:
        return self._model.row_cost(image)

    def release(self, images: Sequence[Any]) -> None:
        self._model.release(images)

    def wait_ready(self, timeout_s: float) -> bool:
        return self._model.wait_ready(timeout_s)


class ObservedBatcher(Batcher):
    """The batcher of a server."""

    def __init__(
        self,
        model: Any,
        config: BatcherConfig | None = None,
        *,
        observation: Observation,
        **options: Any,
    ) -> None:
        """`options` are those of `Batcher`."""
        super().__init__(ObservedModel(model, observation), config, **options)
        self._observation = observation

    def check_early(self, plan: GenerationPlan, **options: Any) -> None:
        try:
            super().check_early(plan, **options)
        except Exception as error:
            self._observation.count_shed(error)
            raise

    def submit(
        self, plan: GenerationPlan, on_event: Callable[[Event], None], **options: Any
    ) -> Job:
        watched = self._observation.watch(plan, on_event, options["tenant"])
        try:
            return super().submit(plan, watched.tell, **options)
        except Exception as error:
            self._observation.refused(watched, error)
            raise
