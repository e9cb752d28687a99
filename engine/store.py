"""The concept store: an SQLite index beside one safetensors file for each concept.

Files are named by the SHA-256 of their content, so that nothing a caller chooses becomes a path,
and are checked against it when read. A file is written before its row and removed after it: a
process killed in between leaves a file without a row, which the next `open` sweeps away.
"""

import hashlib
import sqlite3
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.concepts import Concept, concept_from_bytes, concept_to_bytes
from engine.errors import (
    ConceptDamaged,
    ConceptExists,
    ConceptUnreadable,
    StoreError,
    UnknownConcept,
)
from engine.files import write_atomically

DEFAULT_TENANT = "default"
INDEX = "concepts.sqlite3"
FILES = "files"
SCHEMA_VERSION = 1
CACHE_BYTES = 64 << 20
BUSY_TIMEOUT_S = 10.0
_NAMES_IN_ERRORS = 5
_SCHEMA = """
CREATE TABLE IF NOT EXISTS concepts (
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
CREATE INDEX IF NOT EXISTS by_concept_id ON concepts (tenant, concept_id);
CREATE INDEX IF NOT EXISTS by_file ON concepts (file_sha256);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredConcept:
    """What the index knows of a concept."""

    placeholder_token: str
    concept_id: str
    file_sha256: str
    num_vectors: int
    dim: int
    embedding_fingerprint: str
    import_time: float  # seconds since the epoch, UTC


_COLUMNS = ", ".join(StoredConcept.__slots__)


class ConceptStore:
    """Concepts by name and by id. Threads and processes may share a folder."""

    def __init__(self, folder: Path, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._files = folder / FILES
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.RLock()
        self._cache = _ConceptCache(cache_bytes)
        with _sqlite_errors():
            self._files.mkdir(parents=True, exist_ok=True)
            self._index = _open_index(folder / INDEX)
            self._sweep()

    @classmethod
    def temporary(cls) -> "ConceptStore":
        """A store in a folder of its own that goes away with `close`."""
        folder = tempfile.TemporaryDirectory(prefix="oneword-concepts-")
        store = cls(Path(folder.name))
        store._temporary = folder
        return store

    def close(self) -> None:
        with self._lock:
            self._index.close()
            if self._temporary:
                self._temporary.cleanup()

    def import_concept(
        self, concept: Concept, *, overwrite: bool = False, tenant: str = DEFAULT_TENANT
    ) -> tuple[StoredConcept, bool]:
        """Store a concept under its placeholder token; returns it and whether anything changed.

        Without `overwrite`, the same vectors under the same token change nothing, and other ones
        raise `ConceptExists`.
        """
        content = concept_to_bytes(concept)
        new = _describe(concept, content)
        with self._transaction() as index:
            old = _find(index, tenant, "placeholder_token", concept.placeholder_token)
            if old and not overwrite:
                _check_taken(old, new)
                return old, False
            write_atomically(self._path(new.file_sha256), content)
            _insert(index, tenant, new)
        if old:
            self._collect(old.file_sha256)
        return new, True

    def get(self, placeholder_token: str, *, tenant: str = DEFAULT_TENANT) -> StoredConcept:
        """Look a concept up by name; raises `UnknownConcept`."""
        return self._get("placeholder_token", placeholder_token, tenant)

    def get_by_id(self, concept_id: str, *, tenant: str = DEFAULT_TENANT) -> StoredConcept:
        """Look a concept up by its vectors' digest: the first by name, where several share it."""
        return self._get("concept_id", concept_id, tenant)

    def find_by_token(self, placeholder_token: str, *, tenant: str = DEFAULT_TENANT) -> Concept:
        """Load a concept by name; raises `UnknownConcept` or `ConceptDamaged`."""
        return self._load("placeholder_token", placeholder_token, tenant)

    def find_by_id(self, concept_id: str, *, tenant: str = DEFAULT_TENANT) -> Concept:
        """Load a concept by the digest of its vectors; see `get_by_id`."""
        return self._load("concept_id", concept_id, tenant)

    def list(
        self, *, limit: int, after: str = "", tenant: str = DEFAULT_TENANT
    ) -> list[StoredConcept]:
        """Up to `limit` concepts in the order of their tokens, from the first one past `after`."""
        with self._reading() as index:
            rows = index.execute(
                f"SELECT {_COLUMNS} FROM concepts WHERE tenant = ? AND placeholder_token > ? "
                "ORDER BY placeholder_token LIMIT ?",
                (tenant, after, limit),
            ).fetchall()
        return [StoredConcept(**dict(row)) for row in rows]

    def delete(self, placeholder_token: str, *, tenant: str = DEFAULT_TENANT) -> None:
        """Remove a concept; raises `UnknownConcept`."""
        with self._lock:
            stored = self.get(placeholder_token, tenant=tenant)
            with self._transaction() as index:
                index.execute(
                    "DELETE FROM concepts WHERE tenant = ? AND placeholder_token = ?",
                    (tenant, placeholder_token),
                )
            self._collect(stored.file_sha256)

    def _get(self, column: str, value: str, tenant: str) -> StoredConcept:
        with self._reading() as index:
            if stored := _find(index, tenant, column, value):
                return stored
        known = self.list(limit=_NAMES_IN_ERRORS, tenant=tenant)
        names = ", ".join(concept.placeholder_token for concept in known) or "none"
        more = ", ..." if len(known) == _NAMES_IN_ERRORS else ""
        raise UnknownConcept(
            f"unknown concept {value!r}; stored: {names}{more}; import it or send it along",
            placeholder_token=value,
        )

    def _load(self, column: str, value: str, tenant: str) -> Concept:
        with self._lock:
            stored = self._get(column, value, tenant)
            try:
                return self._cache.get(stored.file_sha256, lambda: self._read(stored))
            except ConceptDamaged:
                # Another process may have replaced the concept between its row and its bytes.
                if self._get(column, value, tenant) == stored:
                    raise
            return self._load(column, value, tenant)

    def _read(self, stored: StoredConcept) -> Concept:
        try:
            content = self._path(stored.file_sha256).read_bytes()
            if hashlib.sha256(content).hexdigest() != stored.file_sha256:
                raise ConceptDamaged(_damaged(stored, "its content has changed"))
            return concept_from_bytes(content, source="the stored file")
        except OSError as error:
            raise ConceptDamaged(_damaged(stored, error.strerror or "unreadable")) from error
        except ConceptUnreadable as error:
            raise ConceptDamaged(_damaged(stored, str(error))) from error

    def _path(self, file_sha256: str) -> Path:
        return self._files / f"{file_sha256}.safetensors"

    @contextmanager
    def _reading(self) -> Generator[sqlite3.Connection]:
        with self._lock, _sqlite_errors():
            yield self._index

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        """Files change only under the write lock of the index, one process at a time."""
        with self._lock, _sqlite_errors():
            self._index.execute("BEGIN IMMEDIATE")
            try:
                yield self._index
                self._index.execute("COMMIT")
            except BaseException:
                self._index.execute("ROLLBACK")
                raise

    def _collect(self, file_sha256: str) -> None:
        """Remove a file that no row needs."""
        with self._transaction() as index:
            if not index.execute(
                "SELECT 1 FROM concepts WHERE file_sha256 = ?", (file_sha256,)
            ).fetchone():
                self._path(file_sha256).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what a killed process left: files without a row, and parts of files."""
        with self._transaction() as index:
            rows = index.execute("SELECT DISTINCT file_sha256 FROM concepts").fetchall()
            wanted = {self._path(file_sha256) for (file_sha256,) in rows}
            for path in self._files.iterdir():
                if path not in wanted:
                    path.unlink(missing_ok=True)


class _ConceptCache:
    """Loaded concepts by file digest, the least recently used ones dropped beyond a size."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._concepts: OrderedDict[str, Concept] = OrderedDict()

    def get(self, key: str, load: Callable[[], Concept]) -> Concept:
        if key not in self._concepts:
            self._concepts[key] = load()
            self._num_bytes += _size(self._concepts[key])
        self._concepts.move_to_end(key)
        concept = self._concepts[key]
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= _size(self._concepts.popitem(last=False)[1])
        return concept


def _size(concept: Concept) -> int:
    return concept.learned_embeddings.nbytes + sum(len(v) for v in concept.metadata.values())


def _open_index(path: Path) -> sqlite3.Connection:
    index = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    index.row_factory = sqlite3.Row
    index.execute("PRAGMA journal_mode = WAL")
    index.execute("PRAGMA synchronous = FULL")  # an acknowledged import survives a power cut
    (version,) = index.execute("PRAGMA user_version").fetchone()
    if version not in (0, SCHEMA_VERSION):
        index.close()
        raise StoreError(
            f"the concept store {path} has schema {version}, this version reads {SCHEMA_VERSION}; "
            "use the version that wrote it, or another folder"
        )
    index.executescript(_SCHEMA)
    index.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return index


@contextmanager
def _sqlite_errors() -> Generator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StoreError(
            f"the concept store cannot be used now: {reason}; try again, or see to its disk"
        ) from error


def _describe(concept: Concept, content: bytes) -> StoredConcept:
    return StoredConcept(
        placeholder_token=concept.placeholder_token,
        concept_id=concept.concept_id,
        file_sha256=hashlib.sha256(content).hexdigest(),
        num_vectors=concept.num_vectors,
        dim=concept.dim,
        embedding_fingerprint=concept.embedding_fingerprint,
        import_time=time.time(),
    )


def _check_taken(old: StoredConcept, new: StoredConcept) -> None:
    if old.concept_id != new.concept_id:
        raise ConceptExists(
            f"{old.placeholder_token!r} is taken by a concept with other vectors "
            f"({old.concept_id[:12]}..., these are {new.concept_id[:12]}...); "
            "choose another placeholder token, or overwrite it"
        )


def _insert(index: sqlite3.Connection, tenant: str, new: StoredConcept) -> None:
    values = ", ".join(f":{name}" for name in StoredConcept.__slots__)
    index.execute(
        f"INSERT OR REPLACE INTO concepts (tenant, {_COLUMNS}) VALUES (:tenant, {values})",
        {"tenant": tenant, **asdict(new)},
    )


def _find(index: sqlite3.Connection, tenant: str, column: str, value: str) -> StoredConcept | None:
    row = index.execute(
        f"SELECT {_COLUMNS} FROM concepts WHERE tenant = ? AND {column} = ? "
        "ORDER BY placeholder_token LIMIT 1",
        (tenant, value),
    ).fetchone()
    return StoredConcept(**dict(row)) if row else None


def _damaged(stored: StoredConcept, reason: str) -> str:
    return (
        f"the stored concept {stored.placeholder_token!r} is damaged ({reason}); "
        "import it again with overwrite"
    )
