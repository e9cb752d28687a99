"""Step-level continuous batching: one worker owns the device and shares each call between requests.

Images of different prompts, concepts, samplers, step counts and guidance join and leave at any
step, since all of that is data (engine/pipeline.py). What happens in a step is `step_loop`; who is
admitted, `fair_queue`; who is refused, `admission`; which images share a call, `shared_calls`, by
the costs in `step_costs`. Here is the thread around it.
"""

import logging
import threading
from collections.abc import Callable

from engine.batching.config import BatcherConfig
from engine.batching.events import Event, Failed, Finished, ImageDone, StepDone, Timings
from engine.batching.jobs import Job, Slot
from engine.batching.model import InFlight, Model
from engine.batching.result_cache import ResultCache
from engine.batching.step_costs import CostTable
from engine.batching.step_loop import StepLoop
from engine.errors import ShuttingDown
from engine.faults import log_fault
from engine.planner import GenerationPlan
from engine.store.concept_store import DEFAULT_TENANT

__all__ = [
    "Batcher",
    "BatcherConfig",
    "Event",
    "Failed",
    "Finished",
    "ImageDone",
    "InFlight",
    "Job",
    "Model",
    "StepDone",
    "Timings",
    "generate",
]

logger = logging.getLogger(__name__)


class Batcher:
    """The step loop on a worker thread."""

    def __init__(
        self,
        model: Model,
        config: BatcherConfig | None = None,
        *,
        costs: CostTable | None = None,
        results: ResultCache | None = None,
    ) -> None:
        """Without `costs` it learns them from the calls that it makes."""
        self.config = config or BatcherConfig()
        self.costs = costs or CostTable()
        self._results = results
        self._loop = StepLoop(model, self.config, self.costs, results)
        self._wake = threading.Condition(self._loop.lock)
        self._accepting = True
        self._stopping = False
        self._worker = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._worker.start()

    def submit(
        self,
        plan: GenerationPlan,
        on_event: Callable[[Event], None],
        *,
        deadline: float | None = None,
        priority: int = 0,
        tenant: str = DEFAULT_TENANT,
        may_reuse: bool = False,
    ) -> Job:
        """Queue a planned request; `on_event` is called on the worker thread and must be quick.

        `deadline` is a `time.monotonic()` value; priorities go from 0 to 9, higher first.
        `may_reuse`: the caller has named a seed, so images that it was drawn before will do (they
        are told here and now). Raises `QueueFull`, `ShuttingDown` or `DeadlineExceeded` at once.
        """
        keys: tuple[bytes, ...] = ()
        if self._results is not None and may_reuse:
            keys = self._results.keys(plan, tenant)
        with self._wake:
            if not self._accepting:
                raise ShuttingDown("the server is shutting down; send the request to another one")
            job = self._loop.submit(
                plan,
                on_event,
                deadline=deadline,
                priority=priority,
                tenant=tenant,
                result_keys=keys,
            )
            self._wake.notify_all()
        return job

    def check_early(
        self, plan: GenerationPlan, *, deadline: float | None, priority: int, tenant: str
    ) -> None:
        """Raise what `submit` would raise now for a request of this outline (`Planner.outline`).

        For requests that are not planned yet: a refusal then costs next to nothing.
        """
        self._loop.check_early(plan, deadline=deadline, priority=priority, tenant=tenant)

    @property
    def may_reuse(self) -> bool:
        """Whether requests may be answered from the result cache."""
        return self._results is not None

    def set_deadline(self, job: Job, deadline: float | None) -> None:
        """Change the deadline of a request, as where others have begun to wait for it."""
        self._loop.set_deadline(job, deadline)

    @property
    def load(self) -> tuple[int, int]:
        """(images in flight, images queued)."""
        with self._wake:
            return self._loop.load

    @property
    def _slots(self) -> list[Slot]:
        return self._loop.in_flight

    def close(self, grace_s: float = 0.0) -> None:
        """Take no new work, finish what there is within `grace_s`, fail the rest; idempotent."""
        with self._wake:
            self._accepting = False
            self._wake.notify_all()
            self._wake.wait_for(lambda: not self._loop.has_work, timeout=grace_s)
            self._stopping = True
            self._wake.notify_all()
        self._worker.join()

    def _run(self) -> None:
        while self._wait_for_work():
            self._tick_guarded()
        self._loop.fail_all(ShuttingDown("the server shut down before the images were done"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.notify_all()  # close() may be waiting for an empty batcher
            self._wake.wait_for(lambda: self._stopping or self._loop.has_work)
            return not self._stopping

    def _tick_guarded(self) -> None:
        try:
            self._loop.tick()
        except Exception as error:  # a bug of ours must not take the worker with it
            log_fault(logger, error, "the batcher failed; its requests are dropped")
            self._loop.fail_all(error)


def generate(
    batcher: Batcher,
    plan: GenerationPlan,
    *,
    on_event: Callable[[Event], None] = lambda _event: None,
    deadline: float | None = None,
) -> tuple[list[ImageDone], Timings]:
    """Run one request to its end in the calling thread; raises what it failed with."""
    done = threading.Event()
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        on_event(event)
        if isinstance(event, Finished | Failed):
            done.set()

    job = batcher.submit(plan, listen, deadline=deadline)
    try:
        done.wait()
    except BaseException:
        job.cancel()
        raise
    last = events[-1]
    if isinstance(last, Failed):
        raise last.error
    assert isinstance(last, Finished)
    images = [event for event in events if isinstance(event, ImageDone)]
    return sorted(images, key=lambda image: image.image_index), last.timings
