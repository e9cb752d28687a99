"""Small, careful file operations: hashing, and writes that are whole or absent."""

import errno
import hashlib
import os
import secrets
from pathlib import Path

_CHUNK_BYTES = 1 << 20
# The disk, the user's share of it, or the size that one file may have.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file as hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part of it.

    Raises an `OSError` that names `path`, not the temporary file beside it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_and_rename(path, content)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def write_private(path: Path, content: bytes) -> None:
    """The same for a file with secrets: for its owner alone, from its first moment on.

    A file that is there keeps its owner, so that root can write what a service reads.
    """
    path = path.resolve()  # a link stays a link
    try:
        owner = path.stat() if path.exists() else None
        _write_and_rename(path, content, mode=0o600, owner=owner)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _write_and_rename(
    path: Path, content: bytes, *, mode: int = 0o666, owner: os.stat_result | None = None
) -> None:
    # Not tempfile.mkstemp: its files are private, and the result should follow the umask.
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            if owner is not None and (owner.st_uid, owner.st_gid) != (os.getuid(), os.getgid()):
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_path(path: Path) -> None:
    """Put a file, or the names in a folder, on disk: the one does not do the other (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Whether a write failed because there is no room for it."""
    return error.errno in _FULL


def file_identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one under the same name; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
