"""The index in PostgreSQL: connections that are lost, locks, and what else only a server can do."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, StoreError
from engine.store.concept_store import ConceptStore, StoreConfig
from engine.store.database import Database
from engine.store.postgres import PostgresDialect
from tests.postgres_server import PostgresServer
from tests.store_setup import make_concept, value_of


@pytest.fixture
def config(postgres: PostgresServer, tmp_path: Path) -> Iterator[StoreConfig]:
    with postgres.schema() as url:
        yield StoreConfig(index=url, files=str(tmp_path / "files"), cache_bytes=0)


@pytest.fixture
def store(config: StoreConfig) -> Iterator[ConceptStore]:
    store = ConceptStore(config)
    yield store
    store.close()


def ask(postgres: PostgresServer, sql: str) -> list[tuple[Any, ...]]:
    """What the database itself says."""
    import psycopg

    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


def end_connections(postgres: PostgresServer) -> None:
    ask(
        postgres,
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
        "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'",
    )


def test_connections_that_were_ended_are_made_again(
    store: ConceptStore, postgres: PostgresServer
) -> None:
    store.import_concept(make_concept("<c>"))
    end_connections(postgres)
    assert value_of(store, "<c>") == 1.0
    end_connections(postgres)
    assert store.import_concept(make_concept("<c>", 2.0), overwrite=True)[0].version == 2
    assert value_of(store, "<c>") == 2.0


def test_server_that_is_gone_is_unavailable_until_it_is_back(
    store: ConceptStore, postgres: PostgresServer
) -> None:
    store.import_concept(make_concept("<c>"))
    postgres.stop()
    try:
        for action in (
            lambda: store.get("<c>"),
            lambda: store.import_concept(make_concept("<d>")),
            lambda: store.delete("<c>"),
        ):
            with pytest.raises(StoreError, match="cannot be used now: .*; try again") as error:
                action()
            assert str(postgres.folder) not in str(error.value)
    finally:
        postgres.start()
    assert value_of(store, "<c>") == 1.0
    assert store.import_concept(make_concept("<d>"))[1]


def test_connection_lost_within_a_publish_loses_all_of_it_or_nothing(
    store: ConceptStore, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the file was written, before the row was: the caller is told, and nothing is there."""
    write = store._blobs.write

    def cut(name: str, content: bytes) -> None:
        write(name, content)
        end_connections(postgres)

    with monkeypatch.context() as patch:
        patch.setattr(store._blobs, "write", cut)
        with pytest.raises(StoreError):
            store.import_concept(make_concept("<c>"))
    assert store.list(limit=9) == []
    assert store.import_concept(make_concept("<c>"))[1]
    assert store.collect(4e9).num_files == 0
    assert value_of(store, "<c>") == 1.0


def test_change_that_waits_too_long_for_another_is_unavailable(config: StoreConfig) -> None:
    """Of the same tenant; others go on, and so do all readers."""
    store = ConceptStore(replace(config, busy_timeout_s=0.1))
    other = Database(PostgresDialect(config.index, 1.0), 1.0)
    store.import_concept(make_concept("<c>"))
    with other.transaction("default"):
        with pytest.raises(StoreError, match="canceling statement due to lock timeout"):
            store.import_concept(make_concept("<d>"))
        assert value_of(store, "<c>") == 1.0
        assert store.import_concept(make_concept("<d>"), tenant="other")[1]
    with other.transaction(None), pytest.raises(StoreError, match="lock timeout"):
        store.import_concept(make_concept("<d>"), tenant="other", overwrite=True)
    assert store.import_concept(make_concept("<d>"))[1]
    other.close()
    store.close()


def test_acknowledged_change_waits_for_the_disk_whatever_the_default(
    config: StoreConfig,
) -> None:
    lazy = config.index.replace("options=", "options=-csynchronous_commit%3Doff%20")
    for url, expected in ((lazy, "on"), (lazy.replace("Doff", "Dlocal"), "local")):
        connection = PostgresDialect(url, 1.0).connect()
        assert connection.execute("SHOW synchronous_commit") == [(expected,)]
        connection.close()


def test_later_schema_is_refused(config: StoreConfig) -> None:
    ConceptStore(config).close()
    database = Database(PostgresDialect(config.index, 1.0), 1.0)
    with database.transaction(None) as execute:
        execute("UPDATE concept_facts SET value = '99' WHERE name = 'schema'", ())
    database.close()
    with pytest.raises(StoreError, match="PostgreSQL has schema 99, this version reads 2"):
        ConceptStore(config)


def test_table_of_somebody_else_is_refused_and_untouched(config: StoreConfig) -> None:
    database = Database(PostgresDialect(config.index, 1.0), 1.0)
    with database.transaction(None) as execute:
        execute("CREATE TABLE concept_facts (name TEXT, value TEXT)", ())
    with pytest.raises(ConfigError, match="not of a concept store; name another database"):
        ConceptStore(config)
    assert database.read("SELECT * FROM concept_facts", ()) == []
    database.close()


def test_wrong_addresses_are_clear_errors_without_their_passwords(tmp_path: Path) -> None:
    files = str(tmp_path / "files")
    nowhere = f"postgresql://me:hunter2@/db?host={tmp_path}"
    with pytest.raises(StoreError, match="no connection to the database") as error:
        ConceptStore(StoreConfig(index=nowhere, files=files))
    assert "hunter2" not in str(error.value)
    with pytest.raises(ConfigError, match="a URL that PostgreSQL does not understand") as error:
        ConceptStore(StoreConfig(index="postgresql://me:hunter2@host/db?nonsense=1", files=files))
    assert "hunter2" not in str(error.value)
    with pytest.raises(ConfigError, match="SQLite or PostgreSQL, not in 'mysql'") as error:
        ConceptStore(StoreConfig(index="mysql://me:hunter2@host/db", files=files))
    assert "hunter2" not in str(error.value)
