"""The index in SQLite: a file in the folder of the concepts."""

import os
import sqlite3
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from engine.errors import ConfigError, StoreError
from engine.files import file_identity

INDEX = "concepts.sqlite3"
# What SQLite opens by itself: the database, its log and the log's index.
_SUFFIXES = ("", "-wal", "-shm")


class SqliteDialect:
    """An SQLite database in WAL mode: readers and one writer, in any number of processes."""

    errors: tuple[type[Exception], ...] = (sqlite3.Error,)
    text = "TEXT"

    def __init__(self, path: Path, busy_timeout_s: float) -> None:
        self.name = f"the concept store {path}"
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._identity: tuple[int, int] | None = None

    def connect(self) -> "SqliteConnection":
        refuse_links(self._path)
        if self._identity is not None:  # SQLite would make a new one in the place of a lost one
            self.check_in_place()
        connection = self._opened()
        if self._identity is None:
            self._identity = file_identity(self._path)
        return connection

    def check_in_place(self) -> None:
        # SQLite goes on writing to an index that was deleted: all of it would be lost at the end.
        if file_identity(self._path) != self._identity:
            raise StoreError(
                "the folder of the concept store was removed or replaced while it was in use; "
                "start the server again"
            )

    def reason(self, error: Exception) -> str:
        return str(error)

    def is_full(self, error: Exception) -> bool:
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL

    def _opened(self) -> "SqliteConnection":
        raw = self._raw(str(self._path))
        try:
            raw.execute("PRAGMA synchronous = FULL")  # an acknowledged import survives a power cut
            connection = SqliteConnection(raw, self)
            connection.schema_version()  # before anything is changed
            raw.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            raw.close()
            if os.access(self._path.parent, os.W_OK) or not _is_at_rest(self._path):
                raise
            return self._opened_read_only()
        except BaseException:
            raw.close()
            raise
        return connection

    def _opened_read_only(self) -> "SqliteConnection":
        """Where nothing may be written SQLite cannot share its log: only a file at rest is read."""
        raw = self._raw(f"file:{quote(str(self._path))}?mode=ro&immutable=1", uri=True)
        return SqliteConnection(raw, self, at_rest=_state(self._path))

    def _raw(self, database: str, *, uri: bool = False) -> sqlite3.Connection:
        return sqlite3.connect(
            database,
            uri=uri,
            timeout=self._busy_timeout_s,
            isolation_level=None,
            check_same_thread=False,
        )

    @property
    def path(self) -> Path:
        return self._path


class SqliteConnection:
    """A connection to the index of a folder."""

    def __init__(
        self, raw: sqlite3.Connection, dialect: SqliteDialect, *, at_rest: object = None
    ) -> None:
        """`at_rest` is the state of a file that is read as if it never changed."""
        self._raw = raw
        self._dialect = dialect
        self._at_rest = at_rest
        self._closed = False

    @property
    def is_lost(self) -> bool:
        changed = self._at_rest is not None and self._at_rest != _state(self._dialect.path)
        return self._closed or changed

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self._raw.execute(sql, values).fetchall()

    def begin(self, tenant: str | None) -> None:
        # SQLite has one lock for all writers, which is more than a tenant needs.
        self._dialect.check_in_place()
        self._raw.execute("BEGIN IMMEDIATE")

    def rollback(self) -> None:
        try:
            if self._raw.in_transaction:
                self._raw.execute("ROLLBACK")
        except sqlite3.Error:  # what failed before is what matters
            self.close()

    def schema_version(self) -> int:
        # One statement: another process that makes the index is seen before it or after it.
        ((version, num_tables),) = self.execute(
            "SELECT user_version, (SELECT count(*) FROM sqlite_master) FROM pragma_user_version"
        )
        if version == 0 and num_tables:
            raise ConfigError(
                f"{self._dialect.path} is a database, but not the index of a concept store; "
                "name a new or an empty folder"
            )
        return version

    def set_schema_version(self, version: int) -> None:
        self.execute(f"PRAGMA user_version = {version}")

    def close(self) -> None:
        self._closed = True
        self._raw.close()


def refuse_links(path: Path) -> None:
    """Refuse an index that is a link: it would be written wherever somebody else wants it."""
    for suffix in _SUFFIXES:
        with suppress(FileNotFoundError):
            status = path.with_name(path.name + suffix).lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise ConfigError(
                    f"{path}{suffix} is a link or not a file at all; the index of a concept store "
                    "must be a file of its own: copy it in its place, or name another folder"
                )


def _is_at_rest(path: Path) -> bool:
    """Whether all of a database is in its file: nothing committed is in the log alone."""
    log = path.with_name(f"{path.name}-wal")
    return path.exists() and not (log.exists() and log.stat().st_size)


def _state(path: Path) -> object:
    """What changes when somebody else writes to the database."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return "gone"
    log = path.with_name(f"{path.name}-wal")
    return status.st_ino, status.st_mtime_ns, status.st_size, log.exists()
