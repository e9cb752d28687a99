"""Step-level continuous batching: one worker owns the device and shares each call between requests.

At every step the worker drops what was cancelled or expired, admits waiting images into free slots
in order of arrival, makes one denoiser call for all rows of one shape, and sends off the images at
their last step. Images of different prompts, concepts, samplers, step counts and guidance join and
leave at any step, since all of that is data (engine/pipeline.py).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from engine.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    NumericalError,
    QueueFull,
    ShuttingDown,
)
from engine.planner import GenerationPlan
from engine.requests import RgbImage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """One image has advanced by one step."""

    image_index: int
    step: int  # 1 to num_steps
    num_steps: int  # denoiser calls of this image
    preview: RgbImage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDone:
    """One image is finished."""

    image_index: int
    seed: int
    image: RgbImage


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time of a request went; wall clock, shared calls counted in full."""

    queue_wait_ms: float  # until its first image was admitted
    denoise_ms: float  # text encoding and steps, until the last image left
    decode_ms: float
    total_ms: float
    denoiser_calls: int
    mean_batch_rows: float  # rows in the calls that it shared, its own included


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """All images are done; the last event of a request that succeeded."""

    timings: Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The last event of a request that did not."""

    error: Exception


Event = StepDone | ImageDone | Finished | Failed


@runtime_checkable
class InFlight(Protocol):
    """What the batcher may know of an image in flight, wherever its latents are."""

    @property
    def seed(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def steps_done(self) -> int: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def is_done(self) -> bool: ...
    @property
    def shape_key(self) -> tuple[int, ...]: ...


ImageT = TypeVar("ImageT")


@runtime_checkable
class Model(Protocol[ImageT]):
    """What the batcher needs of a pipeline: all of it runs on the worker thread."""

    def begin(self, plan: GenerationPlan) -> list[ImageT]: ...
    def step(self, images: Sequence[ImageT]) -> None: ...
    def decode(self, images: Sequence[ImageT]) -> list[RgbImage | NumericalError]: ...
    def preview(self, image: ImageT) -> RgbImage | None: ...

    def release(self, images: Sequence[ImageT]) -> None:
        """Let go of images that leave before they are decoded."""
        ...

    def row_cost(self, image: ImageT) -> float:
        """Memory of one of its rows in a call, relative to the model's own size; at least 1."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BatcherConfig:
    """How much the batcher takes at a time. Flags of `oneword serve` carry these names."""

    max_batch_rows: int = 16  # rows of one call at the model's own size; fewer of larger images
    max_images_in_flight: int = 8
    max_queued_images: int = 64  # waiting for a slot; more are refused

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(slots=True, eq=False)
class Job:
    """A submitted request: the caller's handle, and the worker's notes."""

    plan: GenerationPlan
    on_event: Callable[[Event], None]
    deadline: float | None  # time.monotonic(), or None
    queue_position: int
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    closed: bool = False
    waiting: deque[tuple[int, InFlight]] | None = None  # None until begun
    images_left: int = 0
    begun: float = 0.0
    decode_s: float = 0.0
    denoiser_calls: int = 0
    batch_rows: int = 0

    @property
    def images_queued(self) -> int:
        """Images that no slot has taken yet."""
        return self.plan.request.num_images if self.waiting is None else len(self.waiting)

    def cancel(self) -> None:
        """Leave at the next step; a request that is already closed stays as it is."""
        self.cancelled = True

    def emit(self, event: Event) -> None:
        if self.closed:
            return
        self.closed = isinstance(event, Finished | Failed)
        try:
            self.on_event(event)
        except Exception:
            logger.exception("a listener failed; its request is dropped")
            self.cancelled = True

    def fail(self, error: Exception) -> None:
        self.emit(Failed(error=error))

    def reason_to_drop(self, now: float) -> EngineError | None:
        if self.cancelled:
            return Cancelled("the request was cancelled")
        if self.deadline is not None and now >= self.deadline:
            return DeadlineExceeded(
                f"the deadline passed after {now - self.submitted:.3f} s; allow more time, or ask "
                "for fewer steps or images"
            )
        return None

    def timings(self) -> Timings:
        now = time.monotonic()
        return Timings(
            queue_wait_ms=1e3 * (self.begun - self.submitted),
            denoise_ms=1e3 * (now - self.begun - self.decode_s),
            decode_ms=1e3 * self.decode_s,
            total_ms=1e3 * (now - self.submitted),
            denoiser_calls=self.denoiser_calls,
            mean_batch_rows=self.batch_rows / max(self.denoiser_calls, 1),
        )


@dataclass(slots=True, eq=False)
class _Slot:
    """An admitted image."""

    job: Job
    index: int
    image: InFlight


class Batcher:
    """The queue, the images in flight and the worker thread that advances them."""

    def __init__(self, model: Model[Any], config: BatcherConfig | None = None) -> None:
        self.config = config or BatcherConfig()
        self._model = model
        self._queue: deque[Job] = deque()
        self._slots: list[_Slot] = []
        self._wake = threading.Condition()
        self._accepting = True
        self._stopping = False
        self._step_s = 0.0  # running mean of a tick, for the retry hint
        self._worker = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._worker.start()

    def submit(
        self,
        plan: GenerationPlan,
        on_event: Callable[[Event], None],
        *,
        deadline: float | None = None,
    ) -> Job:
        """Queue a planned request; `on_event` is called on the worker thread and must be quick.

        `deadline` is a `time.monotonic()` value. Raises `QueueFull`, `ShuttingDown` or
        `DeadlineExceeded` at once.
        """
        with self._wake:
            job = Job(plan, on_event, deadline, queue_position=self._queued_images())
            self._check_admission(job)
            self._queue.append(job)
            self._wake.notify()
        return job

    def _check_admission(self, job: Job) -> None:
        if not self._accepting:
            raise ShuttingDown("the server is shutting down; send the request to another one")
        if error := job.reason_to_drop(time.monotonic()):
            raise error
        queued, limit = job.queue_position, self.config.max_queued_images
        # A request larger than the whole queue may still wait in an empty one.
        if queued and queued + job.plan.request.num_images > limit:
            retry_after_s = max(self._step_s * self._queued_steps(), 0.1)
            raise QueueFull(
                f"the queue holds {queued} images, {job.plan.request.num_images} more would pass "
                f"its limit of {limit}; try again in {retry_after_s:.1f} s",
                retry_after_s=retry_after_s,
            )

    def _queued_images(self) -> int:
        return sum(job.images_queued for job in self._queue)

    def _queued_steps(self) -> float:
        """Ticks until the images waiting now are through, if all slots are always taken."""
        steps = sum(len(job.plan.trajectory.rows) * job.images_queued for job in self._queue)
        return steps / self.config.max_images_in_flight

    @property
    def load(self) -> tuple[int, int]:
        """(images in flight, images queued)."""
        with self._wake:
            return len(self._slots), self._queued_images()

    def close(self, grace_s: float = 0.0) -> None:
        """Take no new work, finish what there is within `grace_s`, fail the rest; idempotent."""
        with self._wake:
            self._accepting = False
            self._wake.notify()
            self._wake.wait_for(lambda: not self._queue and not self._slots, timeout=grace_s)
            self._stopping = True
            self._wake.notify()
        self._worker.join()

    def _run(self) -> None:
        while self._wait_for_work():
            started = time.monotonic()
            self._tick_guarded()
            elapsed = time.monotonic() - started
            self._step_s = elapsed if not self._step_s else 0.9 * self._step_s + 0.1 * elapsed
        self._fail_all(ShuttingDown("the server shut down before the images were done"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.notify_all()  # close() may be waiting for an empty batcher
            self._wake.wait_for(lambda: self._stopping or self._queue or self._slots)
            return not self._stopping

    def _tick_guarded(self) -> None:
        try:
            self._tick()
        except Exception as error:  # a bug of ours must not take the worker with it
            logger.exception("the batcher failed; its requests are dropped")
            self._fail_all(error)

    def _tick(self) -> None:
        self._drop(lambda job: job.reason_to_drop(time.monotonic()))
        self._admit()
        for group in self._groups(self._slots):
            # Cancelled or failed while an earlier group ran: leave before this call, not after it.
            group = [slot for slot in group if not (slot.job.cancelled or slot.job.closed)]
            if group:
                self._guarded(group, self._step_group)
        self._slots = [slot for slot in self._slots if not slot.job.closed]
        done = [slot for slot in self._slots if slot.image.is_done]
        for group in self._groups(done):
            self._guarded(group, self._decode_group)
        self._slots = [s for s in self._slots if not s.image.is_done and not s.job.closed]

    def _drop(self, reason: Callable[[Job], Exception | None]) -> None:
        with self._wake:
            jobs = {id(job): job for job in (*self._queue, *(slot.job for slot in self._slots))}
            for job in jobs.values():
                if error := reason(job):
                    job.fail(error)
            self._queue = deque(job for job in self._queue if not job.closed)
            self._slots = [slot for slot in self._slots if not slot.job.closed]

    def _fail_all(self, error: Exception) -> None:
        self._drop(lambda _job: error)

    def _admit(self) -> None:
        while len(self._slots) < self.config.max_images_in_flight and self._queue:
            job = self._queue[0]
            if job.waiting is None and not self._begin(job):
                continue
            assert job.waiting
            index, image = job.waiting.popleft()
            with self._wake:
                self._slots.append(_Slot(job, index, image))
                if not job.waiting:
                    self._queue.popleft()

    def _begin(self, job: Job) -> bool:
        job.begun = time.monotonic()
        try:
            images = self._model.begin(job.plan)
        except Exception as error:
            logger.exception("a request could not begin")
            job.fail(error)
            with self._wake:
                self._queue.remove(job)
            return False
        job.waiting = deque(enumerate(images))
        job.images_left = len(images)
        return True

    def _groups(self, slots: Sequence[_Slot]) -> list[list[_Slot]]:
        """Slots that share a call: one shape, at most `max_batch_rows`; one image if it is huge."""
        groups: list[list[_Slot]] = []
        for shape_group in _by_shape(slots):
            used = 0.0
            groups.append([])
            for slot in shape_group:
                cost = slot.image.rows * self._model.row_cost(slot.image)
                if groups[-1] and used + cost > self.config.max_batch_rows:
                    groups.append([])
                    used = 0.0
                groups[-1].append(slot)
                used += cost
        return groups

    def _guarded(self, group: list[_Slot], call: Callable[[list[_Slot]], None]) -> None:
        """A model call that fails takes the requests of that call with it, and no others."""
        try:
            call(group)
        except Exception as error:
            logger.exception("a model call failed")
            for slot in group:
                slot.job.fail(error)

    def _step_group(self, group: list[_Slot]) -> None:
        self._model.step([slot.image for slot in group])
        rows = sum(slot.image.rows for slot in group)
        for job in {id(slot.job): slot.job for slot in group}.values():
            job.denoiser_calls += 1
            job.batch_rows += rows
        for slot in group:
            slot.job.emit(
                StepDone(
                    image_index=slot.index,
                    step=slot.image.steps_done,
                    num_steps=slot.image.num_steps,
                    preview=self._preview(slot),
                )
            )

    def _preview(self, slot: _Slot) -> RgbImage | None:
        every = slot.job.plan.request.preview_every
        due = every and slot.image.steps_done % every == 0 and not slot.image.is_done
        return self._model.preview(slot.image) if due else None

    def _decode_group(self, group: list[_Slot]) -> None:
        started = time.monotonic()
        pictures = self._model.decode([slot.image for slot in group])
        for job in {id(slot.job): slot.job for slot in group}.values():
            job.decode_s += time.monotonic() - started
        for slot, picture in zip(group, pictures, strict=True):
            job = slot.job
            if isinstance(picture, NumericalError):
                job.fail(picture)
                continue
            job.emit(ImageDone(image_index=slot.index, seed=slot.image.seed, image=picture))
            job.images_left -= 1
            if job.images_left == 0:
                job.emit(Finished(timings=job.timings()))


def _by_shape(slots: Sequence[_Slot]) -> list[list[_Slot]]:
    groups: dict[tuple[int, ...], list[_Slot]] = {}
    for slot in slots:
        groups.setdefault(slot.image.shape_key, []).append(slot)
    return list(groups.values())


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
