"""Disks and clocks that fail on order: a small disk of its own, and a library before libc."""

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_name("machine.c")


@contextmanager
def small_disk(folder: Path, size: str) -> Generator[Path]:
    """A file system in memory; skips where none may be mounted."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "oneword-test", str(folder)]
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs (root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take all the room that is left; returns the file to remove."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        for size in (1 << 16, 1 << 12, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return filler


class Machine:
    """What a server sees of the machine, by a library that is loaded before libc."""

    def __init__(self, folder: Path) -> None:
        """Compile it; skips where there is no C compiler."""
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("needs a C compiler")
        self._folder = folder
        library = folder / "machine.so"
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        self.environment = {"LD_PRELOAD": str(library), "ONEWORD_TEST_MACHINE": str(folder)}
        self.set_clock(0)

    def set_clock(self, hours: float) -> None:
        """Put the wall clock ahead of the true time, or behind it."""
        clock = self._folder / "clock"
        if not clock.exists():
            clock.write_bytes(bytes(8))
        with clock.open("r+b", buffering=0) as file:  # mapped: it counts at once
            file.write(round(3600 * hours).to_bytes(8, "little", signed=True))

    @contextmanager
    def read_only(self, folder: Path) -> Generator[None]:
        """As the kernel leaves a disk that fails: open files too are not written any more."""
        order = self._folder / "read-only"
        order.symlink_to(os.path.realpath(folder))
        try:
            yield
        finally:
            order.unlink()
