"""The SQLite file that jobs are in: its tables, and how it is read and changed."""

import sqlite3
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import ConfigError, StorageFull, StoreError
from engine.files import file_identity, sync_path

FILE = "jobs.sqlite3"
SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 10.0
_VACUUM_PAGES = 4096  # given back to the disk at a time
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


class JobDatabase:
    """One connection. Threads may share it; a second process is refused.

    All of it raises `StoreError` for what the disk fails at, `StorageFull` where it is full. A
    database that was removed or replaced can be read as it was, and not be changed.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = threading.RLock()
        with _store_errors():
            folder.mkdir(parents=True, exist_ok=True)
            self.connection = _open(folder / FILE)
            sync_path(folder)
            # SQLite reads what was committed last from the second.
            files = [folder / f"{FILE}{suffix}" for suffix in ("", "-wal")]
            self._identities = {file: file_identity(file) for file in files}

    def close(self) -> None:
        with self._lock:
            self.connection.close()

    @contextmanager
    def reading(self) -> Generator[sqlite3.Connection]:
        with self._lock, _store_errors():
            yield self.connection

    @contextmanager
    def transaction(self) -> Generator[sqlite3.Connection]:
        """What is changed in the block is on disk behind it, or nothing of it."""
        with self._lock, _store_errors():
            self._check_in_place()
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def shrink(self) -> None:
        """Give room that nothing takes up any more back to the disk."""
        with self.reading() as connection:
            connection.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()

    def _check_in_place(self) -> None:
        # SQLite goes on writing to a file that was deleted: all of it would be lost at the end.
        if any(was and file_identity(file) != was for file, was in self._identities.items()):
            raise StoreError(
                "the database of the jobs was removed or replaced while it was in use; put it back "
                "or start the server again"
            )


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
