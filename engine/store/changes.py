"""What changes in the index: publishing, aliases, deleting; inside one transaction."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import replace

from engine.errors import StaleEtag, TenantFull
from engine.store.config import StoreConfig
from engine.store.rows import Execute, Rows, StoredConcept

# Of a version; `etag` is the name's.
_COLUMNS = tuple(name for name in StoredConcept.__slots__ if name != "etag")
_OF_NAME = "WHERE tenant = ? AND placeholder_token = ?"


class Changes(Rows):
    """The rows of one tenant under the lock of a transaction, which they must not outlive."""

    def __init__(self, execute: Execute, tenant: str, config: StoreConfig, now: float) -> None:
        super().__init__(execute, tenant)
        self._config = config
        self._now = now

    def check_etag(self, name: str, etag: str | None) -> None:
        """Refuse a change that was made up before another one of the same name; None asks not."""
        if etag is None:
            return
        latest = self.latest(name)
        if latest is None or latest.etag != etag:
            what = "was deleted" if latest is None else "has changed"
            raise StaleEtag(
                f"{name!r} {what} since its etag was read; look at it again, and repeat the "
                "change with its etag of now if it is still wanted"
            )

    def check_room(self, num_bytes: int, *, new_names: int) -> None:
        """Refuse what is beyond the share of the tenant."""
        ((num_names,),) = self._execute(
            "SELECT count(*) FROM concept_names WHERE tenant = ? AND latest IS NOT NULL",
            (self._tenant,),
        )
        if num_names + new_names > self._config.max_concepts_per_tenant:
            raise TenantFull(
                f"{num_names} concepts are stored, the limit is "
                f"{self._config.max_concepts_per_tenant}; delete some that are not needed"
            )
        ((used,),) = self._execute(
            "SELECT CAST(coalesce(sum(num_bytes), 0) AS BIGINT) FROM concept_versions "
            "WHERE tenant = ?",
            (self._tenant,),
        )
        if used + num_bytes > self._config.max_bytes_per_tenant:
            raise TenantFull(
                f"the stored concepts take {used} bytes, this one {num_bytes}, the limit is "
                f"{self._config.max_bytes_per_tenant}; delete some that are not needed: their "
                f"room is free {self._config.grace_s / 3600:g} h later"
            )

    def publish(self, new: StoredConcept) -> StoredConcept:
        """Make it the latest version of its name; `version` and `etag` are given here."""
        name = new.placeholder_token
        if self.latest(name) is None:  # what a deleted name was called before is over now
            self._execute(f"DELETE FROM concept_aliases {_OF_NAME}", (self._tenant, name))
        before = self._execute(
            f"SELECT last_version FROM concept_names {_OF_NAME}", (self._tenant, name)
        )
        version = before[0][0] + 1 if before else 1
        stored = replace(new, version=version, etag=_new_etag())
        self._execute(
            "INSERT INTO concept_names (tenant, placeholder_token, latest, last_version, etag) "
            "VALUES (?, ?, ?, ?, ?) ON CONFLICT (tenant, placeholder_token) DO UPDATE SET "
            "latest = excluded.latest, last_version = excluded.last_version, etag = excluded.etag",
            (self._tenant, name, version, version, stored.etag),
        )
        values = [getattr(stored, column) for column in _COLUMNS]
        self._execute(
            f"INSERT INTO concept_versions (tenant, {', '.join(_COLUMNS)}) "
            f"VALUES ({_places(len(values) + 1)})",
            (self._tenant, *values),
        )
        self._retire_surplus(name)
        return stored

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Let an alias stand for a version that is there, and not for the same as before."""
        aliases = self.aliases(name)
        if alias not in aliases and len(aliases) >= self._config.max_aliases:
            raise TenantFull(
                f"{name!r} has {len(aliases)} aliases, the limit is {self._config.max_aliases}; "
                "delete one, or move one"
            )
        self._execute(
            "INSERT INTO concept_aliases (tenant, placeholder_token, alias, version) "
            "VALUES (?, ?, ?, ?) ON CONFLICT (tenant, placeholder_token, alias) "
            "DO UPDATE SET version = excluded.version",
            (self._tenant, name, alias, version),
        )
        self._touch(name)

    def delete_alias(self, name: str, alias: str) -> None:
        self._execute(
            f"DELETE FROM concept_aliases {_OF_NAME} AND alias = ?", (self._tenant, name, alias)
        )
        self._touch(name)

    def delete(self, name: str) -> None:
        """Retire all versions of a name. Its row stays until they are collected, so that the
        number of a version is not given twice while one of them can still be had; so do its
        aliases, for `undelete`: they find no version that lives."""
        key = (self._tenant, name)
        # What was retired before, perhaps by a server whose clock is ahead, was retired before:
        # `undelete` tells the two apart by their times.
        self._execute(
            f"UPDATE concept_versions SET retired_time = ? {_OF_NAME} AND retired_time >= ?",
            (math.nextafter(self._now, -math.inf), *key, self._now),
        )
        self._execute(
            f"UPDATE concept_versions SET retired_time = ? {_OF_NAME} AND retired_time IS NULL",
            (self._now, *key),
        )
        self._execute(
            f"UPDATE concept_names SET latest = NULL, etag = ? {_OF_NAME}", (_new_etag(), *key)
        )

    def undelete(self, name: str) -> StoredConcept:
        """Bring back what was retired when a name was deleted."""
        key = (self._tenant, name)
        # The deletion came last, and what it retired has a time of its own.
        self._execute(
            f"UPDATE concept_versions SET retired_time = NULL {_OF_NAME} AND retired_time = "
            f"(SELECT max(retired_time) FROM concept_versions {_OF_NAME})",
            (*key, *key),
        )
        self._execute(
            "UPDATE concept_names SET latest = (SELECT max(version) FROM concept_versions "
            f"{_OF_NAME} AND retired_time IS NULL) {_OF_NAME}",
            (*key, *key),
        )
        self._touch(name)
        latest = self.latest(name)
        assert latest is not None  # a name that was deleted had a latest version
        return latest

    def _touch(self, name: str) -> None:
        self._execute(
            f"UPDATE concept_names SET etag = ? {_OF_NAME}", (_new_etag(), self._tenant, name)
        )
        self._retire_surplus(name)

    def _retire_surplus(self, name: str) -> None:
        """Retire what is neither among the newest versions nor held by an alias."""
        key = (self._tenant, name)
        self._execute(
            f"UPDATE concept_versions SET retired_time = ? {_OF_NAME} AND retired_time IS NULL "
            f"AND version NOT IN (SELECT version FROM concept_aliases {_OF_NAME}) "
            f"AND version NOT IN (SELECT version FROM concept_versions {_OF_NAME} "
            "AND retired_time IS NULL ORDER BY version DESC LIMIT ?)",
            (self._now, *key, *key, *key, self._config.kept_versions),
        )


def count_retired(execute: Execute, before: float) -> int:
    """How many versions, of all tenants, were retired so long ago."""
    ((count,),) = execute(
        "SELECT count(*) FROM concept_versions WHERE retired_time <= ?", (before,)
    )
    return count


def forget_retired(execute: Execute, before: float) -> int:
    """Remove the rows of what was retired so long ago, of all tenants; returns how many."""
    count = count_retired(execute, before)
    execute("DELETE FROM concept_versions WHERE retired_time <= ?", (before,))
    execute(
        "DELETE FROM concept_names WHERE latest IS NULL AND NOT EXISTS (SELECT 1 "
        "FROM concept_versions v WHERE v.tenant = concept_names.tenant "
        "AND v.placeholder_token = concept_names.placeholder_token)",
        (),
    )
    execute(
        "DELETE FROM concept_aliases WHERE NOT EXISTS (SELECT 1 FROM concept_names n "
        "WHERE n.tenant = concept_aliases.tenant "
        "AND n.placeholder_token = concept_aliases.placeholder_token)",
        (),
    )
    return count


def needed_files(execute: Execute, files: Sequence[str] | None = None) -> set[str]:
    """The digests of the files that any row needs; of these `files`, where they are given."""
    where = "" if files is None else f" WHERE file_sha256 IN ({_places(len(files))})"
    rows = execute(f"SELECT DISTINCT file_sha256 FROM concept_versions{where}", files or ())
    return {file_sha256 for (file_sha256,) in rows}


def _places(count: int) -> str:
    return ", ".join("?" * count)


def _new_etag() -> str:
    # Not a counter: a name that is deleted and made again must not have an etag of before.
    return secrets.token_hex(8)
