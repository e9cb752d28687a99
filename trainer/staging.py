"""Folders that are whole or absent: built beside their place, then moved there in one step."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def staged_folder(output: Path) -> Generator[Path]:
    """An empty folder beside `output` that takes its place when the block ends well.

    If the block raises, the folder is removed and `output` is what it was. A folder that stood at
    `output` is moved aside first and removed last: between the two renames there is none.
    """
    made_parent = not output.parent.exists()
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.building-"))
    try:
        yield staging
        _open_to_all(staging)
        _sync_tree(staging)
        _swap(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made_parent and not any(output.parent.iterdir()):
            output.parent.rmdir()


def _swap(staging: Path, output: Path) -> None:
    if not output.exists():
        os.replace(staging, output)
    else:
        with tempfile.TemporaryDirectory(
            dir=output.parent, prefix=f".{output.name}.replaced-"
        ) as aside:
            previous = Path(aside) / output.name
            os.replace(output, previous)
            try:
                os.replace(staging, output)
            except BaseException:
                os.replace(previous, output)
                raise
    _sync(output.parent)


def _open_to_all(folder: Path) -> None:
    """Readable to all: mkdtemp and safetensors make things that are their owner's alone."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
