"""What a concept store is told: what it keeps, and where its index and its files are."""

from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError

DAY_S = 24 * 3600.0
CACHE_BYTES = 64 << 20
BUSY_TIMEOUT_S = 10.0
_POSITIVE = ("max_concepts_per_tenant", "max_bytes_per_tenant", "max_aliases", "kept_versions")
_NOT_NEGATIVE = ("cache_bytes", "busy_timeout_s", "grace_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """What a store keeps, and for how long."""

    cache_bytes: int = CACHE_BYTES  # of vectors in memory
    busy_timeout_s: float = BUSY_TIMEOUT_S  # for the lock of another thread or process
    grace_s: float = DAY_S  # what is deleted or replaced can be had by its digest for so long
    kept_versions: int = 16  # of a name, beside those that an alias holds
    max_aliases: int = 32  # of a name
    max_concepts_per_tenant: int = 10_000  # names
    max_bytes_per_tenant: int = 1 << 30  # of files, with what waits to be collected

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig(StoreLimits):
    """Where concepts are kept, and how many. A folder alone holds both index and files."""

    folder: Path | None = None
    index: str = ""  # postgresql://...; "": SQLite in the folder
    files: str = ""  # a folder, or the URL of an fsspec file system; "": in the folder

    def __post_init__(self) -> None:
        StoreLimits.__post_init__(self)  # `super()` does not know a class with slots
        if self.folder is None and not (self.index and self.files):
            raise ConfigError(
                "a concept store needs a folder, or both an index (postgresql://...) and a place "
                "for files (a folder or the URL of a file system); name them"
            )
