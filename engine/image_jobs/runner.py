"""Carries jobs out: takes them from disk, has their images made, and keeps what comes.

A job that a server left when it died begins again behind the last image that was kept; one during
which servers or workers died several times is given up, since it is probably the cause.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakValueDictionary

from engine.errors import ShuttingDown, StoreError, WorkerDied
from engine.faults import log_fault
from engine.image_jobs.job import ImageJob, Status
from engine.image_jobs.store import ImageJobStore
from engine.requests import MAX_SEED
from engine.serving.executions import patiently
from engine.serving.status import failure_of, is_internal
from protos.oneword.v1.generation_pb2 import GenerateRequest, GenerateResponse, ImageResult, Summary

MAX_RUNNING_JOBS = 16
MAX_ATTEMPTS = 3
_FORGET_EVERY_S = 60.0
_RETRY_S = 1.0  # after the disk has failed
_MAX_WAIT_S = 5.0  # where the queue is full

Follow = Callable[[GenerateRequest, ImageJob], AsyncGenerator[GenerateResponse]]
logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class RunningJob:
    """A job that is being carried out, and how far it is."""

    job: ImageJob
    task: "asyncio.Task[None] | None" = None
    told_to_stop: bool = False
    steps: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])

    @property
    def progress(self) -> tuple[int, int]:
        """Denoiser calls done, and in all."""
        done = sum(step for step, _ in self.steps.values())
        return done, sum(num_steps for _, num_steps in self.steps.values())


class ImageJobRunner:
    """The jobs of a store, some at a time."""

    def __init__(
        self, store: ImageJobStore, follow: Follow, *, max_running: int = MAX_RUNNING_JOBS
    ) -> None:
        """`follow` gives the events of one request of a job."""
        self.store = store
        self._follow = follow
        self._max_running = max_running
        self._running: dict[str, RunningJob] = {}
        self._wake = asyncio.Event()
        # Of jobs that somebody watches: gone with the last who waits for it.
        self._changed: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()
        self._loop: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> None:
        """Take up the jobs of earlier, and begin."""
        if count := await asyncio.to_thread(self.store.recover):
            logger.info("going on with %d jobs of the server before", count)
        self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Put back what runs; a later server goes on with it."""
        self._stopping = True
        tasks = [running.task for running in self._running.values() if running.task]
        if self._loop is not None:
            tasks.append(self._loop)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for event in list(self._changed.values()):
            event.set()

    @property
    def stopping(self) -> bool:
        return self._stopping

    def wake(self) -> None:
        """A job was submitted."""
        self._wake.set()

    async def cancel(self, job_id: str, *, tenant: str) -> ImageJob:
        job = await asyncio.to_thread(self.store.cancel, job_id, tenant=tenant)
        if (running := self._running.get(job_id)) and running.task:
            running.told_to_stop = True
            running.task.cancel()
        self._announce(job_id)
        return job

    def progress(self, job_id: str) -> tuple[int, int]:
        """Denoiser calls of a job: done, and in all; zeros where it does not run."""
        running = self._running.get(job_id)
        return running.progress if running else (0, 0)

    def changed(self, job_id: str) -> asyncio.Event:
        """Set at the next change of a job."""
        return self._changed.setdefault(job_id, asyncio.Event())

    def _announce(self, job_id: str) -> None:
        if event := self._changed.pop(job_id, None):
            event.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            wait_s = _FORGET_EVERY_S
            try:
                if len(self._running) < self._max_running and await self._begin_next():
                    continue
                await asyncio.to_thread(self.store.forget_old)
            except StoreError as error:
                logger.error("%s", error)
                wait_s = _RETRY_S  # jobs may be waiting that nobody wakes it for again
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()

    async def _begin_next(self) -> bool:
        counts = Counter(running.job.tenant for running in self._running.values())
        found = await asyncio.to_thread(self.store.begin_next, dict(counts))
        if found is None:
            return False
        job, pinned = found
        running = self._running[job.job_id] = RunningJob(job)
        running.task = asyncio.create_task(self._carry_out(running, pinned))
        return True

    async def _carry_out(self, running: RunningJob, pinned: bytes) -> None:
        job_id = running.job.job_id
        self._announce(job_id)
        try:
            await self._attempt(running, pinned)
        except asyncio.CancelledError:
            if running.told_to_stop:
                await self._end(job_id, "cancelled")
            else:
                await asyncio.to_thread(self.store.requeue, job_id, counts=False)
                raise
        except (WorkerDied, ShuttingDown) as error:
            await self._again(running.job, error)
        except StoreError as error:
            logger.error("job %s: %s", job_id, error)
            await asyncio.sleep(_RETRY_S)
            await self._requeue(job_id, counts=False)  # it is not the job's fault
        except Exception as error:
            if is_internal(error):
                log_fault(logger, error, "job %s failed", job_id)
            failure = failure_of(error, job_id).SerializeToString()
            await self._end(job_id, "failed", failure=failure)
        finally:
            del self._running[job_id]
            self._announce(job_id)
            self._wake.set()

    async def _attempt(self, running: RunningJob, pinned: bytes) -> None:
        job = running.job
        if job.attempts > MAX_ATTEMPTS:
            raise WorkerDied(
                f"what carried it out died {MAX_ATTEMPTS} times; ask for smaller images or fewer "
                "at a time"
            )
        whole = GenerateRequest.FromString(pinned)
        kept = await asyncio.to_thread(self.store.indices, job.job_id)
        first = next(i for i in range(whole.num_images + 1) if i not in kept)
        first = min(first, whole.num_images - 1)  # the last once more, where the end was not kept
        rest = GenerateRequest()
        rest.CopyFrom(whole)
        rest.seed = (whole.seed + first) % (MAX_SEED + 1)
        rest.num_images = whole.num_images - first
        responses = patiently(lambda: self._follow(rest, job), max_wait_s=_MAX_WAIT_S)
        async with aclosing(responses):
            async for response in responses:
                await self._attend(running, response, whole, first)

    async def _attend(
        self, running: RunningJob, response: GenerateResponse, whole: GenerateRequest, first: int
    ) -> None:
        job_id = running.job.job_id
        match response.WhichOneof("event"):
            case "progress":
                progress = response.progress
                running.steps[first + progress.image_index] = progress.step, progress.num_steps
            case "image":
                image = ImageResult()
                image.CopyFrom(response.image)
                image.image_index += first
                content = image.SerializeToString()
                await asyncio.to_thread(self.store.keep_image, job_id, image.image_index, content)
            case "summary":
                summary = Summary()
                summary.CopyFrom(response.summary)
                summary.seeds[:] = [
                    (whole.seed + index) % (MAX_SEED + 1) for index in range(whole.num_images)
                ]
                await self._end(job_id, "succeeded", summary=summary.SerializeToString())
            case _:
                return
        self._announce(job_id)

    async def _again(self, job: ImageJob, error: Exception) -> None:
        """Try later, unless that was tried often."""
        if job.attempts >= MAX_ATTEMPTS:
            failure = failure_of(error, job.job_id).SerializeToString()
            await self._end(job.job_id, "failed", failure=failure)
        else:
            await self._requeue(job.job_id, counts=True)

    async def _requeue(self, job_id: str, *, counts: bool) -> None:
        await self._write(job_id, partial(self.store.requeue, job_id, counts=counts))

    async def _end(
        self,
        job_id: str,
        status: Status,
        *,
        failure: bytes | None = None,
        summary: bytes | None = None,
    ) -> None:
        await self._write(
            job_id, partial(self.store.end, job_id, status, failure=failure, summary=summary)
        )

    async def _write(self, job_id: str, write: Callable[[], None]) -> None:
        """Change what is kept of a job, for as long as it takes the disk to let it."""
        while True:
            try:
                await asyncio.to_thread(write)
                return
            except StoreError as error:
                logger.error("what became of job %s cannot be written: %s", job_id, error)
                await asyncio.sleep(_RETRY_S)
