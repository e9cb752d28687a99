"""Files of the concept store: folders and fsspec file systems, and what either must refuse."""

import sys
from pathlib import Path
from typing import Any

import pytest

from engine.concepts import MAX_FILE_BYTES
from engine.errors import ConceptDamaged, ConfigError, StoreError
from engine.store.blobs import BlobFolder, Blobs, BlobUnusable, blob_name, digest_of, is_own
from engine.store.concept_store import ConceptStore, StoreConfig
from engine.store.fsspec_blobs import FsspecBlobs
from tests.store_setup import make_concept, value_of

NAME = blob_name("0" * 64)


@pytest.fixture(params=["folder", "file", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    match request.param:
        case "folder":
            blobs: Blobs = BlobFolder(tmp_path / "files")
        case "file":
            pytest.importorskip("fsspec", reason="fsspec is not installed")
            blobs = FsspecBlobs(f"file://{tmp_path / 'files'}")
        case _:
            pytest.importorskip("fsspec", reason="fsspec is not installed")
            blobs = FsspecBlobs(f"memory://{tmp_path.name}")
            request.addfinalizer(lambda: blobs._fs.rm(blobs._root, recursive=True))
    blobs.prepare()
    return blobs


def test_file_is_written_read_replaced_listed_and_removed(blobs: Blobs) -> None:
    for content in (b"one", b"two", b"two"):
        blobs.write(NAME, content)
        assert blobs.read(NAME) == content
    blobs.write("thesis.tex", b"precious")
    assert blobs.names() == [NAME]
    assert (blobs.written_time(NAME) or 0.0) > 1.7e9
    for _ in range(2):
        blobs.remove(NAME)
    assert blobs.written_time(NAME) is None
    assert blobs.names() == []
    with pytest.raises(BlobUnusable):
        blobs.read(NAME)
    assert blobs.read("thesis.tex") == b"precious"


def test_reading_ends_where_a_concept_must(blobs: Blobs) -> None:
    blobs.write(NAME, b"x" * (MAX_FILE_BYTES + 100))
    assert len(blobs.read(NAME)) == MAX_FILE_BYTES + 1


def test_names_are_told_from_others() -> None:
    part = f".{NAME}.0123abcd"
    assert digest_of(NAME) == "0" * 64
    assert is_own(part) and digest_of(part) is None
    for name in (NAME[1:], f"{NAME}.0123abcd", "oneword-store-id", f"x{NAME}", f"{NAME}\n"):
        assert not is_own(name)


def test_write_to_fsspec_that_breaks_off_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    blobs = FsspecBlobs(f"memory://{tmp_path.name}")
    blobs.prepare()
    blobs.write(NAME, b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("an error of the file system's own kind")

    for call in ("pipe_file", "mv"):
        with monkeypatch.context() as patch:
            patch.setattr(blobs._fs, call, fail)
            with pytest.raises(OSError, match=r"the file system failed \(ValueError\)"):
                blobs.write(blob_name("1" * 64), b"new")
        assert blobs.names() == [NAME]
    assert blobs.read(NAME) == b"old"
    blobs._fs.rm(blobs._root, recursive=True)


def test_content_is_checked_whatever_the_file_system_gives(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    files = f"memory://{tmp_path.name}"
    store = ConceptStore(StoreConfig(folder=tmp_path, files=files, cache_bytes=0))
    digest = store.import_concept(make_concept("<c>"))[0].file_sha256
    memory, path = fsspec.filesystem("memory"), f"/{tmp_path.name}/{blob_name(digest)}"
    content = memory.cat_file(path)
    for other in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), content + b" ", b""):
        memory.pipe_file(path, other)
        with pytest.raises(ConceptDamaged, match="'<c>' is damaged"):
            store.find_by_token("<c>")
    memory.rm_file(path)
    with pytest.raises(ConceptDamaged, match=r"no such file\); import it again with overwrite"):
        store.find_by_token("<c>")
    store.import_concept(make_concept("<c>"), overwrite=True)
    assert value_of(store, "<c>") == 1.0
    store.close()
    memory.rm(f"/{tmp_path.name}", recursive=True)


def test_file_system_that_fails_is_unavailable_and_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    files = f"memory://{tmp_path.name}"
    store = ConceptStore(StoreConfig(folder=tmp_path, files=files, cache_bytes=0))
    store.import_concept(make_concept("<c>"))

    def fail(*_: Any, **__: Any) -> None:
        raise TimeoutError("no answer from s3.internal")

    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "cat_file", fail)
        for action in (
            lambda: store.find_by_token("<c>"),
            lambda: store.import_concept(make_concept("<d>")),
        ):
            with pytest.raises(StoreError, match="cannot be used now") as error:
                action()
            assert not isinstance(error.value, ConceptDamaged)
    assert [stored.placeholder_token for stored in store.list(limit=9)] == ["<c>"]
    assert value_of(store, "<c>") == 1.0
    store.close()
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_local_url_is_a_folder_like_any_other(tmp_path: Path) -> None:
    files = tmp_path / "files"
    store = ConceptStore(StoreConfig(folder=tmp_path / "index", files=f"file://{files}"))
    assert isinstance(store._blobs, BlobFolder)
    digest = store.import_concept(make_concept("<c>"))[0].file_sha256
    assert {path.name for path in files.iterdir()} == {blob_name(digest), "oneword-store-id"}
    store.close()


@pytest.mark.parametrize(
    ("missing", "where", "said"),
    [
        ("psycopg", {"index": "postgresql://host/db", "files": "f"}, r"oneword\[postgres\]"),
        ("fsspec.core", {"files": "s3://bucket/concepts"}, r"s3:// need .*oneword\[fsspec\]"),
    ],
)
def test_package_that_is_not_installed_is_named(
    missing: str, where: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=said):
        ConceptStore(StoreConfig(folder=tmp_path, **where))


def test_file_system_that_fsspec_does_not_know_is_a_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    with pytest.raises(ConfigError, match="files cannot be kept in gopher://"):
        ConceptStore(StoreConfig(folder=tmp_path, files="gopher://me:hunter2@host/x"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_concepts_per_tenant": 0}, "max_concepts_per_tenant must be at least 1, got 0"),
        ({"kept_versions": 0}, "kept_versions must be at least 1"),
        ({"grace_s": -1.0}, "grace_s must not be negative"),
        ({"grace_s": float("nan")}, "grace_s must not be negative, got nan"),
        ({"folder": None}, "needs a folder, or both an index"),
        ({"folder": None, "index": "postgresql://host/db"}, "needs a folder, or both"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"folder": tmp_path, **settings}
    with pytest.raises(ConfigError, match=said):
        StoreConfig(**arguments)
