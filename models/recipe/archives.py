"""Tar archives, unpacked to nowhere else than where they should be."""

import tarfile
from pathlib import Path


def unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Writes the regular files of an archive below `folder`; links and devices are left out.

    Python's own filters for this came with 3.11.4 only.

    Errors:
        tarfile.TarError: a file would lie outside.
    """
    root = folder.resolve()
    for member in tar:
        if not member.isfile():
            continue
        path = (root / member.name).resolve()
        if not path.is_relative_to(root):
            raise tarfile.TarError(f"{member.name!r} would be written outside of {folder}")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = tar.extractfile(member)
        assert content is not None  # of a regular file it never is
        path.write_bytes(content.read())
