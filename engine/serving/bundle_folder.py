"""The bundles that can be put in service by name: the folders in one folder of the server.

A name is never a path, and what it stands for lies in that folder: a link may lead from one bundle
to another there, and nowhere else.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from engine.bundle import Manifest
from engine.errors import BundlesUnavailable, InvalidRequest, UnknownBundle, quoted
from engine.security.bundle_signatures import read_trusted_manifest

# One part of a path, no hidden one (`.` and `..` are), and nothing that a log line could trip over.
_NAME = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*")
_MAX_NAME_BYTES = 255  # of file systems
_NAMES_IN_ERRORS = 5


class BundleFolder:
    """`bundle_dir`; every method looks at the disk as it is now."""

    def __init__(self, folder: Path | None, trusted_keys: Sequence[Path] = ()) -> None:
        self._folder = folder
        self._trusted_keys = trusted_keys

    def names(self) -> list[str]:
        """The folders in it, in order; raises `BundlesUnavailable`."""
        try:
            with os.scandir(self._root()) as entries:
                return sorted(e.name for e in entries if _is_name(e.name) and _is_folder(e))
        except OSError as error:
            raise _unreadable(error) from error

    def path_of(self, name: str) -> Path:
        """Where a bundle is, links resolved.

        Raises `InvalidRequest` for what is no name or leads out of the folder, `UnknownBundle`, and
        `BundlesUnavailable`.
        """
        root = self._root()
        if not _is_name(name):
            raise InvalidRequest(
                f"{quoted(name)} is not the name of a bundle: that is one folder of bundle_dir, of "
                f"1 to {_MAX_NAME_BYTES} bytes, without separators or control characters, and "
                "does not begin with a dot; ListBundles tells which there are",
                field="bundle_name",
            )
        try:
            path = (root / name).resolve()
            if root not in path.parents:
                raise InvalidRequest(
                    f"{quoted(name)} is a link that leads out of bundle_dir; copy the bundle there",
                    field="bundle_name",
                )
            if path.is_dir():
                return path
        except (OSError, RuntimeError):  # links in a circle, a folder that may not be entered
            pass
        known = self.names()
        more = ", ..." if len(known) > _NAMES_IN_ERRORS else ""
        raise UnknownBundle(
            f"unknown bundle {quoted(name)}; there: "
            f"{', '.join(known[:_NAMES_IN_ERRORS]) or 'none'}{more}; put it into the server's "
            "bundle_dir",
            bundle_name=name,
        )

    def name_of(self, path: Path) -> str:
        """The name of the bundle at a path; empty for one that lies elsewhere."""
        if self._folder is None:
            return ""
        try:
            return path.name if path.parent == self._folder.resolve() else ""
        except (OSError, RuntimeError):
            return ""

    def manifest_of(self, path: Path) -> Manifest:
        """What a bundle says of itself; raises `BundleError` or an `OSError`."""
        return read_trusted_manifest(path, self._trusted_keys)

    def _root(self) -> Path:
        if self._folder is None:
            raise BundlesUnavailable(
                "this server has no bundles to choose from; start it with --bundle-dir FOLDER, the "
                "folder that they lie in"
            )
        try:
            return self._folder.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise _unreadable(error) from error


def _is_name(name: str) -> bool:
    try:
        num_bytes = len(name.encode())
    except UnicodeEncodeError:  # a file name that is no text, which no caller can send
        return False
    return num_bytes <= _MAX_NAME_BYTES and _NAME.fullmatch(name) is not None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _unreadable(error: Exception) -> BundlesUnavailable:
    reason = error.strerror if isinstance(error, OSError) else "links in a circle"
    return BundlesUnavailable(f"the server's bundle_dir cannot be read: {reason}; put it back")
