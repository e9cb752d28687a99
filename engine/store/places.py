"""Where a concept store is: opens the index and the place of the files that it is told of."""

import uuid
from pathlib import Path

from engine.errors import ConfigError, quoted
from engine.files import sync_path
from engine.store.blobs import BlobFolder, Blobs, blob_errors, claim
from engine.store.config import StoreConfig
from engine.store.database import Database, Dialect
from engine.store.fsspec_blobs import FsspecBlobs
from engine.store.postgres import PostgresDialect
from engine.store.sqlite import INDEX, SqliteDialect

FILES = "files"
_POSTGRES = ("postgresql://", "postgres://")
_LOCAL = "file://"


def open_place(config: StoreConfig) -> tuple[Database, Blobs]:
    """Index and files, made where they are new.

    Raises `ConfigError` for a folder of other things, `StoreError` for a place that fails.
    """
    with blob_errors():
        if config.folder is not None:
            config.folder.mkdir(parents=True, exist_ok=True)
        # The index comes first: it is what tells our folder from others.
        database = Database(_dialect(config), config.busy_timeout_s)
        try:
            database.prepare()
            return database, _opened_blobs(config, database)
        except BaseException:
            database.close()
            raise


def _dialect(config: StoreConfig) -> Dialect:
    if config.index.startswith(_POSTGRES):
        return PostgresDialect(config.index, config.busy_timeout_s)
    if config.index:
        raise ConfigError(
            f"the index of a concept store is in SQLite or PostgreSQL, not in "
            f"{quoted(config.index.partition('://')[0])}; leave it out, or write "
            "postgresql://user@host/database"
        )
    assert config.folder is not None  # StoreConfig has checked it
    _refuse_other_things(config.folder)
    return SqliteDialect(config.folder / INDEX, config.busy_timeout_s)


def _refuse_other_things(folder: Path) -> None:
    if any(folder.iterdir()) and not (folder / INDEX).exists():
        raise ConfigError(
            f"{folder} holds other things and no concept store; name a new or an empty folder"
        )


def _opened_blobs(config: StoreConfig, database: Database) -> Blobs:
    blobs = _blobs(config)
    blobs.prepare()
    if config.index or config.files:
        claim(blobs, _store_id(database))
    if config.folder is not None:
        sync_path(config.folder)
    return blobs


def _blobs(config: StoreConfig) -> Blobs:
    if config.files.startswith(_LOCAL):  # fsspec's own does not wait for the disk
        return BlobFolder(Path(config.files.removeprefix(_LOCAL)))
    if "://" in config.files:
        return FsspecBlobs(config.files)
    if config.files:
        return BlobFolder(Path(config.files))
    assert config.folder is not None  # StoreConfig has checked it
    return BlobFolder(config.folder / FILES)


def _store_id(database: Database) -> str:
    """What tells this index from others, made by the first who asks."""
    select = "SELECT value FROM concept_facts WHERE name = 'store_id'"
    if not (rows := database.read(select, ())):
        with database.transaction(None) as execute:
            execute(
                "INSERT INTO concept_facts (name, value) VALUES ('store_id', ?) "
                "ON CONFLICT (name) DO NOTHING",
                (uuid.uuid4().hex,),
            )
            rows = execute(select, ())
    return rows[0][0]
