"""One tick of the batcher: drop, admit, step, decode. No threads here; `Batcher` has the one.

A tick makes at most one denoiser call and at most one decoder call, so whatever is decided (who
enters, who leaves, who shares) is decided again at every step. Whatever the model is asked, it is
asked without the lock: the lock guards the queue, which other threads add to.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import ParamSpec, TypeVar

from engine.batching.admission import (
    check_deadline,
    check_request,
    check_room,
)
from engine.batching.config import BatcherConfig
from engine.batching.events import Event, Finished, ImageDone, StepDone
from engine.batching.fair_queue import FairQueue
from engine.batching.jobs import Job, Slot, jobs_of
from engine.batching.model import Model
from engine.batching.result_cache import ResultCache
from engine.batching.shared_calls import by_urgency, can_share, choose_call
from engine.batching.step_costs import CostTable
from engine.errors import NumericalError, WorkerDied
from engine.faults import log_fault
from engine.planner import GenerationPlan
from engine.requests import RgbImage
from engine.store.concept_store import DEFAULT_TENANT

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_RESTARTS = 2  # of a request in whose calls workers died
# Many images decode together where that takes hardly longer than one.
DECODE_STRETCH = 1.25
# A request leaves before its deadline when not even this part of its remaining time is left.
CERTAIN = 0.8
READY_POLL_S = 0.5
RATE_OVER = 32  # images: how many come in a second is known from so many
# A model may go on by itself for so long; somebody who comes or leaves ends that.
MAX_UNASKED_S = 0.1


class StepLoop:
    """The queue, the images in flight, and what advances them."""

    def __init__(
        self,
        model: Model,
        config: BatcherConfig,
        costs: CostTable,
        results: ResultCache | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.costs = costs
        self.clock = clock
        self.lock = threading.RLock()
        self._model = model
        self._results = results
        self._queue = FairQueue()
        # Lists are replaced, never changed: other threads read them.
        self._slots: list[Slot] = []
        self._done: list[Slot] = []  # steps are done, waiting for the decoder; still in flight
        self._calling: list[Job] = []  # whose call is under way, should the worker die of it
        self._is_serving = True
        self._num_submitted = 0
        self._arrivals = deque([clock()], maxlen=RATE_OVER + 1)  # of the last images
        self._step_s = 0.0  # of the last denoiser call

    # Other threads ------------------------------------------------------------------------------

    @property
    def in_flight(self) -> list[Slot]:
        return self._slots + self._done

    @property
    def load(self) -> tuple[int, int]:
        """(images in flight, images queued)."""
        return len(self.in_flight), self._queue.num_images

    @property
    def has_work(self) -> bool:
        return bool(len(self._queue) or self._slots or self._done)

    def submit(
        self,
        plan: GenerationPlan,
        on_event: Callable[[Event], None],
        *,
        deadline: float | None = None,
        priority: int = 0,
        tenant: str = DEFAULT_TENANT,
        result_keys: tuple[bytes, ...] = (),
    ) -> Job:
        """Queue a request, answer it from the result cache, or refuse it at once."""
        job = Job(
            plan=plan,
            on_event=on_event,
            tenant=tenant,
            priority=priority,
            deadline=deadline,
            result_keys=result_keys,
            clock=self.clock,
            on_cancel=self._model.hold,
        )
        job.predict(self.costs)
        check_request(job)
        if self._results is not None and self._results.answer(job):
            return job
        with self.lock:
            self._check_queue(job)
            job.queue_position = self._queue.num_images
            self._num_submitted += 1
            job.number = self._num_submitted
            self._queue.push(job)
            self._arrivals.extend([self.clock()] * len(job.waiting))
        self._model.hold()
        return job

    def check_early(
        self, plan: GenerationPlan, *, deadline: float | None, priority: int, tenant: str
    ) -> None:
        """Raise what `submit` would raise now for a request of this outline (`Planner.outline`)."""
        job = Job(
            plan=plan,
            on_event=lambda _event: None,
            tenant=tenant,
            priority=priority,
            deadline=deadline,
            clock=self.clock,
        )
        job.predict(self.costs)
        check_request(job)
        with self.lock:
            self._check_queue(job)

    def _check_queue(self, job: Job) -> None:
        check_room(job, self._queue, self.config, self.costs)
        check_deadline(job, self._queue, self.in_flight, self.config, self.costs)

    def set_deadline(self, job: Job, deadline: float | None) -> None:
        """Change the deadline of a request that was submitted."""
        with self.lock:
            self._queue.set_deadline(job, deadline)

    # The worker ---------------------------------------------------------------------------------

    def tick(self) -> None:
        """Advance by one step what there is to advance."""
        try:
            self.drop(self._reason_to_leave)
            if not self._is_serving:
                self._is_serving = self._model.wait_ready(READY_POLL_S)
            elif self.has_work:
                self._admit()
                self._step()
                self._decode()
        except WorkerDied as error:
            self._begin_again(error)
        self._calling = []

    def fail_all(self, error: Exception) -> None:
        """End everything; a worker that is dead already has nothing to release."""
        with suppress(WorkerDied):
            self.drop(lambda _job: error)

    def drop(self, reason: Callable[[Job], Exception | None]) -> None:
        """Let requests leave that have a reason to, and forget those that are closed."""
        with self.lock:
            jobs = {id(job): job for job in (*self._queue, *jobs_of(self.in_flight))}
        for job in jobs.values():
            if not job.closed and (error := reason(job)):
                job.fail(error)
        gone = [slot.image for slot in self.in_flight if slot.job.closed]
        with self.lock:
            for job in [job for job in self._queue if job.closed]:
                gone += (job.images or {}).values()
                self._queue.remove(job)
            self._slots = [slot for slot in self._slots if not slot.job.closed]
            self._done = [slot for slot in self._done if not slot.job.closed]
        if gone:
            self._call([], self._model.release, gone)

    def _reason_to_leave(self, job: Job) -> Exception | None:
        now = self.clock()
        if job.deadline is None or now + job.alone_s < job.deadline:
            return job.reason_to_drop(now)  # whatever is left of it, there is time for it
        steps = [job.num_steps] if job.waiting else []
        steps += [slot.steps_left for slot in self.in_flight if slot.job is job]
        least_ms = self.costs.alone_ms(**job.costs_of(max(steps, default=0)))
        return job.reason_to_drop(now, CERTAIN * least_ms / 1e3)

    def _admit(self) -> None:
        started = self.clock()
        while job := self._next_job():
            if job.images is None:
                # Text and initial images are encoded here: not for longer than a step takes.
                if self._slots and self.clock() - started > self._step_s:
                    return
                if not self._begin(job):
                    continue
            assert job.images is not None
            with self.lock:
                index = self._queue.take_image(job)
                self._slots = [*self._slots, Slot(job, index, job.images.pop(index))]

    def _next_job(self) -> Job | None:
        with self.lock:
            if not len(self._queue) or len(self.in_flight) >= self.config.max_images_in_flight:
                return None
            return self._queue.choose(self.clock(), self._left_us() + self._queue.cost_us)

    def _begin(self, job: Job) -> bool:
        if job.begun is None:
            job.begun = self.clock()
        try:
            images = self._call([job], self._model.begin, job.plan)
        except WorkerDied:
            raise
        except Exception as error:
            log_fault(logger, error, "a request could not begin")
            job.fail(error)
            with self.lock:
                self._queue.remove(job)
            return False
        job.images = {index: images[index] for index in job.waiting}
        # After a restart: images that were told before it.
        if told := [image for index, image in enumerate(images) if index not in job.images]:
            self._call([job], self._model.release, told)
        return True

    def _step(self) -> None:
        wanted = [slot for slot in self._slots if slot.is_wanted]
        order = by_urgency(wanted, self.costs, self.clock())
        if not order:
            return
        call = choose_call(
            order,
            self.costs,
            max_rows=self.config.max_batch_rows,
            row_cost=lambda slot: self._model.row_cost(slot.image),
            num_behind=self._queue.num_images + self._num_to_come(),
        )
        for slot in order:
            slot.passed_over += 1
        for slot in call:
            slot.passed_over = 0
        self._guarded(call, self._step_call)
        with self.lock:
            self._done = [*self._done, *(slot for slot in self._slots if slot.image.is_done)]
            self._slots = [slot for slot in self._slots if not slot.image.is_done]

    def _num_to_come(self) -> int:
        """How many images will come while these last, at the rate at which the last ones came."""
        now = self.clock()
        with self.lock:
            left_s = (self._left_us() + self._queue.cost_us) / 1e6
            count, first = len(self._arrivals) - 1, self._arrivals[0]
        return round(left_s * count / (now - first)) if now > first else 0

    def _left_us(self) -> int:
        return sum(slot.remaining_us(self.costs) for slot in self.in_flight)

    def _step_call(self, call: Sequence[Slot]) -> None:
        rows = sum(slot.image.rows for slot in call)
        at_most, started = self._num_calls_alike(call, rows), self.clock()
        before = call[0].image.steps_done
        images = [slot.image for slot in call]
        spans = self._call(jobs_of(call), self._model.step, images, at_most=at_most)
        num_calls = call[0].image.steps_done - before
        spans = spans or [(started, self.clock())]
        self._step_s = sum(end - begin for begin, end in spans) / num_calls
        if self.costs.learns:
            self.costs.steps.observe(call[0].job.area, rows, 1e3 * self._step_s)
        for job in jobs_of(call):
            job.denoiser_calls += num_calls
            job.batch_rows += num_calls * rows
        for slot in call:
            slot.job.emit(
                StepDone(
                    image_index=slot.index,
                    step=slot.image.steps_done,
                    num_steps=slot.image.num_steps,
                    preview=self._preview(slot),
                )
            )

    def _num_calls_alike(self, call: Sequence[Slot], rows: int) -> int:
        """How many calls will be this one again, as far as is known now: from 1 to what takes
        `MAX_UNASKED_S`, or until a deadline.

        Not with images that a worker has died of: who is to blame has to be known.
        """
        with self.lock:
            alone = len(call) == len(self.in_flight) and not len(self._queue)
        step_ms = self.costs.steps.ms(call[0].job.area, rows)
        if not alone or not step_ms or any(slot.job.deaths for slot in call):
            return 1
        now = self.clock()
        deadlines = [slot.job.deadline - now for slot in call if slot.job.deadline is not None]
        in_time = 1e3 * min([MAX_UNASKED_S, *deadlines]) / step_ms
        return max(1, min(int(in_time), *(_num_steps_alike(slot) for slot in call)))

    def _preview(self, slot: Slot) -> RgbImage | None:
        """The image as it stands, where it is to be shown after this step."""
        done, every = slot.image.steps_done, slot.job.plan.request.preview_every
        if not every or done % every or slot.image.is_done:
            return None
        return self._call([slot.job], self._model.preview, slot.image)

    def _decode(self) -> None:
        """Decode what was done first: one image, or as many as take hardly longer than one.

        Where nobody steps or waits to, all of one shape that fit go together.
        """
        wanted = [slot for slot in self._done if slot.is_wanted]
        if not wanted:
            return
        group, used = list[Slot](), 0.0
        for slot in can_share(wanted):
            used += slot.image.rows * self._model.row_cost(slot.image)
            if group and (used > self.config.max_batch_rows or self._stalls(len(group) + 1, slot)):
                break
            group.append(slot)
        self._guarded(group, self._decode_call)

    def _stalls(self, num_images: int, slot: Slot) -> bool:
        """Whether decoding so many keeps others from their next step for more than about one."""
        if not self._slots and not len(self._queue):
            return False
        one, many = (self.costs.decodes.ms(slot.job.area, n) for n in (1, num_images))
        return one is None or many is None or many > DECODE_STRETCH * one

    def _decode_call(self, group: Sequence[Slot]) -> None:
        started = self.clock()
        pictures = self._call(jobs_of(group), self._model.decode, [slot.image for slot in group])
        decode_s = self.clock() - started
        self._done = [slot for slot in self._done if slot not in group]
        if self.costs.learns:
            self.costs.decodes.observe(group[0].job.area, len(group), 1e3 * decode_s)
        for job in jobs_of(group):
            job.decode_s += decode_s
        for slot, picture in zip(group, pictures, strict=True):
            if isinstance(picture, NumericalError):
                slot.job.fail(picture)
            else:
                self._tell(slot, picture)

    def _tell(self, slot: Slot, picture: RgbImage) -> None:
        job = slot.job
        if self._results is not None and job.result_keys:
            self._results.put(job.result_keys[slot.index], picture)
        job.images_left -= 1
        is_last = job.images_left == 0
        job.emit(
            ImageDone(image_index=slot.index, seed=slot.image.seed, image=picture, is_last=is_last)
        )
        if is_last:
            job.emit(Finished(timings=job.timings()))

    def _guarded(self, group: list[Slot], call: Callable[[Sequence[Slot]], None]) -> None:
        """A model call that fails takes the requests of that call with it, and no others."""
        try:
            call(group)
        except WorkerDied:
            raise
        except Exception as error:
            log_fault(logger, error, "a model call failed")
            for job in jobs_of(group):
                job.fail(error)

    def _call(
        self, jobs: list[Job], function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call the model on behalf of these requests."""
        self._calling = jobs
        return function(*args, **kwargs)

    def _begin_again(self, error: WorkerDied) -> None:
        """All images in flight are lost: queue them again, in their old places.

        A request that was in the calls that killed `MAX_RESTARTS` workers fails with the next one.
        Those that were only in flight beside it are not counted: after the first time it steps
        alone (engine/batching/shared_calls.py), and they begin again at most as often as it does.
        """
        logger.warning("the worker died; %d images begin again: %s", len(self.in_flight), error)
        self._is_serving = False
        for job in self._calling:
            job.deaths += 1
            if job.deaths > MAX_RESTARTS:
                job.fail(error)
        with self.lock:
            lost, self._slots, self._done = self.in_flight, [], []
            queued = list(self._queue)
            for job in queued:
                self._queue.remove(job)
            for slot in lost:
                slot.job.waiting.append(slot.index)
            for job in {id(job): job for job in (*queued, *jobs_of(lost))}.values():
                job.images = None
                job.waiting = deque(sorted(job.waiting))
                if not job.closed:
                    self._queue.push(job)


def _num_steps_alike(slot: Slot) -> int:
    """How many steps of an image, from the next one, have its rows; to its next preview at most."""
    done, every = slot.image.steps_done, slot.job.plan.request.preview_every
    num_alike = slot.job.plan.guided_calls.num_alike(done, slot.image.num_steps)
    return min(num_alike, every - done % every) if every else num_alike
