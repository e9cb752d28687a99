"""Graphs as ONNX Runtime has optimized and packed them for this processor, kept between starts.

Loading a graph means to optimize it and to pack its weights anew, into memory of the process's own;
a prepared one is mapped as it lies, and processes share it. `oneword prepare` writes them
(engine/preparing.py); a bundle that has none is loaded as it is. Each has a folder that is named
after all that decides what it is, so one of another processor, another ONNX Runtime or another
bundle is not found, and nothing has to be compared.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from engine.files import sha256_of_file
from engine.sessions import sums_overflow

logger = logging.getLogger(__name__)

RECIPE = 1  # of engine/preparing.py: another number where it prepares in another way
GRAPH, WEIGHTS, NOTE = "graph.onnx", "graph.onnx.data", "prepared.json"
FOLDER = Path("oneword") / "prepared"  # of the user's cache folder
_PROCESSOR = (
    *("vendor_id", "cpu family", "model", "model name", "flags"),  # x86
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),  # Arm
)


class PreparedGraphs:
    """A folder of prepared graphs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, sources: Sequence[str]) -> Path:
        """The folder of a graph; `sources` are the SHA-256 of its file, then of its weights'."""
        return self.folder / _key(sources)

    def find(self, sources: Sequence[str]) -> Path | None:
        """A prepared graph that is whole and ours, ready to be loaded; None where there is none.

        It is code of a kind: one that others can write to is not used.
        """
        place = self.place(sources)
        try:
            if not (place / NOTE).is_file():
                return None
            if writer := _other_writer(self.folder, place, *place.iterdir()):
                logger.warning("%s can be written to by other users; it is not used", writer)
                return None
        except OSError as error:  # a cache of somebody else, or one that goes this very moment
            logger.warning("prepared graphs are not used: %s", error)
            return None
        if not _is_whole(place):
            logger.warning("%s is damaged and not used; run `oneword prepare` again", place)
            return None
        with suppress(OSError):  # on a read-only disk nobody asks what was used last
            os.utime(place / NOTE)
        return place / GRAPH


def usual_graphs() -> PreparedGraphs | None:
    """Those of the user's cache folder; None for a user who has none."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return PreparedGraphs((Path(base) if base else Path.home() / ".cache") / FOLDER)
    except RuntimeError:  # neither a home nor an entry in the list of users
        return None


def write_note(place: Path) -> None:
    """Write down what the files of a prepared graph are."""
    files = {file.name: sha256_of_file(file) for file in sorted(place.iterdir())}
    (place / NOTE).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")


def _is_whole(place: Path) -> bool:
    try:
        files: dict[str, str] = json.loads((place / NOTE).read_text(encoding="utf-8"))
        return GRAPH in files and all(
            sha256_of_file(place / name) == digest for name, digest in files.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _other_writer(*paths: Path) -> Path | None:
    """The first of these that somebody else than this user and root can change."""
    if not hasattr(os, "geteuid"):
        return None
    for path in paths:
        status = path.stat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return path
    return None


def _key(sources: Sequence[str]) -> str:
    made_of = {
        "recipe": RECIPE,
        "sources": list(sources),
        "onnxruntime": _onnxruntime_version(),
        "processor": _processor(),
        "sums_overflow": sums_overflow(),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _onnxruntime_version() -> str:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return ""


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """What tells processors apart that want other kernels."""
    names = [platform.system(), platform.machine(), platform.processor()]
    with suppress(OSError):
        first = cpuinfo.read_text(errors="replace").partition("\n\n")[0]
        names += [line for line in first.splitlines() if line.split("\t")[0].strip() in _PROCESSOR]
    return names
