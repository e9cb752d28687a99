"""Garbage collection of the concept store: rows of what was retired, then files without a row."""

from dataclasses import dataclass

from engine.store.blobs import Blobs, blob_errors, digest_of
from engine.store.changes import count_retired, forget_retired, needed_files
from engine.store.database import Database

# Publishing waits while so many are removed.
_FILES_IN_ONE_LOCK = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """How much of what nobody needs was removed."""

    num_versions: int
    num_files: int


def collect(database: Database, blobs: Blobs, *, before: float) -> Collected:
    """Remove what was retired, and files without a row that were written, up to `before`.

    Rows go first: a file that is missed stays for the next time, a row without one would be damage.
    """
    num_versions = 0
    if count_retired(database.read, before):
        with database.transaction(None) as execute:
            num_versions = forget_retired(execute, before)
    with blob_errors():
        found = blobs.names()
    needed = needed_files(database.read)
    suspects = [name for name in found if digest_of(name) not in needed]
    num_files = 0
    for start in range(0, len(suspects), _FILES_IN_ONE_LOCK):
        names = suspects[start : start + _FILES_IN_ONE_LOCK]
        num_files += _remove(database, blobs, names, before)
    return Collected(num_versions=num_versions, num_files=num_files)


def _remove(database: Database, blobs: Blobs, names: list[str], before: float) -> int:
    """Remove those that are still not needed, with nobody publishing meanwhile."""
    count = 0
    digests = [digest for name in names if (digest := digest_of(name))]
    with database.transaction(None) as execute, blob_errors():
        needed = needed_files(execute, digests) if digests else set[str]()
        for name in names:
            written = blobs.written_time(name)
            if digest_of(name) not in needed and written is not None and written <= before:
                blobs.remove(name)
                count += 1
    return count
