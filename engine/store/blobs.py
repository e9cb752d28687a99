"""The files of the concept store, named by the SHA-256 of their content, in a folder.

Nothing that a caller chooses becomes a path. Files that are not the store's own are never touched.
"""

import errno
import os
import re
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from engine.concepts import MAX_FILE_BYTES
from engine.errors import ConfigError, StorageFull, StoreError
from engine.files import is_full, sync_path, write_atomically

_SUFFIX = ".safetensors"
# A concept's file, or what is written on the way to one.
_OWN = re.compile(r"([0-9a-f]{64})\.safetensors|\.[0-9a-f]{64}\.safetensors\.[0-9a-f]{8}")
# Says which index the files belong to, where the two are not in one folder.
_OWNER = "oneword-store-id"


class BlobUnusable(Exception):
    """There is no such file, or something else in its place; the text says which."""


@runtime_checkable
class Blobs(Protocol):
    """Small files by name. Failures that may pass are `OSError`s."""

    def prepare(self) -> None:
        """Make the place where there is none."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all; when this returns, it stays."""
        ...

    def read(self, name: str) -> bytes:
        """All of a file, or so much that it is seen to be too long; raises `BlobUnusable`."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...

    def names(self) -> list[str]:
        """The files that are the store's own by their names."""
        ...

    def written_time(self, name: str) -> float | None:
        """Seconds since the epoch; None where the file is gone or nobody knows."""
        ...


def blob_name(file_sha256: str) -> str:
    return f"{file_sha256}{_SUFFIX}"


def is_own(name: str) -> bool:
    return _OWN.fullmatch(name) is not None


def digest_of(name: str) -> str | None:
    """The digest of a file of our own; None for the remains of an unfinished one."""
    match = _OWN.fullmatch(name)
    return match[1] if match else None


def claim(blobs: Blobs, store_id: str) -> None:
    """Bind files to an index: another one, collecting, would remove what this one needs."""
    try:
        owner = blobs.read(_OWNER).decode(errors="replace")
    except BlobUnusable:
        blobs.write(_OWNER, store_id.encode())
        return
    if owner != store_id:
        raise ConfigError(
            "the files of the concept store belong to another index; give each index a place for "
            f"files of its own (if the index was made anew on purpose, remove {_OWNER} there)"
        )


@contextmanager
def blob_errors() -> Generator[None]:
    """What the place of the files may raise, as errors of the store."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        kind = StorageFull if is_full(error) else StoreError
        raise kind(
            f"the concept store cannot be used now: {reason}; try again, or see to its disk"
        ) from error


class BlobFolder:
    """Files in a folder of this machine, or of a network that behaves like one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        if self._folder.is_symlink():
            raise ConfigError(
                f"{self._folder} is a link; the files of a concept store must be in a folder of "
                "its own: name the folder that it points to, or another"
            )
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: bytes) -> None:
        self.prepare()
        write_atomically(self._folder / name, content)
        sync_path(self._folder)

    def read(self, name: str) -> bytes:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe must not be waited for
        try:
            descriptor = os.open(self._folder / name, flags)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                raise BlobUnusable(error.strerror) from error
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise BlobUnusable("a link or not a file at all")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(MAX_FILE_BYTES + 1)
        finally:
            os.close(descriptor)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        with os.scandir(self._folder) as entries:
            return [
                e.name for e in entries if is_own(e.name) and not e.is_dir(follow_symlinks=False)
            ]

    def written_time(self, name: str) -> float | None:
        with suppress(FileNotFoundError):
            return (self._folder / name).lstat().st_mtime
        return None
