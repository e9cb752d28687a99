"""The trainings of a server: queued, run one after another, taken up again after a restart.

All methods run on the event loop; what waits for the disk runs in threads. A change of status is on
disk before it is told. A training ends in one of four ways: its process ends well and its concept
is stored, it says that it cannot succeed, it dies too often, or it is cancelled. The end of the
server is none: what was running goes on from its checkpoint when the server is back. Attempts are
counted before they begin, so that a training that brings the server down is not tried for ever.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from engine.errors import (
    ConceptExists,
    InvalidRequest,
    OneWordError,
    QueueFull,
    ShuttingDown,
    StoreError,
    TrainingNotEnded,
    UnknownTraining,
    quoted,
)
from engine.training.config import TrainingConfig
from engine.training.folder import Status, TrainingFolder, TrainingRecord, UploadedImage
from engine.training.job import INTERRUPTED, Job, attempt
from engine.training.reports import Failure
from engine.training.spec import TrainingSpec
from engine.training.store import TrainingStore
from engine.training.uploads import Upload

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 60.0  # when a queue of trainings may have moved; how long one takes is not known
_SERVER_DIED = (
    "the server died during the last of them; if that is for want of memory, ask for a smaller "
    "batch_size"
)
# Stores the concept of a training, for its tenant, and returns its id; raises an `OneWordError`.
Publish = Callable[[TrainingFolder, TrainingRecord], str]


class Supervisor:
    """Owns the store of the trainings and the processes that learn."""

    def __init__(
        self,
        store: TrainingStore,
        config: TrainingConfig,
        *,
        command: Sequence[str],
        publish: Publish,
    ) -> None:
        self.config = config
        self._store = store
        self._command = command
        self._publish_concept = publish
        self._jobs: dict[str, Job] = {}  # the oldest first
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(config.max_training_jobs)
        self._creating = asyncio.Lock()
        self._stopping = False

    @property
    def stopping(self) -> bool:
        return self._stopping

    async def load(self) -> None:
        """Take in what is on disk; nothing runs before `launch`. Raises `ConfigError`."""
        await asyncio.to_thread(self._store.open)
        for stored in await asyncio.to_thread(self._store.load):
            job = Job(stored)
            self._jobs[job.training_id] = job
            if job.state.status == "cancelling":
                await self._end(job, "cancelled")
            elif job.state.has_ended:
                await asyncio.to_thread(job.folder.shed)  # a server may have ended in between

    def launch(self) -> None:
        """Set going what waits: first what was running when a server ended, then the oldest."""
        waiting = [
            job for job in self._jobs.values() if not job.state.has_ended and not job.launched
        ]
        for job in sorted(waiting, key=lambda job: job.state.status != "running"):
            job.launched = True
            task = asyncio.create_task(self._run(job), name=f"training {job.training_id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Let the processes save and end; the trainings go on when a server is back."""
        self._stopping = True
        for job in self._jobs.values():
            job.interrupted.set()
            job.announce()
        async with self._creating:
            await asyncio.gather(*self._tasks)
            self._store.close()

    # What callers ask for

    def check_room(self, spec: TrainingSpec, tenant: str) -> None:
        """Raise unless a new training with this spec would be taken now.

        A request id that is known always is: it is answered with the training that it made.
        """
        if self._stopping:
            raise ShuttingDown("the server is shutting down; try again when it is back")
        if self._made_by(spec.request_id, tenant):
            return
        active = [job for job in self._jobs.values() if not job.state.has_ended]
        queued = sum(job.state.status == "queued" for job in active)
        if queued >= self.config.max_queued_trainings:
            raise QueueFull(
                f"{queued} trainings are waiting, the limit of this server; try again later, or "
                "cancel one",
                retry_after_s=_RETRY_AFTER_S,
            )
        for job in active:
            taken = job.record.spec.placeholder_token == spec.placeholder_token
            if taken and job.record.tenant == tenant and not spec.overwrite:
                raise ConceptExists(
                    f"{spec.placeholder_token!r} is being learned by training {job.training_id}; "
                    "choose another placeholder token, or overwrite it"
                )

    def knows(self, request_id: str, tenant: str) -> bool:
        """Whether a training was made by a request of this id."""
        return self._made_by(request_id, tenant) is not None

    async def begin_upload(self) -> Upload:
        return await asyncio.to_thread(self._store.begin_upload)

    async def create(self, upload: Upload, spec: TrainingSpec, tenant: str) -> Job:
        """Make a training of a finished upload, or find the one that this request made before.

        The upload is this call's from now on. Not to be cancelled half-way: shield it.
        """
        async with self._creating:
            try:
                if earlier := self._made_by(spec.request_id, tenant):
                    return _repeated(earlier, spec, upload.images)
                self.check_room(spec, tenant)
                record = TrainingRecord(
                    training_id=upload.training_id,
                    create_time=time.time(),
                    spec=spec,
                    images=upload.images,
                    tenant=tenant,
                )
                job = Job(await asyncio.to_thread(self._store.commit, upload, record))
            finally:
                await asyncio.to_thread(upload.discard)  # without effect on what was committed
            self._jobs[job.training_id] = job
            self.launch()
            return job

    def get(self, training_id: str, tenant: str) -> Job:
        """Raises `UnknownTraining`, the same for one that another tenant has."""
        job = self._jobs.get(training_id)
        if job is not None and job.record.tenant == tenant:
            return job
        raise UnknownTraining(
            f"no training has the id {quoted(training_id)}; it may have been deleted, or forgotten "
            f"as one of more than {self.config.limits.max_kept_trainings} that have ended",
            training_id=training_id,
        )

    def jobs_of(self, tenant: str) -> tuple[Job, ...]:
        return tuple(job for job in self._jobs.values() if job.record.tenant == tenant)

    def queue_position(self, job: Job) -> int:
        """Trainings that wait ahead of one that waits."""
        if job.state.status != "queued":
            return 0
        waiting = [other for other in self._jobs.values() if other.state.status == "queued"]
        return waiting.index(job)

    async def cancel(self, training_id: str, tenant: str) -> Job:
        """Have a training stop; no effect on one that has ended."""
        job = self.get(training_id, tenant)
        async with job.transition:
            match job.state.status:
                case "queued":
                    await self._end(job, "cancelled")
                case "running":
                    await self._change(job, status="cancelling")
                    job.interrupted.set()
                case _:
                    pass
        return job

    async def delete(self, training_id: str, tenant: str) -> None:
        """Forget a training that has ended; raises `TrainingNotEnded`."""
        job = self.get(training_id, tenant)
        async with job.transition:
            if not job.state.has_ended:
                raise TrainingNotEnded(
                    f"training {training_id} is {job.state.status}; cancel it, and delete it when "
                    "it has ended"
                )
            await self._forget(job)

    def _made_by(self, request_id: str, tenant: str) -> Job | None:
        if not request_id:
            return None
        made = (job for job in self.jobs_of(tenant) if job.record.spec.request_id == request_id)
        return next(made, None)

    # The life of a training

    async def _run(self, job: Job) -> None:
        try:
            async with self._slots:
                if await self._begin(job):
                    await self._learn(job)
        except Exception:  # a bug of ours: the other trainings must go on
            logger.exception("training %s failed", job.training_id)
            await self._end(job, "failed", error="internal error; the server's log has it")

    async def _begin(self, job: Job) -> bool:
        async with job.transition:
            if self._stopping or job.state.status not in ("queued", "running"):
                return False
            await self._change(
                job, status="running", start_time=job.state.start_time or time.time()
            )
            return True

    async def _learn(self, job: Job) -> None:
        """One process after another, until the training has ended or the server stops."""
        while True:
            failure = await self._attempt(job)
            async with job.transition:
                if job.state.status == "cancelling":
                    return await self._end(job, "cancelled")
                if failure is None:
                    return await self._publish(job)
                if self._stopping:
                    return None
                logger.warning("training %s: %s", job.training_id, failure.reason)
                if not failure.retryable:
                    return await self._end(job, "failed", error=failure.reason)
                if job.state.attempts >= self.config.max_attempts:
                    error = f"given up after {job.state.attempts} attempts: {failure.reason}"
                    return await self._end(job, "failed", error=error)
            await _wait(job.interrupted, self.config.retry_delay_s)

    async def _attempt(self, job: Job) -> Failure | None:
        """Run one process to its end; None if the result is there."""
        if await asyncio.to_thread(job.folder.concept.exists):
            return None  # it was finished when the last server ended
        if failure := await self._count_attempt(job):
            return failure
        failure = await attempt(job, self._command, stop_grace_s=self.config.stop_grace_s)
        if self._stopping:  # it was told to end: that is no fault of its own
            async with job.transition:
                await self._change(job, attempts=job.state.attempts - 1)
        return failure

    async def _count_attempt(self, job: Job) -> Failure | None:
        """Count an attempt, on disk, before it begins; returns why it must not begin."""
        async with job.transition:
            if job.interrupted.is_set():
                return INTERRUPTED
            if job.state.attempts >= self.config.max_attempts:
                return Failure(reason=_SERVER_DIED, retryable=True)
            attempts = job.state.attempts + 1
            try:
                await asyncio.to_thread(
                    job.folder.write_state, replace(job.state, attempts=attempts)
                )
            except StoreError as error:
                return Failure(reason=str(error), retryable=True)
            finally:
                job.announce(attempts=attempts)
        return None

    async def _publish(self, job: Job) -> None:
        try:
            concept_id = await asyncio.to_thread(self._publish_concept, job.folder, job.record)
        except OneWordError as error:
            logger.warning("the concept of training %s: %s", job.training_id, error)
            return await self._end(
                job,
                "failed",
                error=f"learned, but not stored: {error}; GetTraining returns the concept file",
            )
        await self._end(job, "succeeded", concept_id=concept_id)

    async def _end(self, job: Job, status: Status, **changes: Any) -> None:
        await self._change(job, status=status, end_time=time.time(), **changes)
        # By tenant: the trainings of one must not push those of another out.
        ended = [other for other in self.jobs_of(job.record.tenant) if other.state.has_ended]
        try:
            await asyncio.to_thread(job.folder.shed)
            for old in ended[: -self.config.limits.max_kept_trainings]:
                await self._forget(old)
        except StoreError:  # the next start of a server will tidy up
            logger.exception("what training %s left cannot be removed", job.training_id)

    async def _forget(self, job: Job) -> None:
        await asyncio.to_thread(self._store.delete, job.folder)
        self._jobs.pop(job.training_id, None)

    async def _change(self, job: Job, **changes: Any) -> None:
        """Change a state on disk, then in memory.

        Where the disk fails, memory alone must do: a training must be stoppable on a full disk.
        """
        try:
            await asyncio.to_thread(job.folder.write_state, replace(job.state, **changes))
        except StoreError:
            logger.exception("the state of training %s is not on disk", job.training_id)
        job.announce(**changes)
        if "status" in changes:
            self._announce_queue()

    def _announce_queue(self) -> None:
        for job in self._jobs.values():
            if job.state.status == "queued":
                job.announce()


def _repeated(job: Job, spec: TrainingSpec, images: tuple[UploadedImage, ...]) -> Job:
    if not job.record.asks_the_same_as(spec, images):
        raise InvalidRequest(
            f"request_id {quoted(spec.request_id)} was used for training {job.training_id} with "
            "another spec or other images; choose a new one for each training",
            field="request_id",
        )
    return job


async def _wait(event: asyncio.Event, at_most_s: float) -> None:
    try:
        async with asyncio.timeout(at_most_s):
            await event.wait()
    except TimeoutError:
        pass
