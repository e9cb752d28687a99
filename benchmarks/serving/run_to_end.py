"""The peers: batches that run to their end, as servers without step-level batching have them.

Static batching (Triton's dynamic batcher, SGLang's): a request waits until as many of its kind are
there as a batch takes, or until the oldest has waited for a window; then they start together and
end together. Only requests of equal shape and equal step count share, since a batch has one loop.
One at a time is the same with batches of one: first in, first out.

Everything else is as in our batcher, so that only the batching differs: the same model, the limits
of `BatcherConfig`, the same admission (`check_room`; a deadline that the work ahead makes
impossible is refused at once), costs that are learned from every call, and requests that leave
before they begin where their time is up. That is more than such servers do. Where it stops: a batch
that runs is left alone.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from engine.batching.admission import check_request, check_room
from engine.batching.batcher import Batcher
from engine.batching.config import BatcherConfig
from engine.batching.events import Event, Finished, ImageDone, StepDone
from engine.batching.fair_queue import SAFETY, FairQueue
from engine.batching.jobs import Job
from engine.batching.model import Model
from engine.batching.step_costs import CostTable
from engine.batching.step_loop import CERTAIN
from engine.errors import DeadlineExceeded, InvalidRequest, NumericalError, ShuttingDown
from engine.planner import GenerationPlan
from engine.store.concept_store import DEFAULT_TENANT

Kind = tuple[int, ...]  # requests of one kind can share a batch


class RunToEndLoop:
    """The queue, and one batch after the other. No threads here; `RunToEnd` has the one."""

    def __init__(
        self,
        model: Model,
        config: BatcherConfig,
        costs: CostTable,
        *,
        max_images: int,
        window_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lock = threading.RLock()
        self._model, self._config, self._costs, self._clock = model, config, costs, clock
        self._max_images, self._window_s = max_images, window_s
        self._queue = FairQueue()
        self._row_costs: dict[Kind, float] = {}  # of kinds that were begun before
        self._free_at = 0.0  # when the batch that runs is predicted to end
        self._num_submitted = 0

    @property
    def has_work(self) -> bool:
        return bool(len(self._queue))

    def submit(
        self,
        plan: GenerationPlan,
        on_event: Callable[[Event], None],
        *,
        deadline: float | None = None,
    ) -> Job:
        """Queue a request of one image, or refuse it at once."""
        if plan.request.num_images != 1:
            raise InvalidRequest("one image a request: the batches are the batcher's to make")
        job = Job(
            plan=plan, on_event=on_event, tenant=DEFAULT_TENANT, deadline=deadline,
            clock=self._clock,
        )  # fmt: skip
        job.predict(self._costs)
        check_request(job)
        with self.lock:
            check_room(job, self._queue, self._config, self._costs)
            self._check_deadline(job)
            self._num_submitted += 1
            job.number = self._num_submitted
            self._queue.push(job)
        return job

    def _check_deadline(self, job: Job) -> None:
        """First in, first out: all that waits is ahead, and the batch that runs."""
        if job.deadline is None or not self._costs.is_known(job.area):
            return
        ahead_s = self._queue.cost_us / 1e6 + max(self._free_at - job.submitted, 0.0)
        if job.submitted + SAFETY * ahead_s + job.alone_s > job.deadline:
            raise DeadlineExceeded("the deadline cannot be met by what is ahead")

    def wait_s(self) -> float:
        """How long until a batch may start: 0 is now."""
        with self.lock:
            now = self._clock()
            starts = [self._starts_at(group, now) for group in self._groups()]
        return max(min(starts, default=now) - now, 0.0)

    def tick(self) -> None:
        """Run the next batch, if one may start."""
        with self.lock:
            self._drop()
            now = self._clock()
            ready = [group for group in self._groups() if self._starts_at(group, now) <= now]
            if not ready:
                return
            batch = ready[0][: self._room(ready[0])]
            for job in batch:
                self._queue.take_image(job)
            self._free_at = now + sum(job.image_us for job in batch) / 1e6
        try:
            self._run(batch)
        except Exception as error:
            for job in batch:
                job.fail(error)

    def fail_all(self, error: Exception) -> None:
        """End everything that waits."""
        with self.lock:
            for job in list(self._queue):
                self._queue.remove(job)
                job.fail(error)

    def _drop(self) -> None:
        """Let requests leave whose time is up, or that cannot be done in what is left of it."""
        now = self._clock()
        for job in list(self._queue):
            if error := job.reason_to_drop(now, CERTAIN * job.alone_s):
                self._queue.remove(job)
                job.fail(error)

    def _groups(self) -> list[list[Job]]:
        """The waiting requests by kind, the kind of the oldest first."""
        groups: dict[Kind, list[Job]] = {}
        for job in self._queue:
            groups.setdefault(kind_of(job.plan), []).append(job)
        return list(groups.values())

    def _room(self, group: Sequence[Job]) -> int:
        """How many of a group a batch takes."""
        row_cost, used = self._row_costs.get(kind_of(group[0].plan), 1.0), 0.0
        for place, job in enumerate(group[: self._max_images]):
            used += job.rows * row_cost
            if place and used > self._config.max_batch_rows:
                return place
        return min(len(group), self._max_images)

    def _starts_at(self, group: Sequence[Job], now: float) -> float:
        room = self._room(group)
        is_full = room == self._max_images or room < len(group)
        return now if is_full else group[0].submitted + self._window_s

    def _run(self, batch: Sequence[Job]) -> None:
        for job in batch:
            job.begun = self._clock()
        images: list[Any] = [image for job in batch for image in self._model.begin(job.plan)]
        self._row_costs[kind_of(batch[0].plan)] = self._model.row_cost(images[0])
        area, rows = batch[0].area, sum(image.rows for image in images)
        while not images[0].is_done:
            started = self._clock()
            self._model.step(images)
            self._learn(self._costs.steps.observe, area, rows, started)
            for job, image in zip(batch, images, strict=True):
                job.denoiser_calls += 1
                job.batch_rows += rows
                job.emit(StepDone(image_index=0, step=image.steps_done, num_steps=image.num_steps))
        started = self._clock()
        pictures = self._model.decode(images)
        self._learn(self._costs.decodes.observe, area, len(images), started)
        for job, image, picture in zip(batch, images, pictures, strict=True):
            job.decode_s = self._clock() - started
            if isinstance(picture, NumericalError):
                job.fail(picture)
            else:
                job.emit(ImageDone(image_index=0, seed=image.seed, image=picture))
                job.emit(Finished(timings=job.timings()))

    def _learn(
        self, observe: Callable[[int, int, float], None], area: int, count: int, started: float
    ) -> None:
        if self._costs.learns:
            observe(area, count, 1e3 * (self._clock() - started))


class RunToEnd:
    """The loop on a worker thread; to its callers what `Batcher` is."""

    def __init__(
        self,
        model: Model,
        config: BatcherConfig | None = None,
        *,
        costs: CostTable | None = None,
        max_images: int,
        window_s: float = 0.0,
    ) -> None:
        self._loop = RunToEndLoop(
            model,
            config or BatcherConfig(),
            costs or CostTable(),
            max_images=max_images,
            window_s=window_s,
        )
        self._wake = threading.Condition(self._loop.lock)
        self._stopping = False
        self._worker = threading.Thread(target=self._run, name="run to end", daemon=True)
        self._worker.start()

    def submit(
        self,
        plan: GenerationPlan,
        on_event: Callable[[Event], None],
        *,
        deadline: float | None = None,
    ) -> Job:
        """As `Batcher.submit`."""
        with self._wake:
            job = self._loop.submit(plan, on_event, deadline=deadline)
            self._wake.notify_all()
        return job

    def close(self) -> None:
        """Finish the batch that runs, fail the rest."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._worker.join()

    def _run(self) -> None:
        while self._wait_for_work():
            self._loop.tick()
        self._loop.fail_all(ShuttingDown("the scheduler was closed"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not self._stopping:
                if not self._loop.has_work:
                    self._wake.wait()
                elif (wait_s := self._loop.wait_s()) > 0.0:
                    self._wake.wait(wait_s)
                else:
                    break
            return not self._stopping


Scheduler = Batcher | RunToEnd


def kind_of(plan: GenerationPlan) -> Kind:
    """What requests of one batch have in common: size, length of context, denoiser calls."""
    contexts = (len(texts[-1].inputs_embeds) for texts in plan.texts)
    return (plan.width, plan.height, *contexts, len(plan.trajectory.rows))
