"""The code itself as an input of a build: changed code, another key."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def digest_of_sources(files: Iterable[str], *, root: Path = ROOT) -> str:
    """SHA-256 over names and bytes of source files, given relative to the packages' folder."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file} {hashlib.sha256((root / file).read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
