"""Folders that are whole or absent: built beside their place, then moved there in one step.

The folders beside it are hidden, `.NAME.building-*` and `.NAME.replaced-*`, and each is locked by
the process that made it: one without a lock was left by a process that was killed.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from engine.files import sync_path

_KINDS = ("building", "replaced")


@contextlib.contextmanager
def staged_folder(output: Path) -> Generator[Path]:
    """An empty folder beside `output` that takes its place when the block ends well.

    If the block raises, the folder is removed and `output` is what it was. A folder that stood at
    `output` is moved aside first and removed last: between the two renames there is none. An
    `OSError` inside names `output`: the folder that it happened in is gone by then.
    """
    output = output.resolve()
    with _parents_of(output):
        remove_abandoned(output)
        with locked_folder(output, "building") as staging, _naming(output, staging):
            yield staging
            _open_to_all(staging)
            _sync_tree(staging)
            _swap(staging, output)


@contextlib.contextmanager
def locked_folder(output: Path, kind: str) -> Generator[Path]:
    """An empty folder beside `output`, removed at the end unless it holds the only copy of it."""
    folder, handle = _make_locked(output, kind)
    try:
        yield folder
    finally:
        if not (folder / output.name).exists() or output.exists():
            shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def remove_abandoned(output: Path) -> None:
    """Clear away what a killed build of `output` has left.

    A folder that the build was killed in the middle of replacing is put back first.
    """
    for kind in _KINDS:
        for folder in output.parent.glob(f".{output.name}.{kind}-*"):
            with contextlib.suppress(OSError):  # locked, or cleared away by another build
                handle = _locked_handle(folder, blocking=False)
                try:
                    if (folder / output.name).exists() and not output.exists():
                        os.replace(folder / output.name, output)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(handle)


def _make_locked(output: Path, kind: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.{kind}-"))
        # Another build may clear the folder away before it is locked: then make another.
        with contextlib.suppress(FileNotFoundError):
            handle = _locked_handle(folder, blocking=True)
            if folder.exists():
                return folder, handle
            os.close(handle)


def _locked_handle(folder: Path, *, blocking: bool) -> int:
    """An open folder with an exclusive `flock`, which ends with the process however that ends."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if blocking else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(handle)
        raise
    return handle


@contextlib.contextmanager
def _parents_of(output: Path) -> Generator[None]:
    """Make the folders above `output`; those that were made are removed if the block raises."""
    made = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                folder.rmdir()
        raise


@contextlib.contextmanager
def _naming(output: Path, staging: Path) -> Generator[None]:
    """Let errors of the file system, a full disk above all, say which folder they are about."""
    try:
        yield
    except OSError as error:
        inside = error.filename is None or str(error.filename).startswith(str(staging))
        if error.errno is None or not inside:
            raise
        raise type(error)(error.errno, error.strerror, str(output)) from error


def _swap(staging: Path, output: Path) -> None:
    if not output.exists():
        os.replace(staging, output)
    else:
        with locked_folder(output, "replaced") as aside:
            previous = aside / output.name
            try:
                os.replace(output, previous)
                os.replace(staging, output)
            except BaseException:
                if previous.exists() and not output.exists():
                    os.replace(previous, output)
                raise
    sync_path(output.parent)


def _open_to_all(folder: Path) -> None:
    """Readable to all: mkdtemp and safetensors make things that are their owner's alone."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        sync_path(path)
    sync_path(folder)
