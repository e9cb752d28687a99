"""Archives of the recipe: what is written where."""

import io
import tarfile
from pathlib import Path

import pytest

from models.recipe.archives import unpack


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> tarfile.TarFile:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    stream.seek(0)
    return tarfile.open(fileobj=stream)


def test_files_are_written_and_links_are_not(tmp_path: Path) -> None:
    link = tarfile.TarInfo("passwords")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with archive((tarfile.TarInfo("package/icons.json"), b"{}"), (link, b"")) as tar:
        unpack(tar, tmp_path / "here")
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == [
        tmp_path / "here" / "package" / "icons.json"
    ]
    assert (tmp_path / "here" / "package" / "icons.json").read_bytes() == b"{}"


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_nothing_is_written_outside(tmp_path: Path, name: str) -> None:
    with (
        archive((tarfile.TarInfo(name), b"x")) as tar,
        pytest.raises(tarfile.TarError, match="would be written outside"),
    ):
        unpack(tar, tmp_path / "here")
    assert not (tmp_path / "outside").exists()
