"""The credentials that count now: read again when their file changes, so that revoking needs no
restart."""

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from engine.errors import ConfigError
from engine.security.credentials import Credentials, read_credentials

POLL_S = 1.0
Stamp = tuple[int, int, int, int]

logger = logging.getLogger(__name__)


class CredentialSource:
    """A credentials file as it is now. What cannot be read leaves what was read before."""

    def __init__(self, path: Path) -> None:
        """Read it for the first time; raises `ConfigError`."""
        self._path = path
        self._seen = stamp_of(path)  # before it is read: what changes meanwhile is read again
        self.current = read_credentials(path)

    async def follow(self, on_change: Callable[[], None], *, poll_s: float = POLL_S) -> None:
        """Look for changes until cancelled; the disk is waited for in a thread."""
        while True:
            await asyncio.sleep(poll_s)
            changed = await asyncio.to_thread(self._read_if_changed)
            if changed is not None:
                self.current = changed
                on_change()

    def _read_if_changed(self) -> Credentials | None:
        stamp = stamp_of(self._path)
        if stamp == self._seen:
            return None
        self._seen = stamp
        try:
            credentials = read_credentials(self._path)
        except ConfigError as error:
            logger.error("%s; the credentials of before still count", error)
            return None
        logger.info("%s was read again: %d credentials", self._path, len(credentials.by_key))
        return credentials


def stamp_of(path: Path) -> Stamp | None:
    """What tells a file from one that was written later; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode
