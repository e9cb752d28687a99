"""The index in PostgreSQL, for servers on several machines; needs oneword[postgres]."""

import functools
import hashlib
import importlib
from collections.abc import Sequence
from typing import Any

from engine.errors import ConfigError

# A database that is gone is noticed in seconds, not in the hours that TCP would take.
_CONNECT_TIMEOUT_S = 10
_NETWORK = {"keepalives_idle": "10", "keepalives_interval": "5", "tcp_user_timeout": "10000"}
_GONE = "no connection to the database"
# An acknowledged import survives a power cut, even where the database's default is not to wait.
_WAIT_FOR_DISK = (
    "SELECT set_config('synchronous_commit', 'on', false) "
    "WHERE current_setting('synchronous_commit') = 'off'"
)


class PostgresDialect:
    """A PostgreSQL database, or a schema of it: `postgresql://.../?options=-csearch_path%3D...`."""

    text = 'TEXT COLLATE "C"'  # by code points, as in SQLite, whatever the database's language
    name = "the concept store in PostgreSQL"  # the URL may hold a password

    def __init__(self, url: str, busy_timeout_s: float) -> None:
        try:
            self._psycopg: Any = importlib.import_module("psycopg")
        except ImportError as error:
            raise ConfigError(
                f"an index in PostgreSQL needs psycopg ({error}); install oneword[postgres]"
            ) from error
        self.errors: tuple[type[Exception], ...] = (self._psycopg.Error,)
        try:
            given = self._psycopg.conninfo.conninfo_to_dict(url)
        except self._psycopg.Error as error:
            raise ConfigError(
                "the index of the concept store has a URL that PostgreSQL does not understand; "
                "write it as postgresql://user@host/database"
            ) from error
        self._conninfo: dict[str, Any] = {
            "connect_timeout": _CONNECT_TIMEOUT_S,
            **_NETWORK,
            **given,
        }
        self._lock_timeout_ms = max(1, round(busy_timeout_s * 1e3))

    def connect(self) -> "PostgresConnection":
        # No prepared statements: they break behind poolers, and where tables are migrated.
        raw = self._psycopg.connect(**self._conninfo, autocommit=True, prepare_threshold=None)
        connection = PostgresConnection(raw, self._psycopg.Error)
        connection.execute(_WAIT_FOR_DISK)
        connection.execute(f"SET lock_timeout = {self._lock_timeout_ms}")
        return connection

    def reason(self, error: Exception) -> str:
        # The whole text may name hosts and users; it is in the log.
        message = getattr(getattr(error, "diag", None), "message_primary", None)
        return message or _GONE

    def is_full(self, error: Exception) -> bool:
        return isinstance(error, self._psycopg.errors.DiskFull)


class PostgresConnection:
    """A psycopg connection in autocommit mode: transactions are begun and ended in words."""

    def __init__(self, raw: Any, error: type[Exception]) -> None:
        self._raw = raw
        self._error = error

    @property
    def is_lost(self) -> bool:
        return self._raw.closed

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        cursor = self._raw.execute(_with_its_places(sql), tuple(values) or None)
        return cursor.fetchall() if cursor.description else []

    def begin(self, tenant: str | None) -> None:
        # Each statement must see what was committed while the locks were waited for, whatever the
        # default of the database is.
        self.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
        if tenant is None:
            self.execute("SELECT pg_advisory_xact_lock(?)", (_lock_number("all"),))
        else:
            self.execute("SELECT pg_advisory_xact_lock_shared(?)", (_lock_number("all"),))
            self.execute("SELECT pg_advisory_xact_lock(?)", (_lock_number(f"tenant {tenant}"),))

    def rollback(self) -> None:
        try:
            self._raw.execute("ROLLBACK")
        except self._error:  # what failed before is what matters
            self._raw.close()

    def schema_version(self) -> int:
        # Not to_regclass alone: that may answer from before the lock that was waited for.
        ((num_tables,),) = self.execute(
            "SELECT count(*) FROM pg_catalog.pg_class "
            "WHERE relname = 'concept_facts' AND pg_catalog.pg_table_is_visible(oid)"
        )
        if num_tables == 0:
            return 0
        rows = self.execute("SELECT value FROM concept_facts WHERE name = 'schema'")
        if not rows:
            raise ConfigError(
                "the database has a table concept_facts that is not of a concept store; name "
                "another database, or a schema of its own"
            )
        return int(rows[0][0])

    def set_schema_version(self, version: int) -> None:
        self.execute(
            "INSERT INTO concept_facts (name, value) VALUES ('schema', ?) "
            "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (str(version),),
        )

    def close(self) -> None:
        self._raw.close()


@functools.lru_cache
def _with_its_places(sql: str) -> bytes:
    # No statement of ours has either character for itself.
    return sql.replace("?", "%s").encode()


def _lock_number(what: str) -> int:
    """The 64 bits that PostgreSQL's advisory locks have for a name."""
    digest = hashlib.sha256(f"oneword concepts: {what}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
