"""The tables of an index, and how those of earlier versions become them.

Version 1 was SQLite's alone: one table `concepts` with one row for each name.
"""

from string import Template
from typing import TYPE_CHECKING, Any

from engine.errors import StoreError

if TYPE_CHECKING:
    from engine.store.database import Connection, Dialect
else:
    Connection = Dialect = Any  # that module imports this one

SCHEMA_VERSION = 2
_TABLES = (
    """CREATE TABLE concept_names (
        tenant $text NOT NULL,
        placeholder_token $text NOT NULL,
        latest BIGINT,
        last_version BIGINT NOT NULL,
        etag $text NOT NULL,
        PRIMARY KEY (tenant, placeholder_token)
    )""",
    """CREATE TABLE concept_versions (
        tenant $text NOT NULL,
        placeholder_token $text NOT NULL,
        version BIGINT NOT NULL,
        concept_id $text NOT NULL,
        file_sha256 $text NOT NULL,
        num_bytes BIGINT NOT NULL,
        num_vectors BIGINT NOT NULL,
        dim BIGINT NOT NULL,
        embedding_fingerprint $text NOT NULL,
        import_time DOUBLE PRECISION NOT NULL,
        retired_time DOUBLE PRECISION,
        PRIMARY KEY (tenant, placeholder_token, version)
    )""",
    "CREATE INDEX concept_versions_by_id ON concept_versions (tenant, concept_id)",
    "CREATE INDEX concept_versions_by_file ON concept_versions (file_sha256)",
    "CREATE INDEX concept_versions_by_size ON concept_versions (tenant, num_bytes)",
    "CREATE INDEX concept_versions_retired ON concept_versions (retired_time) "
    "WHERE retired_time IS NOT NULL",
    """CREATE TABLE concept_aliases (
        tenant $text NOT NULL,
        placeholder_token $text NOT NULL,
        alias $text NOT NULL,
        version BIGINT NOT NULL,
        PRIMARY KEY (tenant, placeholder_token, alias)
    )""",
    "CREATE TABLE concept_facts (name $text PRIMARY KEY, value $text NOT NULL)",
)
_FROM_1 = (
    "INSERT INTO concept_names (tenant, placeholder_token, latest, last_version, etag) "
    "SELECT tenant, placeholder_token, 1, 1, substr(file_sha256, 1, 16) FROM concepts",
    # The sizes of files were not kept; those of the vectors are near enough for a tenant's share.
    "INSERT INTO concept_versions (tenant, placeholder_token, version, concept_id, file_sha256, "
    "num_bytes, num_vectors, dim, embedding_fingerprint, import_time) "
    "SELECT tenant, placeholder_token, 1, concept_id, file_sha256, 4 * num_vectors * dim, "
    "num_vectors, dim, embedding_fingerprint, import_time FROM concepts",
    "DROP TABLE concepts",
)


def prepare(connection: Connection, dialect: Dialect) -> None:
    """Make or migrate the tables, all or nothing; raises `StoreError` for those of the future."""
    if _read_version(connection, dialect) == SCHEMA_VERSION:
        return
    try:
        connection.begin(None)
        version = _read_version(connection, dialect)  # another process may have been faster
        if version < SCHEMA_VERSION:
            for statement in (*_TABLES, *(_FROM_1 if version == 1 else ())):
                connection.execute(Template(statement).substitute(text=dialect.text))
            connection.set_schema_version(SCHEMA_VERSION)
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise


def _read_version(connection: Connection, dialect: Dialect) -> int:
    version = connection.schema_version()
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{dialect.name} has schema {version}, this version reads {SCHEMA_VERSION}; "
            "use the version that wrote it, or another place for concepts"
        )
    return version
