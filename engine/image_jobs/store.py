"""Jobs on disk: requests that were accepted, what became of them, and their images.

One SQLite file holds all of it, so that a job, its state and its images change together or not at
all. What a job was asked for is kept with its concepts inside (`pinned`), as they were when it was
submitted.
"""

import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import (
    ConfigError,
    InvalidRequest,
    JobNotEnded,
    QueueFull,
    StorageFull,
    StoreError,
    UnknownJob,
    quoted,
)
from engine.files import sync_path

FILE = "jobs.sqlite3"
SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 10.0
_VACUUM_PAGES = 4096  # given back to the disk at a time
Status = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
ENDED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    job_id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    request_id TEXT NOT NULL,
    body BLOB NOT NULL,
    shown BLOB NOT NULL,
    pinned BLOB NOT NULL,
    priority INTEGER NOT NULL,
    status TEXT NOT NULL,
    create_time REAL NOT NULL,
    start_time REAL,
    end_time REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    failure BLOB,
    summary BLOB
);
CREATE UNIQUE INDEX IF NOT EXISTS by_request ON jobs (tenant, request_id) WHERE request_id != '';
CREATE INDEX IF NOT EXISTS by_time ON jobs (tenant, create_time, job_id);
CREATE INDEX IF NOT EXISTS by_status ON jobs (status);
CREATE TABLE IF NOT EXISTS images (
    job_id TEXT NOT NULL REFERENCES jobs (job_id) ON DELETE CASCADE,
    image_index INTEGER NOT NULL,
    content BLOB NOT NULL,
    PRIMARY KEY (job_id, image_index)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLimits:
    """What jobs may take up, for each tenant."""

    max_open_jobs: int = 1000  # that have not ended
    keep_s: float = 24 * 3600.0  # after its end
    max_kept_bytes: int = 4 << 30  # of images; beyond, the oldest ended jobs are forgotten

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageJob:
    """A job as it is on disk, without its images."""

    job_id: str
    tenant: str
    request_id: str  # of its caller; "" for none
    body: bytes  # digest of the request
    shown: bytes  # GenerateRequest without files
    priority: int
    status: Status
    create_time: float  # seconds since the epoch, UTC
    start_time: float | None
    end_time: float | None
    attempts: int  # to carry it out, the present one included
    failure: bytes | None  # Failure
    summary: bytes | None  # Summary

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


_COLUMNS = ", ".join(ImageJob.__slots__)


class ImageJobStore:
    """The jobs of one folder. Threads may share it; a second process is refused."""

    def __init__(
        self, folder: Path, limits: JobLimits, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._lock = threading.RLock()
        with _store_errors():
            folder.mkdir(parents=True, exist_ok=True)
            self._database = _open(folder / FILE)
            sync_path(folder)

    def close(self) -> None:
        with self._lock:
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
        with self._transaction() as database:
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
        with self._reading() as database:
            if earlier := self._made_by(database, tenant, request_id):
                _check_same(earlier, body)
            return earlier

    def get(self, job_id: str, *, tenant: str) -> ImageJob:
        """Raises `UnknownJob`, also for that of another tenant."""
        with self._reading() as database:
            return _find(database, job_id, tenant)

    def images(self, job_id: str) -> dict[int, bytes]:
        """ImageResult by index, as far as they are done."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT image_index, content FROM images WHERE job_id = ? ORDER BY image_index",
                (job_id,),
            )
            return dict(rows.fetchall())

    def indices(self, job_id: str) -> set[int]:
        """Which images are done."""
        with self._reading() as database:
            rows = database.execute("SELECT image_index FROM images WHERE job_id = ?", (job_id,))
            return {index for (index,) in rows}

    def list(
        self, *, tenant: str, limit: int, before: tuple[float, str] | None = None
    ) -> Sequence[ImageJob]:
        """The latest first; those from before a creation time and id."""
        last = before or (float("inf"), "")
        with self._reading() as database:
            rows = database.execute(
                f"SELECT {_COLUMNS} FROM jobs WHERE tenant = ? AND (create_time, job_id) < (?, ?) "
                "ORDER BY create_time DESC, job_id DESC LIMIT ?",
                (tenant, *last, limit),
            )
            return [_job(row) for row in rows]

    def begin_next(self, running: dict[str, int]) -> tuple[ImageJob, bytes] | None:
        """Take a queued job and what it was asked for: of the tenant with the fewest running.

        Of a tenant's jobs the highest priority comes first, then the oldest.
        """
        with self._transaction() as database:
            tenants = [row[0] for row in database.execute(
                "SELECT tenant FROM jobs WHERE status = 'queued' GROUP BY tenant "
                "ORDER BY min(create_time)"
            )]  # fmt: skip
            if not tenants:
                return None
            tenant = min(tenants, key=lambda one: running.get(one, 0))
            row = database.execute(
                "SELECT job_id, pinned FROM jobs WHERE status = 'queued' AND tenant = ? "
                "ORDER BY priority DESC, create_time, job_id LIMIT 1",
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
        with self._transaction() as database:
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
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET status = ?, end_time = ?, failure = ?, summary = ?, pinned = x'' "
                "WHERE job_id = ? AND end_time IS NULL",
                (status, self._clock(), failure, summary, job_id),
            )

    def cancel(self, job_id: str, *, tenant: str) -> ImageJob:
        """One that waits ends now, one that runs is told to; one that has ended stays as it is."""
        with self._transaction() as database:
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
        with self._transaction() as database:
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
        with self._transaction() as database:
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
        with self._transaction() as database:
            _check_ended(_find(database, job_id, tenant))
            database.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))

    def forget_old(self) -> int:
        """Forget jobs that ended long ago, and for tenants with too many images the oldest."""
        with self._transaction() as database:
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
            with self._reading() as database:
                database.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()
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

    @contextmanager
    def _reading(self) -> Generator[sqlite3.Connection]:
        with self._lock, _store_errors():
            yield self._database

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        with self._lock, _store_errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    try:
        ((version, num_tables),) = database.execute(
            "SELECT user_version, (SELECT count(*) FROM sqlite_master) FROM pragma_user_version"
        )
        if version not in (0, SCHEMA_VERSION) or (version == 0 and num_tables):
            raise ConfigError(
                f"{path} is no database of jobs that this version reads (schema {version}, wanted "
                f"{SCHEMA_VERSION}); use the version that wrote it, or another folder"
            )
        # One server alone: two would carry out the same jobs.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")  # an accepted job survives a power cut
        database.execute("PRAGMA foreign_keys = ON")
        database.executescript(
            f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
    except BaseException:
        database.close()
        raise
    return database


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


@contextmanager
def _store_errors() -> Generator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        kind = StorageFull if full else StoreError
        raise kind(
            f"the jobs cannot be read or written now: {reason}; try again, or see to the disk"
        ) from error
