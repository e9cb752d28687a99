"""The trainings on disk: a folder for each, which appears whole and disappears whole.

lock        held by the one server process that works on them
incoming/   uploads under way; swept when a server starts
jobs/       one folder for each training (`engine.training.folder`)
trash/      trainings that are being deleted; swept as well
"""

import contextlib
import fcntl
import logging
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from engine.errors import ConfigError
from engine.files import sync_path
from engine.training.folder import TrainingFolder, TrainingRecord, TrainingState, storage_errors
from engine.training.spec import TrainingLimits
from engine.training.uploads import Upload

logger = logging.getLogger(__name__)

_TRAINING_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTraining:
    """A training as it was found on disk."""

    folder: TrainingFolder
    record: TrainingRecord
    state: TrainingState


class TrainingStore:
    """The folder of one server's trainings; its methods wait for the disk."""

    def __init__(self, folder: Path, limits: TrainingLimits) -> None:
        self._folder = folder
        self._limits = limits
        self._lock: IO[bytes] | None = None
        self._jobs, self._incoming, self._trash = (
            folder / name for name in ("jobs", "incoming", "trash")
        )

    def open(self) -> None:
        """Make the folder where there is none, and sweep it.

        Raises `ConfigError` where another process works on it, `StoreError` where it fails.
        """
        with storage_errors():
            for path in (self._jobs, self._incoming, self._trash):
                path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._folder)
            for path in (*self._incoming.iterdir(), *self._trash.iterdir()):
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def load(self) -> list[StoredTraining]:
        """All trainings, the oldest first. What cannot be read is logged and left alone."""
        found: list[StoredTraining] = []
        with storage_errors():
            folders = [TrainingFolder(path) for path in self._jobs.iterdir()]
        for folder in folders:
            if not _TRAINING_ID.fullmatch(folder.path.name):
                continue
            try:
                stored = StoredTraining(
                    folder=folder, record=folder.read_record(), state=folder.read_state()
                )
            except (OSError, ValueError, KeyError, TypeError):
                logger.exception("training %s cannot be read; left as it is", folder.path.name)
                continue
            found.append(stored)
        return sorted(found, key=lambda stored: stored.record.create_time)

    def begin_upload(self) -> Upload:
        """A place for the images of a new training."""
        return Upload(self._incoming / uuid.uuid4().hex, self._limits)

    def commit(self, upload: Upload, record: TrainingRecord) -> StoredTraining:
        """Make a finished upload a training. When this returns, it survives a power cut."""
        state = TrainingState()
        with storage_errors():
            upload.folder.write_record(record)
            upload.folder.write_state(state)
            sync_path(upload.folder.path)
            folder = TrainingFolder(self._jobs / record.training_id)
            upload.folder.path.rename(folder.path)
            sync_path(self._jobs)
        return StoredTraining(folder=folder, record=record, state=state)

    def delete(self, folder: TrainingFolder) -> None:
        """Remove a training, if it is still there; one that is removed in part is never seen."""
        doomed = self._trash / folder.path.name
        with storage_errors(), contextlib.suppress(FileNotFoundError):
            folder.path.rename(doomed)
            sync_path(self._jobs)
        shutil.rmtree(doomed, ignore_errors=True)


def _lock(folder: Path) -> IO[bytes]:
    """The lock of a folder; the system lifts it with the end of the process, however it comes."""
    file = (folder / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(
            f"another server works on the trainings in {folder}; give this one another "
            "training_dir, or start it without a training_model"
        ) from error
    return file
