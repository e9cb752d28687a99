"""The concept store: an index of names and versions beside one safetensors file for each concept.

The index is SQLite in a folder, or PostgreSQL; the files are in that folder, or in an fsspec file
system. Each look-up asks the index, so that what one server publishes, all have at their next one.

A file is there before its row, and is removed after it: a process killed in between leaves a file
without a row, which `collect` removes. Files are checked against their digest when they are read.
"""

import dataclasses
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

from engine.concepts import Concept, concept_from_bytes, concept_to_bytes
from engine.errors import (
    ConceptDamaged,
    ConceptExists,
    ConceptUnreadable,
    StoreError,
    UnknownConcept,
    quoted,
)
from engine.store.blobs import BlobUnusable, blob_errors, blob_name
from engine.store.cache import ConceptCache
from engine.store.changes import Changes
from engine.store.collector import Collected, collect
from engine.store.config import StoreConfig, StoreLimits
from engine.store.places import open_place
from engine.store.references import check_alias
from engine.store.rows import DEFAULT_TENANT, LARGEST_INTEGER, Rows, StoredConcept

__all__ = ["DEFAULT_TENANT", "Collected", "ConceptStore", "StoreConfig", "StoredConcept"]

logger = logging.getLogger(__name__)

Key = Literal["placeholder_token", "concept_id"]
_NAMES_IN_ERRORS = 5


class ConceptStore:
    """Concepts by name, reference and id. Threads, processes and machines may share one.

    Where a `placeholder_token` is read, it may be a reference (see `store_references`).
    """

    def __init__(
        self, place: Path | StoreConfig, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Open a store, or make one in a place that is new or empty.

        Raises `ConfigError` for a folder of other things, `StoreError` for one that fails.
        """
        config = StoreConfig(folder=place) if isinstance(place, Path) else place
        self._config = config
        self._clock = clock
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._cache = ConceptCache(config.cache_bytes)
        self._database, self._blobs = open_place(config)
        self._try_to_collect()

    @classmethod
    def temporary(cls, limits: StoreLimits | None = None) -> "ConceptStore":
        """A store in a folder of its own that goes away with `close`."""
        folder = tempfile.TemporaryDirectory(prefix="oneword-concepts-")
        told = dataclasses.asdict(limits or StoreLimits())
        store = cls(StoreConfig(folder=Path(folder.name), **told))
        store._temporary = folder
        return store

    @property
    def folder(self) -> Path | None:
        """The folder of a store that has one."""
        return self._config.folder

    def close(self) -> None:
        self._database.close()
        if self._temporary:
            self._temporary.cleanup()

    def import_concept(
        self,
        concept: Concept,
        *,
        overwrite: bool = False,
        etag: str | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> tuple[StoredConcept, bool]:
        """Store a concept under its placeholder token; returns it and whether its vectors are new.

        Without `overwrite`, the same vectors under the same token change nothing, and other ones
        raise `ConceptExists`. With it, a file that differs from the latest becomes a new version;
        the same one is written again, which mends a damaged one. With an `etag`, a name that is to
        be changed must still have it, else `StaleEtag` is raised; a repeated import changes nothing
        and passes. When this returns, the concept survives a power cut. Raises `TenantFull` beyond
        the tenant's share.
        """
        content = concept_to_bytes(concept)
        new = self._describe(concept, content)
        with self._changes(tenant) as changes:
            old = changes.latest(new.placeholder_token)
            if old and not overwrite:
                _check_taken(old, new)
                return old, False
            if old and old.file_sha256 == new.file_sha256:
                self._write(new, content)
                return old, False
            changes.check_etag(new.placeholder_token, etag)
            changes.check_room(new.num_bytes, new_names=old is None)
            self._write(new, content)
            return changes.publish(new), old is None or old.concept_id != new.concept_id

    def get(self, placeholder_token: str, *, tenant: str = DEFAULT_TENANT) -> StoredConcept:
        """Look a concept up by name or reference; raises `UnknownConcept`."""
        return self._get("placeholder_token", placeholder_token, tenant)

    def find_by_token(self, placeholder_token: str, *, tenant: str = DEFAULT_TENANT) -> Concept:
        """Load a concept by name or reference; raises `UnknownConcept` or `ConceptDamaged`."""
        return self.load("placeholder_token", placeholder_token, tenant=tenant)[1]

    def find_by_id(self, concept_id: str, *, tenant: str = DEFAULT_TENANT) -> Concept:
        """Load a concept by its id, also a deleted one that is not collected yet.

        Where several share the vectors: a living one, the first by name.
        """
        return self.load("concept_id", concept_id, tenant=tenant)[1]

    def load(
        self, key: Key, value: str, *, tenant: str = DEFAULT_TENANT
    ) -> tuple[StoredConcept, Concept]:
        """A concept's row and the very vectors of that row, whatever is replaced meanwhile.

        Raises `UnknownConcept` or `ConceptDamaged`.
        """
        while True:
            stored = self._get(key, value, tenant)
            try:
                concept = self._cache.get(stored.file_sha256, partial(self._read, stored))
                return stored, replace(concept, version=stored.version)
            except ConceptDamaged:
                # It may have been replaced and collected between its row and its bytes.
                if self._get(key, value, tenant).file_sha256 == stored.file_sha256:
                    raise

    def list(
        self, *, limit: int, after: str = "", tenant: str = DEFAULT_TENANT
    ) -> list[StoredConcept]:
        """Up to `limit` concepts in the order of their tokens, from the first one past `after`."""
        return self._rows(tenant).page(after, limit)

    def versions(
        self,
        placeholder_token: str,
        *,
        below: int = LARGEST_INTEGER,
        limit: int = LARGEST_INTEGER,
        tenant: str = DEFAULT_TENANT,
    ) -> tuple[StoredConcept, ...]:
        """The versions of a name that references reach by number, the newest first.

        Up to `limit` of them, with numbers below `below`. Raises `UnknownConcept`.
        """
        rows = self._rows(tenant)
        found = rows.versions(placeholder_token, below=below, limit=limit)
        if not found and rows.latest(placeholder_token) is None:
            self._unknown(placeholder_token, tenant)
        return tuple(found)

    def aliases_of(
        self, found: Sequence[StoredConcept], *, tenant: str = DEFAULT_TENANT
    ) -> Sequence[tuple[str, ...]]:
        """The aliases of each of these versions, which are a page of a list or a single one."""
        return self._rows(tenant).aliases_of(found)

    def aliases(self, placeholder_token: str, *, tenant: str = DEFAULT_TENANT) -> dict[str, int]:
        """The aliases of a name, each with its version."""
        rows = self._rows(tenant)
        if rows.latest(placeholder_token) is None:
            self._unknown(placeholder_token, tenant)
        return rows.aliases(placeholder_token)

    def set_alias(
        self,
        placeholder_token: str,
        alias: str,
        *,
        version: int | None = None,
        etag: str | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> StoredConcept:
        """Let `name@alias` stand for a version (None: the latest); returns that version.

        Raises `UnknownConcept` where there is none, `StaleEtag` where the alias would change, and
        `TenantFull` for too many.
        """
        check_alias(alias)
        with self._changes(tenant) as changes:
            latest = self._latest(changes, placeholder_token, tenant)
            number = latest.version if version is None else version
            if changes.version(placeholder_token, number) is None:
                self._unknown(f"{placeholder_token}@{number}", tenant)
            if changes.aliases(placeholder_token).get(alias) != number:
                changes.check_etag(placeholder_token, etag)
                changes.set_alias(placeholder_token, alias, number)
            return changes.version(placeholder_token, number) or latest

    def delete_alias(
        self,
        placeholder_token: str,
        alias: str,
        *,
        etag: str | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> None:
        """Take an alias from a name; raises `UnknownConcept` where it has none, or `StaleEtag`."""
        with self._changes(tenant) as changes:
            self._latest(changes, placeholder_token, tenant)
            if alias not in changes.aliases(placeholder_token):
                self._unknown(f"{placeholder_token}@{alias}", tenant)
            changes.check_etag(placeholder_token, etag)
            changes.delete_alias(placeholder_token, alias)

    def delete(
        self, placeholder_token: str, *, etag: str | None = None, tenant: str = DEFAULT_TENANT
    ) -> None:
        """Remove a name with its versions and aliases; raises `UnknownConcept` or `StaleEtag`.

        Its versions can be had by their digest until they are collected, and `undelete` brings it
        back as long.
        """
        with self._changes(tenant) as changes:
            self._latest(changes, placeholder_token, tenant)
            changes.check_etag(placeholder_token, etag)
            changes.delete(placeholder_token)

    def undelete(self, placeholder_token: str, *, tenant: str = DEFAULT_TENANT) -> StoredConcept:
        """Bring a deleted name back with the versions and aliases that it had; returns the latest.

        Raises `UnknownConcept` where nothing is left of it, `ConceptExists` where the name is not
        deleted or was given anew, and `TenantFull`.
        """
        with self._changes(tenant) as changes:
            if changes.latest(placeholder_token):
                raise ConceptExists(
                    f"{quoted(placeholder_token)} is not deleted; what it was before it was "
                    "deleted and stored anew can be had by its concept_id"
                )
            if not changes.is_deleted(placeholder_token):
                self._unknown(placeholder_token, tenant)
            changes.check_room(0, new_names=1)
            return changes.undelete(placeholder_token)

    def collect(self, now: float | None = None) -> Collected:
        """Remove what was retired longer ago than the grace, and files that no row needs.

        A file younger than the grace stays: it may be one that is being published.
        """
        now = self._clock() if now is None else now
        return collect(self._database, self._blobs, before=now - self._config.grace_s)

    def _try_to_collect(self) -> None:
        try:
            self.collect()
        except StoreError as error:  # a store that can be read must not fail for that
            logger.warning("nothing was collected: %s", error)

    def _get(self, key: Key, value: str, tenant: str) -> StoredConcept:
        rows = self._rows(tenant)
        found = rows.find(value) if key == "placeholder_token" else rows.by_id(value)
        return found or self._unknown(value, tenant)

    def _latest(self, changes: Changes, name: str, tenant: str) -> StoredConcept:
        return changes.latest(name) or self._unknown(name, tenant)

    def _rows(self, tenant: str) -> Rows:
        return Rows(self._database.read, tenant)

    @contextmanager
    def _changes(self, tenant: str) -> Generator[Changes]:
        with self._database.transaction(tenant) as execute:
            yield Changes(execute, tenant, self._config, self._clock())

    def _unknown(self, value: str, tenant: str) -> NoReturn:
        """The same for what is not there and for what is another tenant's."""
        known = self.list(limit=_NAMES_IN_ERRORS, tenant=tenant)
        names = ", ".join(concept.placeholder_token for concept in known) or "none"
        more = ", ..." if len(known) == _NAMES_IN_ERRORS else ""
        raise UnknownConcept(
            f"unknown concept {quoted(value)}; stored: {names}{more}; import it or send it along",
            placeholder_token=value,
        )

    def _write(self, stored: StoredConcept, content: bytes) -> None:
        with blob_errors():
            self._blobs.write(blob_name(stored.file_sha256), content)

    def _read(self, stored: StoredConcept) -> Concept:
        """The concept of a row: what is checked is what is used, the same bytes in memory."""
        try:
            with blob_errors():
                content = self._blobs.read(blob_name(stored.file_sha256))
            if hashlib.sha256(content).hexdigest() != stored.file_sha256:
                raise ConceptDamaged(_damaged(stored, "its content has changed"))
            return concept_from_bytes(content, source="the stored file")
        except (BlobUnusable, ConceptUnreadable) as error:
            raise ConceptDamaged(_damaged(stored, str(error))) from error

    def _describe(self, concept: Concept, content: bytes) -> StoredConcept:
        return StoredConcept(
            placeholder_token=concept.placeholder_token,
            version=0,  # given when it is published, like the etag
            concept_id=concept.concept_id,
            file_sha256=hashlib.sha256(content).hexdigest(),
            num_bytes=len(content),
            num_vectors=concept.num_vectors,
            dim=concept.dim,
            embedding_fingerprint=concept.embedding_fingerprint,
            import_time=self._clock(),
            etag="",
        )


def _check_taken(old: StoredConcept, new: StoredConcept) -> None:
    if old.concept_id != new.concept_id:
        raise ConceptExists(
            f"{old.placeholder_token!r} is taken by a concept with other vectors "
            f"({old.concept_id[:12]}..., these are {new.concept_id[:12]}...); "
            "choose another placeholder token, or overwrite it"
        )


def _damaged(stored: StoredConcept, reason: str) -> str:
    return (
        f"the stored concept {stored.placeholder_token!r} is damaged ({reason}); "
        "import it again with overwrite"
    )
