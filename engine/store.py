"""The concept store: an SQLite index beside one safetensors file for each concept.

Files are named by the SHA-256 of their content, so that nothing a caller chooses becomes a path,
and are checked against it when read. A file is on disk before its row and removed after it: a
process killed in between leaves a file without a row, which the next one to open the store sweeps
away. Files that are not the store's own are never touched.
"""

import hashlib
import re
import sqlite3
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from engine.concepts import Concept, concept_from_bytes, concept_to_bytes
from engine.errors import (
    ConceptDamaged,
    ConceptExists,
    ConceptUnreadable,
    ConfigError,
    StoreError,
    UnknownConcept,
    quoted,
)
from engine.files import sync_path, write_atomically

DEFAULT_TENANT = "default"
INDEX = "concepts.sqlite3"
FILES = "files"
SCHEMA_VERSION = 1
CACHE_BYTES = 64 << 20
BUSY_TIMEOUT_S = 10.0
_NAMES_IN_ERRORS = 5
# A concept's file, or what `write_atomically` makes on the way to one.
_OWN_FILE = re.compile(r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]{64}\.safetensors\.[0-9a-f]{8}")
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
Key = Literal["placeholder_token", "concept_id"]


class ConceptStore:
    """Concepts by name and by id. Threads and processes may share a folder."""

    def __init__(self, folder: Path, *, cache_bytes: int = CACHE_BYTES) -> None:
        """Open the store of a folder, or make one in a folder that is new or empty.

        Raises `ConfigError` for a folder of other things, `StoreError` for one that fails.
        """
        self._index_path = folder / INDEX
        self._files = folder / FILES
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.RLock()
        self._cache = _ConceptCache(cache_bytes)
        with _store_errors():
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_other_things(folder)
            # The index comes first: it is what tells our folder from others.
            self._index = _open_index(self._index_path)
            self._index_file = _identity(self._index_path)
            self._files.mkdir(exist_ok=True)
            sync_path(folder)
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
        """Store a concept under its placeholder token; returns it and whether its vectors are new.

        Without `overwrite`, the same vectors under the same token change nothing, and other ones
        raise `ConceptExists`. With it, the file is written in any case, which mends a damaged one
        and takes over metadata. When this returns, the concept survives a power cut.
        """
        content = concept_to_bytes(concept)
        new = _describe(concept, content)
        with self._transaction() as index:
            old = _find(index, tenant, "placeholder_token", concept.placeholder_token)
            if old and not overwrite:
                _check_taken(old, new)
                return old, False
            write_atomically(self._path(new.file_sha256), content)
            sync_path(self._files)
            if old and old.file_sha256 == new.file_sha256:
                return old, False
            _insert(index, tenant, new)
        if old:
            self._collect(old.file_sha256)
        return new, old is None or old.concept_id != new.concept_id

    def get(self, placeholder_token: str, *, tenant: str = DEFAULT_TENANT) -> StoredConcept:
        """Look a concept up by name; raises `UnknownConcept`."""
        return self._get("placeholder_token", placeholder_token, tenant)

    def find_by_token(self, placeholder_token: str, *, tenant: str = DEFAULT_TENANT) -> Concept:
        """Load a concept by name; raises `UnknownConcept` or `ConceptDamaged`."""
        return self.load("placeholder_token", placeholder_token, tenant=tenant)[1]

    def find_by_id(self, concept_id: str, *, tenant: str = DEFAULT_TENANT) -> Concept:
        """Load a concept by its id: the first by name, where several share the vectors."""
        return self.load("concept_id", concept_id, tenant=tenant)[1]

    def load(
        self, key: Key, value: str, *, tenant: str = DEFAULT_TENANT
    ) -> tuple[StoredConcept, Concept]:
        """A concept's row and the very vectors of that row, whatever is replaced meanwhile.

        Raises `UnknownConcept` or `ConceptDamaged`.
        """
        with self._lock:
            stored = self._get(key, value, tenant)
            try:
                return stored, self._cache.get(stored.file_sha256, lambda: self._read(stored))
            except ConceptDamaged:
                # Another process may have replaced the concept between its row and its bytes.
                if self._get(key, value, tenant) == stored:
                    raise
            return self.load(key, value, tenant=tenant)

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

    def _get(self, column: Key, value: str, tenant: str) -> StoredConcept:
        with self._reading() as index:
            if stored := _find(index, tenant, column, value):
                return stored
        known = self.list(limit=_NAMES_IN_ERRORS, tenant=tenant)
        names = ", ".join(concept.placeholder_token for concept in known) or "none"
        more = ", ..." if len(known) == _NAMES_IN_ERRORS else ""
        raise UnknownConcept(
            f"unknown concept {quoted(value)}; stored: {names}{more}; import it or send it along",
            placeholder_token=value,
        )

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
        with self._lock, _store_errors():
            yield self._index

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        """Files change only under the write lock of the index, one process at a time."""
        with self._lock, _store_errors():
            self._check_in_place()
            self._index.execute("BEGIN IMMEDIATE")
            try:
                yield self._index
                self._index.execute("COMMIT")
            except BaseException:
                self._index.execute("ROLLBACK")
                raise

    def _check_in_place(self) -> None:
        # SQLite goes on writing to an index that was deleted: all of it would be lost at the end.
        if _identity(self._index_path) != self._index_file:
            raise StoreError(
                "the folder of the concept store was removed or replaced while it was in use; "
                "start the server again"
            )

    def _collect(self, file_sha256: str) -> None:
        """Remove a file that no row needs."""
        with self._transaction() as index:
            if not index.execute(
                "SELECT 1 FROM concepts WHERE file_sha256 = ?", (file_sha256,)
            ).fetchone():
                self._path(file_sha256).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what a killed process left: our files without a row, and parts of files."""
        with self._transaction() as index:
            rows = index.execute("SELECT DISTINCT file_sha256 FROM concepts").fetchall()
            wanted = {self._path(file_sha256) for (file_sha256,) in rows}
            for path in self._files.iterdir():
                if path not in wanted and _OWN_FILE.fullmatch(path.name) and path.is_file():
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
    vectors = sum(part.nbytes for part in concept.encoders)
    return vectors + sum(len(value) for value in concept.metadata.values())


def _refuse_other_things(folder: Path) -> None:
    if any(folder.iterdir()) and not (folder / INDEX).exists():
        raise ConfigError(
            f"{folder} holds other things and no concept store; name a new or an empty folder"
        )


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one under the same name; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _open_index(path: Path) -> sqlite3.Connection:
    index = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    try:
        _check_index(index, path)
        index.row_factory = sqlite3.Row
        index.execute("PRAGMA journal_mode = WAL")
        index.execute("PRAGMA synchronous = FULL")  # an acknowledged import survives a power cut
        # All or nothing: half a schema would look like a database of something else.
        index.executescript(
            f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
    except BaseException:
        index.close()
        raise
    return index


def _check_index(index: sqlite3.Connection, path: Path) -> None:
    # One statement, so that another process that makes the index is seen before it or after it.
    ((version, num_tables),) = index.execute(
        "SELECT user_version, (SELECT count(*) FROM sqlite_master) FROM pragma_user_version"
    )
    if version not in (0, SCHEMA_VERSION):
        raise StoreError(
            f"the concept store {path} has schema {version}, this version reads {SCHEMA_VERSION}; "
            "use the version that wrote it, or another folder"
        )
    if version == 0 and num_tables:
        raise ConfigError(
            f"{path} is a database, but not the index of a concept store; "
            "name a new or an empty folder"
        )


@contextmanager
def _store_errors() -> Generator[None]:
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


def _find(index: sqlite3.Connection, tenant: str, column: Key, value: str) -> StoredConcept | None:
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
