"""The files of the concept store in any file system that fsspec knows; needs oneword[fsspec].

A write goes to a part that is then moved, except in object stores, where a file appears when it is
whole and a move is a copy. Whether a file survives a power cut is the file system's promise.
"""

import importlib
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

from engine.concepts import MAX_FILE_BYTES
from engine.errors import ConfigError
from engine.store.blobs import BlobUnusable, is_own

_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2", "oci"}


class FsspecBlobs:
    """Files below a URL such as `s3://bucket/concepts`."""

    def __init__(self, url: str) -> None:
        protocol = url.partition("://")[0]
        try:
            core = importlib.import_module("fsspec.core")
        except ImportError as error:
            raise ConfigError(
                f"files in {protocol}:// need fsspec ({error}); install oneword[fsspec]"
            ) from error
        try:
            self._fs: Any
            self._fs, root = core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"files cannot be kept in {protocol}://: {error}") from error
        self._root = root.rstrip("/")
        self._moves = protocol not in _OBJECT_STORES

    def prepare(self) -> None:
        with _os_errors():
            self._fs.makedirs(self._root, exist_ok=True)

    def write(self, name: str, content: bytes) -> None:
        with suppress(BlobUnusable):
            if self.read(name) == content:
                return
        with _os_errors():
            if self._moves:
                self._write_and_move(name, content)
            else:
                self._fs.pipe_file(self._path(name), content)

    def read(self, name: str) -> bytes:
        with _os_errors():
            try:
                return self._fs.cat_file(self._path(name), end=MAX_FILE_BYTES + 1)
            except (FileNotFoundError, IsADirectoryError) as error:
                raise BlobUnusable("no such file") from error

    def remove(self, name: str) -> None:
        with _os_errors(), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def names(self) -> list[str]:
        with _os_errors():
            self._fs.invalidate_cache(self._root)  # others write here, too
            found = self._fs.ls(self._root, detail=True)
        names = [(info["name"].rpartition("/")[2], info["type"]) for info in found]
        return [name for name, kind in names if kind == "file" and is_own(name)]

    def written_time(self, name: str) -> float | None:
        with _os_errors(), suppress(FileNotFoundError, NotImplementedError):
            return self._fs.modified(self._path(name)).timestamp()
        return None

    def _write_and_move(self, name: str, content: bytes) -> None:
        part = self._path(f".{name}.{secrets.token_hex(4)}")
        try:
            self._fs.pipe_file(part, content)
            # Only what is damaged is in the way here, and not every file system moves over it.
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))
            self._fs.mv(part, self._path(name))
        except BaseException:
            with suppress(Exception):  # what failed before is what matters; collecting comes by
                self._fs.rm_file(part)
            raise

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


@contextmanager
def _os_errors() -> Generator[None]:
    """File systems have errors of their own, which no common base tells from others."""
    try:
        yield
    except (OSError, BlobUnusable):
        raise
    except Exception as error:
        raise OSError(f"the file system failed ({type(error).__name__})") from error
