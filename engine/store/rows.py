"""What the index knows: the rows of one tenant, as they can be asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest, quoted
from engine.store.references import (
    MAX_DIGEST_DIGITS,
    Reference,
    parse_reference,
    without_tenant,
)

DEFAULT_TENANT = "default"
# One statement with its values, `?` for each; gives the rows.
Execute = Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]
LARGEST_INTEGER = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredConcept:
    """A version of a concept. What changes is `etag`, that of its name, and `retired_time`."""

    placeholder_token: str
    version: int
    concept_id: str
    file_sha256: str
    num_bytes: int  # of its file, about
    num_vectors: int
    dim: int
    embedding_fingerprint: str
    import_time: float  # seconds since the epoch, UTC
    etag: str
    retired_time: float | None = None  # deleted or replaced then; None: it lives


_COLUMNS = ", ".join(f"{'n' if name == 'etag' else 'v'}.{name}" for name in StoredConcept.__slots__)
_VERSIONS = (
    f"SELECT {_COLUMNS} FROM concept_names n JOIN concept_versions v "
    "ON v.tenant = n.tenant AND v.placeholder_token = n.placeholder_token"
)
_OF_NAME = "WHERE n.tenant = ? AND n.placeholder_token = ?"
_LIVE_FIRST = "ORDER BY v.retired_time IS NOT NULL, v.placeholder_token, v.version DESC LIMIT 1"


class Rows:
    """The concepts of one tenant. Nothing is remembered between two calls."""

    def __init__(self, execute: Execute, tenant: str) -> None:
        self._execute = execute
        self._tenant = tenant

    def find(self, text: str) -> StoredConcept | None:
        """A concept by its name or by a reference; raises `InvalidRequest` for half a digest."""
        plain = without_tenant(text, self._tenant)
        for name in dict.fromkeys((text, plain)):
            if stored := self.latest(name):
                return stored
        reference = parse_reference(plain)
        return None if reference is None else self._referred(reference)

    def latest(self, name: str) -> StoredConcept | None:
        return self._one(f"AND v.version = n.latest {_OF_NAME}", name)

    def version(self, name: str, version: int) -> StoredConcept | None:
        """A version that is neither deleted nor retired."""
        if not 0 < version <= LARGEST_INTEGER:
            return None
        return self._one(f"{_OF_NAME} AND v.version = ? AND v.retired_time IS NULL", name, version)

    def by_id(self, concept_id: str) -> StoredConcept | None:
        """By its vectors, deleted or not: a living one first, then the first by name."""
        return self._one(f"WHERE n.tenant = ? AND v.concept_id = ? {_LIVE_FIRST}", concept_id)

    def page(self, after: str, limit: int) -> list[StoredConcept]:
        """Names in the order of their code points, from the first one past `after`."""
        # PostgreSQL has no NUL in texts; no name has one either, so this cuts at the same place.
        return self._many(
            "AND v.version = n.latest WHERE n.tenant = ? AND n.placeholder_token > ? "
            "ORDER BY n.placeholder_token LIMIT ?",
            after.split("\0")[0],
            limit,
        )

    def versions(self, name: str, *, below: int, limit: int) -> list[StoredConcept]:
        """Up to `limit` living versions of a name with numbers below one, the newest first."""
        return self._many(
            f"{_OF_NAME} AND v.version < ? AND v.retired_time IS NULL "
            "ORDER BY v.version DESC LIMIT ?",
            name,
            below,
            limit,
        )

    def is_deleted(self, name: str) -> bool:
        """Whether a name was deleted, and is not collected yet."""
        return self.latest(name) is None and self._one(f"{_OF_NAME} LIMIT 1", name) is not None

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of a name, in order, and the version that each stands for."""
        return dict(
            self._execute(
                "SELECT alias, version FROM concept_aliases "
                "WHERE tenant = ? AND placeholder_token = ? ORDER BY alias",
                (self._tenant, name),
            )
            if _is_text(name)
            else []
        )

    def aliases_of(self, found: Sequence[StoredConcept]) -> list[tuple[str, ...]]:
        """For each of these versions, in the order of their names, its aliases in order."""
        names = [stored.placeholder_token for stored in found]
        by_version: dict[tuple[str, int], list[str]] = {}
        for name, version, alias in (
            self._execute(
                "SELECT placeholder_token, version, alias FROM concept_aliases WHERE tenant = ? "
                "AND placeholder_token >= ? AND placeholder_token <= ? ORDER BY alias",
                (self._tenant, min(names), max(names)),
            )
            if names
            else []
        ):
            by_version.setdefault((name, version), []).append(alias)
        return [
            ()
            if stored.retired_time is not None
            else tuple(by_version.get((stored.placeholder_token, stored.version), ()))
            for stored in found
        ]

    def _referred(self, reference: Reference) -> StoredConcept | None:
        if reference.version is not None:
            return self.version(reference.name, reference.version)
        if reference.digest:
            return self._by_digest(reference.name, reference.digest)
        if reference.alias:
            version = self.aliases(reference.name).get(reference.alias)
            return None if version is None else self.version(reference.name, version)
        return self.latest(reference.name)

    def _by_digest(self, name: str, digits: str) -> StoredConcept | None:
        # As a range, which an index serves: `g` is what follows the last hex digit.
        where = f"{_OF_NAME} AND v.concept_id >= ? AND v.concept_id < ?"
        values = (name, digits, f"{digits}g")
        found = self._one(f"{where} {_LIVE_FIRST}", *values)
        if found is None or len(digits) == MAX_DIGEST_DIGITS:
            return found
        if self._many(f"{where} AND v.concept_id <> ? LIMIT 1", *values, found.concept_id):
            raise InvalidRequest(
                f"several versions of {quoted(name)} begin with sha256:{digits}; give more digits",
                field="placeholder_token",
            )
        return found

    def _one(self, where: str, *values: object) -> StoredConcept | None:
        found = self._many(where, *values)
        return found[0] if found else None

    def _many(self, where: str, *values: object) -> list[StoredConcept]:
        if not all(_is_text(value) for value in values if isinstance(value, str)):
            return []
        rows = self._execute(f"{_VERSIONS} {where}", (self._tenant, *values))
        return [
            StoredConcept(**dict(zip(StoredConcept.__slots__, row, strict=True))) for row in rows
        ]


def _is_text(value: str) -> bool:
    """Whether databases can hold a text at all; nothing is stored under one that they cannot."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
