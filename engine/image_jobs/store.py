"""Jobs on disk: requests that were accepted, what became of them, and their images.

One SQLite file holds all of it, so that a job, its state and its images change together or not at
all. What a job was asked for is kept with its concepts inside (`pinned`), as they were when it was
submitted.
"""

import sqlite3
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.errors import InvalidRequest, JobNotEnded, QueueFull, UnknownJob, quoted
from engine.image_jobs.database import JobDatabase
from engine.image_jobs.job import ImageJob, JobLimits, Status

_COUNTED = "(SELECT count(*) FROM images WHERE images.job_id = jobs.job_id) AS num_images_done"
_COLUMNS = ", ".join(_COUNTED if name == "num_images_done" else name for name in ImageJob.__slots__)


class ImageJobStore:
    """The jobs of one folder. Threads may share it; a second process is refused."""

    def __init__(
        self, folder: Path, limits: JobLimits, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._database = JobDatabase(folder)

    def close(self) -> None:
        self._database.close()

    def submit(
        self,
        *,
        tenant: str,
        request_id: str,
        body: bytes,
        shown: bytes,
        pinned: bytes,
        priority: int,
    ) -> ImageJob:
        """Queue a request, or find the job that an earlier call with its id has made.

        When this returns, the job survives a power cut. Raises `InvalidRequest` for an id that
        names another request, `QueueFull` beyond the limit.
        """
        with self._database.transaction() as database:
            if earlier := self._made_by(database, tenant, request_id):
                _check_same(earlier, body)
                return earlier
            self._check_room(database, tenant)
            job_id, now = uuid.uuid4().hex, self._clock()
            database.execute(
                "INSERT INTO jobs (job_id, tenant, request_id, body, shown, pinned, priority, "
                "status, create_time) VALUES (?, ?, ?, ?, ?, ?, ?, 'queued', ?)",
                (job_id, tenant, request_id, body, shown, pinned, priority, now),
            )
            return _find(database, job_id, tenant)

    def find_request(self, request_id: str, body: bytes, *, tenant: str) -> ImageJob | None:
        """The job that a request with this id has made; raises `InvalidRequest` as `submit`."""
        with self._database.reading() as database:
            if earlier := self._made_by(database, tenant, request_id):
                _check_same(earlier, body)
            return earlier

    def get(self, job_id: str, *, tenant: str) -> ImageJob:
        """Raises `UnknownJob`, also for that of another tenant."""
        with self._database.reading() as database:
            return _find(database, job_id, tenant)

    def images(self, job_id: str) -> dict[int, bytes]:
        """ImageResult by index, as far as they are done."""
        with self._database.reading() as database:
            rows = database.execute(
                "SELECT image_index, content FROM images WHERE job_id = ? ORDER BY image_index",
                (job_id,),
            )
            return dict(rows.fetchall())

    def indices(self, job_id: str) -> set[int]:
        """Which images are done."""
        with self._database.reading() as database:
            rows = database.execute("SELECT image_index FROM images WHERE job_id = ?", (job_id,))
            return {index for (index,) in rows}

    def list(
        self, *, tenant: str, limit: int, before: tuple[float, str] | None = None
    ) -> Sequence[ImageJob]:
        """The latest first; those from before a creation time and id."""
        last = before or (float("inf"), "")
        with self._database.reading() as database:
            rows = database.execute(
                f"SELECT {_COLUMNS} FROM jobs WHERE tenant = ? AND (create_time, job_id) < (?, ?) "
                "ORDER BY create_time DESC, job_id DESC LIMIT ?",
                (tenant, *last, limit),
            )
            return [_job(row) for row in rows]

    def begin_next(self, running: dict[str, int]) -> tuple[ImageJob, bytes] | None:
        """Take a queued job and what it was asked for: of the tenant with the fewest running.

        Of a tenant's jobs the highest priority comes first, then the one that was submitted first,
        whatever the clock said then: SQLite numbers rows as they come.
        """
        with self._database.transaction() as database:
            tenants = [row[0] for row in database.execute(
                "SELECT tenant FROM jobs WHERE status = 'queued' GROUP BY tenant "
                "ORDER BY min(rowid)"
            )]  # fmt: skip
            if not tenants:
                return None
            tenant = min(tenants, key=lambda one: running.get(one, 0))
            row = database.execute(
                "SELECT job_id, pinned FROM jobs WHERE status = 'queued' AND tenant = ? "
                "ORDER BY priority DESC, rowid LIMIT 1",
                (tenant,),
            ).fetchone()
            database.execute(
                "UPDATE jobs SET status = 'running', attempts = attempts + 1, start_time = ? "
                "WHERE job_id = ?",
                (self._clock(), row[0]),
            )
            return _find(database, row[0], tenant), row[1]

    def keep_image(self, job_id: str, image_index: int, content: bytes) -> None:
        """Keep an image, unless it is there already."""
        with self._database.transaction() as database:
            database.execute(
                "INSERT OR IGNORE INTO images VALUES (?, ?, ?)", (job_id, image_index, content)
            )

    def end(
        self,
        job_id: str,
        status: Status,
        *,
        failure: bytes | None = None,
        summary: bytes | None = None,
    ) -> None:
        """The last change of a job; nothing for one that has ended."""
        with self._database.transaction() as database:
            database.execute(
                "UPDATE jobs SET status = ?, end_time = ?, failure = ?, summary = ?, pinned = x'' "
                "WHERE job_id = ? AND end_time IS NULL",
                (status, self._clock(), failure, summary, job_id),
            )

    def cancel(self, job_id: str, *, tenant: str) -> ImageJob:
        """One that waits ends now, one that runs is told to; one that has ended stays as it is."""
        with self._database.transaction() as database:
            job = _find(database, job_id, tenant)
            if job.status == "queued":
                database.execute(
                    "UPDATE jobs SET status = 'cancelled', end_time = ?, pinned = x'' "
                    "WHERE job_id = ?",
                    (self._clock(), job_id),
                )
            elif job.status == "running":
                database.execute(
                    "UPDATE jobs SET status = 'cancelling' WHERE job_id = ?", (job_id,)
                )
            return _find(database, job_id, tenant)

    def requeue(self, job_id: str, *, counts: bool) -> None:
        """Put back one that ran, to go on where its images end; `counts`: that was an attempt.

        One that was told to stop meanwhile has stopped.
        """
        with self._database.transaction() as database:
            database.execute(
                "UPDATE jobs SET status = 'queued', attempts = attempts - ? "
                "WHERE job_id = ? AND status = 'running'",
                (0 if counts else 1, job_id),
            )
            database.execute(
                "UPDATE jobs SET status = 'cancelled', end_time = ?, pinned = x'' "
                "WHERE job_id = ? AND status = 'cancelling'",
                (self._clock(), job_id),
            )

    def recover(self) -> int:
        """Take up what a server left: what ran is queued, what was told to stop has stopped."""
        with self._database.transaction() as database:
            database.execute(
                "UPDATE jobs SET status = 'cancelled', end_time = ?, pinned = x'' "
                "WHERE status = 'cancelling'",
                (self._clock(),),
            )
            return database.execute(
                "UPDATE jobs SET status = 'queued' WHERE status = 'running'"
            ).rowcount

    def delete(self, job_id: str, *, tenant: str) -> None:
        """Forget a job that has ended; raises `UnknownJob`, or `JobNotEnded`."""
        with self._database.transaction() as database:
            _check_ended(_find(database, job_id, tenant))
            database.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))

    def forget_old(self) -> int:
        """Forget jobs that ended long ago, and for tenants with too many images the oldest."""
        with self._database.transaction() as database:
            count = database.execute(
                "DELETE FROM jobs WHERE end_time < ?", (self._clock() - self.limits.keep_s,)
            ).rowcount
            rows = database.execute(
                "SELECT jobs.tenant, jobs.job_id, sum(length(content)), end_time IS NOT NULL "
                "FROM jobs JOIN images USING (job_id) GROUP BY jobs.job_id "
                "ORDER BY jobs.tenant, end_time IS NULL DESC, end_time DESC"
            ).fetchall()
            kept: dict[str, int] = {}
            for tenant, job_id, num_bytes, has_ended in rows:
                kept[tenant] = kept.get(tenant, 0) + num_bytes
                if has_ended and kept[tenant] > self.limits.max_kept_bytes:
                    database.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))
                    count += 1
        if count:
            self._database.shrink()
        return count

    def _check_room(self, database: sqlite3.Connection, tenant: str) -> None:
        ((count,),) = database.execute(
            "SELECT count(*) FROM jobs WHERE tenant = ? AND end_time IS NULL", (tenant,)
        )
        if count >= self.limits.max_open_jobs:
            raise QueueFull(
                f"{count} jobs are waiting or running, the limit is {self.limits.max_open_jobs}; "
                "wait for some to end, or cancel some",
                retry_after_s=10.0,
            )

    @staticmethod
    def _made_by(database: sqlite3.Connection, tenant: str, request_id: str) -> ImageJob | None:
        if not request_id:
            return None
        row = database.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE tenant = ? AND request_id = ?", (tenant, request_id)
        ).fetchone()
        return row and _job(row)


def _job(row: sqlite3.Row | tuple[object, ...]) -> ImageJob:
    return ImageJob(**dict(zip(ImageJob.__slots__, row, strict=True)))  # pyright: ignore[reportArgumentType]


def _find(database: sqlite3.Connection, job_id: str, tenant: str) -> ImageJob:
    row = database.execute(
        f"SELECT {_COLUMNS} FROM jobs WHERE job_id = ? AND tenant = ?", (job_id, tenant)
    ).fetchone()
    if row is None:
        raise UnknownJob(
            f"unknown job {quoted(job_id)}; it was never submitted, or is forgotten; list those "
            "that there are",
            job_id=job_id,
        )
    return _job(row)


def _check_same(earlier: ImageJob, body: bytes) -> None:
    if earlier.body != body:
        raise InvalidRequest(
            f"request_id {quoted(earlier.request_id)} was used for job {earlier.job_id} with "
            "another request; choose a new one for each request, and repeat a request as it was",
            field="request_id",
        )


def _check_ended(job: ImageJob) -> None:
    if not job.has_ended:
        raise JobNotEnded(
            f"job {job.job_id} is {job.status}; cancel it, and delete it when it has ended"
        )
