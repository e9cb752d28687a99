"""Stores of schema 1, as made by OneWord before versions and aliases, open with all they hold."""

import hashlib
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engine.concepts import concept_to_bytes
from engine.errors import StoreError, UnknownConcept
from engine.store.concept_store import ConceptStore
from engine.store.places import FILES
from engine.store.sqlite import INDEX
from tests.store_setup import make_concept, value_of

# What the store at schema 1 (engine/store.py of commit ba963bd) wrote for the two concepts below,
# with the clock set to these times: the SQL that `sqlite3.Connection.iterdump` gave, and
# `PRAGMA user_version`.
_INDEX_1 = """
CREATE TABLE concepts (
    tenant TEXT NOT NULL,
    placeholder_token TEXT NOT NULL,
    concept_id TEXT NOT NULL,
    file_sha256 TEXT NOT NULL,
    num_vectors INTEGER NOT NULL,
    dim INTEGER NOT NULL,
    embedding_fingerprint TEXT NOT NULL,
    import_time REAL NOT NULL,
    PRIMARY KEY (tenant, placeholder_token)
) WITHOUT ROWID;
INSERT INTO "concepts" VALUES('default','<cat-toy>',
'bacc002213237846c27e5c113356198c25f461bfb6b1ca415ea667e831010be8',
'f27017b922aa414c2a824cf8d8740f262c008d1f6897b3b27759cd261e7458be',2,4,'',1700000000.25);
INSERT INTO "concepts" VALUES('other','<ünï>',
'79bdd1423442cd6e759229fd30d8f8c02e2c42a02f6a1a8104c9b76260c3b94f',
'0286a7abeb86872c088271e292b2bf985ed2f5194602e1f97215e146599b9993',2,4,
'ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff',1700000001.5);
CREATE INDEX by_concept_id ON concepts (tenant, concept_id);
CREATE INDEX by_file ON concepts (file_sha256);
PRAGMA user_version = 1;
"""
_CONCEPTS = {
    "default": make_concept("<cat-toy>", 1.0),
    "other": make_concept("<ünï>", 2.0, embedding_fingerprint="f" * 64),
}
_IMPORT_TIMES = {"default": 1700000000.25, "other": 1700000001.5}


def make_old_store(folder: Path) -> None:
    (folder / FILES).mkdir()
    with closing(sqlite3.connect(folder / INDEX, isolation_level=None)) as index:
        index.execute("PRAGMA journal_mode = WAL")
        index.executescript(_INDEX_1)
    for concept in _CONCEPTS.values():
        content = concept_to_bytes(concept)
        digest = hashlib.sha256(content).hexdigest()
        assert digest in _INDEX_1  # the files are those of then, too
        (folder / FILES / f"{digest}.safetensors").write_bytes(content)


def dump(folder: Path) -> list[str]:
    with closing(sqlite3.connect(folder / INDEX)) as index:
        return [*index.iterdump(), *map(str, index.execute("PRAGMA user_version"))]


def test_old_store_opens_with_all_it_holds(tmp_path: Path) -> None:
    make_old_store(tmp_path)
    for _ in range(2):  # migrated once, then opened as it is
        store = ConceptStore(tmp_path)
        for tenant, concept in _CONCEPTS.items():
            token = concept.placeholder_token
            (stored,) = store.list(limit=9, tenant=tenant)
            assert stored == store.get(f"{token}@1", tenant=tenant)
            assert (stored.placeholder_token, stored.concept_id) == (token, concept.concept_id)
            assert (stored.num_vectors, stored.dim) == (2, 4)
            assert stored.embedding_fingerprint == concept.embedding_fingerprint
            assert stored.import_time == _IMPORT_TIMES[tenant]
            found = store.find_by_id(concept.concept_id, tenant=tenant)
            np.testing.assert_array_equal(found.learned_embeddings, concept.learned_embeddings)
            assert found.embedding_fingerprint == concept.embedding_fingerprint
        store.collect(4e9)
        store.close()


def test_migrated_store_goes_on(tmp_path: Path) -> None:
    make_old_store(tmp_path)
    store = ConceptStore(tmp_path)
    etag = store.get("<cat-toy>").etag
    new, _ = store.import_concept(make_concept(value=5.0), overwrite=True, etag=etag)
    store.set_alias("<cat-toy>", "before", version=1)
    assert (new.version, value_of(store, "<cat-toy>@before")) == (2, 1.0)
    store.delete("<ünï>", tenant="other")
    with pytest.raises(UnknownConcept):
        store.get("<ünï>", tenant="other")
    store.close()


def test_migration_that_fails_leaves_the_old_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_old_store(tmp_path)
    before = dump(tmp_path)
    with monkeypatch.context() as patch:
        broken = ("INSERT INTO concept_names SELECT * FROM nowhere",)
        patch.setattr("engine.store.schema._FROM_1", broken)
        with pytest.raises(StoreError, match="no such table: nowhere"):
            ConceptStore(tmp_path)
    assert dump(tmp_path) == before
    store = ConceptStore(tmp_path)
    assert value_of(store, "<cat-toy>") == 1.0
    store.close()


@pytest.mark.parametrize("make", [make_old_store, lambda folder: ConceptStore(folder).close()])
def test_later_schema_is_refused_and_left_alone(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path)
    with closing(sqlite3.connect(tmp_path / INDEX)) as index:
        index.execute("PRAGMA user_version = 3")
    before = dump(tmp_path)
    with pytest.raises(StoreError, match="has schema 3, this version reads 2; use the version"):
        ConceptStore(tmp_path)
    assert dump(tmp_path) == before
