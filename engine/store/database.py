"""The database of an index: one connection that reads, one that writes, made anew when lost.

Which SQL database it is, is the business of a `Dialect`; what is asked of it, of `store_rows` and
`store_changes`. Statements are written once, in the SQL that SQLite and PostgreSQL share.
"""

import logging
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

from engine.errors import StorageFull, StoreError
from engine.store import schema as store_schema
from engine.store.rows import Execute

logger = logging.getLogger(__name__)

T = TypeVar("T")


@runtime_checkable
class Connection(Protocol):
    """One connection to a database, for one thread at a time."""

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be asked of it any more."""
        ...

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement with `?` for its values."""
        ...

    def begin(self, tenant: str | None) -> None:
        """Begin a transaction that excludes others of this tenant, or with None all others."""
        ...

    def rollback(self) -> None:
        """End a transaction without its changes; where that fails, the connection is lost."""
        ...

    def schema_version(self) -> int:
        """0 where there is no index yet."""
        ...

    def set_schema_version(self, version: int) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Dialect(Protocol):
    """What differs between databases."""

    errors: tuple[type[Exception], ...]
    text: str  # type of a column whose texts sort by code points
    name: str  # for messages

    def connect(self) -> Connection: ...

    def reason(self, error: Exception) -> str:
        """An error in words that callers may read."""
        ...

    def is_full(self, error: Exception) -> bool: ...


class Database:
    """Statements and transactions, one at a time each, from any thread."""

    def __init__(self, dialect: Dialect, busy_timeout_s: float) -> None:
        self._dialect = dialect
        self._reader = _Slot(dialect, busy_timeout_s)
        self._writer = _Slot(dialect, busy_timeout_s)

    def prepare(self) -> None:
        """Make the tables, or bring those of an earlier version up to date."""
        with self._writer.held(), _store_errors(self._dialect):
            self._writer.run(lambda connection: store_schema.prepare(connection, self._dialect))

    def close(self) -> None:
        for slot in (self._reader, self._writer):
            slot.close()

    def read(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """What is committed now, by whichever process; writers are not waited for."""
        with self._reader.held(), _store_errors(self._dialect):
            return self._reader.run(lambda connection: connection.execute(sql, values))

    @contextmanager
    def transaction(self, tenant: str | None) -> Generator[Execute]:
        """All or nothing, and alone among the changes of a tenant; with None, alone at all.

        What was done is on disk when this has ended without an error.
        """
        with self._writer.held(), _store_errors(self._dialect):
            connection = self._writer.run(lambda connection: _begun(connection, tenant))
            try:
                yield connection.execute
                connection.execute("COMMIT")
            except BaseException:
                connection.rollback()
                raise


def _begun(connection: Connection, tenant: str | None) -> Connection:
    try:
        connection.begin(tenant)
    except BaseException:
        connection.rollback()
        raise
    return connection


class _Slot:
    """A place for one connection, its lock, and how it is replaced."""

    def __init__(self, dialect: Dialect, busy_timeout_s: float) -> None:
        self._dialect = dialect
        self._busy_timeout_s = busy_timeout_s
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._closed = False

    @contextmanager
    def held(self) -> Generator[None]:
        if not self._lock.acquire(timeout=self._busy_timeout_s):
            raise StoreError(
                f"the concept store was busy for {self._busy_timeout_s:g} s; try again later"
            )
        try:
            yield
        finally:
            self._lock.release()

    def run(self, work: Callable[[Connection], T]) -> T:
        """Run what can be run again; where the connection turns out to be lost, on a new one."""
        try:
            return work(self._connected())
        except self._dialect.errors:
            if self._connection is None or not self._connection.is_lost:
                raise
        logger.warning("the connection to %s was lost; connecting again", self._dialect.name)
        return work(self._connected())

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._disconnect()

    def _connected(self) -> Connection:
        if self._closed:
            raise StoreError("the concept store is closed; open it again")
        if self._connection is not None and self._connection.is_lost:
            self._disconnect()
        if self._connection is None:
            self._connection = self._dialect.connect()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextmanager
def _store_errors(dialect: Dialect) -> Generator[None]:
    try:
        yield
    except dialect.errors as error:
        logger.warning("%s: %s", dialect.name, error)
        kind = StorageFull if dialect.is_full(error) else StoreError
        raise kind(
            f"the concept store cannot be used now: {dialect.reason(error)}; try again, or see to "
            "its disk or database"
        ) from error
