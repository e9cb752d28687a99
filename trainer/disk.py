"""A disk that is full, or fills up: what a run needs, writes that may wait, and a last resort."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from engine.printing import printable
from trainer.errors import LearningError


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Room that a run takes at most, for something that must not be lost."""

    what: str
    folder: Path  # where it is written; it exists
    num_bytes: int


def check_room(needs: Iterable[Need]) -> None:
    """Raise `LearningError` where a disk has less room than is needed there together."""
    of_disk: dict[int, list[Need]] = {}
    for need in needs:
        of_disk.setdefault(os.stat(need.folder).st_dev, []).append(need)
    for together in of_disk.values():
        folder = together[0].folder
        free = shutil.disk_usage(folder).free
        if free < (wanted := sum(need.num_bytes for need in together)):
            parts = ", ".join(f"{need.what} {_in_words(need.num_bytes)}" for need in together)
            raise LearningError(
                f"not enough room in {folder}: {_in_words(free)} are free, the run may need "
                f"{_in_words(wanted)} ({parts}); make room, or write to another disk"
            )


def _in_words(num_bytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB"


class PatientWrites:
    """Writes that a run goes on without: the next one that is due tries again.

    Each kind of write says once that it fails, and that it works again.
    """

    def __init__(self) -> None:
        self._failing: set[str] = set()

    def attempt(self, what: str, write: Callable[[], object]) -> bool:
        """Whether the write was made."""
        try:
            write()
        except OSError as error:
            if what not in self._failing:
                reason = error.strerror or str(error)
                _say(f"cannot write {what}: {reason}; learning goes on, and will try again")
            self._failing.add(what)
            return False
        if what in self._failing:
            _say(f"{what} could be written again")
            self._failing.discard(what)
        return True


def _say(text: str) -> None:
    tqdm.write(printable(text), file=sys.stderr)


def write_somewhere(path: Path, write: Callable[[Path], object]) -> tuple[Path, OSError | None]:
    """Write to a path, or else to the system's folder for temporary files, or else to home.

    Returns where it was written, and why not to `path`. Raises the first error where all fail.
    """
    try:
        write(path)
        return path, None
    except OSError as error:
        for folder in (tempfile.gettempdir, Path.home):
            # A user without a home is a RuntimeError.
            with contextlib.suppress(OSError, RuntimeError):
                return _write_to_new_folder(Path(folder()), path.name, write), error
        raise


def _write_to_new_folder(parent: Path, name: str, write: Callable[[Path], object]) -> Path:
    """As a name there could be a stranger's: `mkdtemp` makes a folder for this user alone."""
    folder = Path(tempfile.mkdtemp(prefix="oneword-rescued-", dir=parent))
    try:
        write(folder / name)
    except OSError:
        folder.rmdir()
        raise
    return folder / name
