"""A concept store in a folder: what is on disk, what it refuses, what other processes leave.

What all concept stores do, wherever they are, is in test_store_laws.py.
"""

import os
import shutil
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from engine.concepts import Concept
from engine.errors import ConceptDamaged, ConfigError, StoreError, UnknownConcept
from engine.store.cache import ConceptCache
from engine.store.concept_store import ConceptStore, StoreConfig, StoredConcept
from engine.store.places import FILES
from engine.store.sqlite import INDEX
from tests.store_setup import DAY_S, make_concept


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ConceptStore]:
    store = ConceptStore(tmp_path / "concepts")
    yield store
    store.close()


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / FILES).iterdir())


def test_the_same_vectors_again_change_nothing(store: ConceptStore) -> None:
    stored, _ = store.import_concept(make_concept(metadata={"steps": "1"}))
    again, changed = store.import_concept(make_concept(metadata={"steps": "2"}))
    assert (again, changed) == (stored, False)


def test_overwriting_replaces_the_concept_and_after_the_grace_its_file(
    store: ConceptStore, tmp_path: Path
) -> None:
    store.import_concept(make_concept(value=1.0))
    stored, changed = store.import_concept(make_concept(value=2.0), overwrite=True)
    assert changed
    assert store.find_by_token("<cat-toy>").learned_embeddings[0, 0] == 2.0
    store.delete("<cat-toy>")
    store.import_concept(make_concept(value=2.0))
    assert len(files_of(tmp_path / "concepts")) == 2
    store.collect(time.time() + 2 * DAY_S)
    assert [path.stem for path in files_of(tmp_path / "concepts")] == [stored.file_sha256]
    with pytest.raises(UnknownConcept):
        store.find_by_id(make_concept(value=1.0).concept_id)


def test_overwriting_with_other_metadata_keeps_the_new_metadata(store: ConceptStore) -> None:
    store.import_concept(make_concept(metadata={"steps": "1"}))
    _, changed = store.import_concept(make_concept(metadata={"steps": "2"}), overwrite=True)
    assert not changed  # `changed` is about the vectors
    assert store.find_by_token("<cat-toy>").metadata == {"steps": "2"}
    assert store.find_by_token("<cat-toy>@1").metadata == {"steps": "1"}


def test_a_long_unknown_name_leaves_room_for_the_known_ones(store: ConceptStore) -> None:
    store.import_concept(make_concept("<cat-toy>"))
    with pytest.raises(UnknownConcept, match="stored: <cat-toy>;") as error:
        store.find_by_token("\U0001f600" * 5000)
    assert len(str(error.value)) < 200


def test_an_id_is_never_answered_with_other_vectors(tmp_path: Path) -> None:
    """Another process replaces the concept between the look-up of its id and the reading."""
    first, second = make_concept(value=1.0), make_concept(value=2.0)
    at_once = StoreConfig(folder=tmp_path, grace_s=0.0, kept_versions=1)
    other = ConceptStore(at_once)

    class Overtaken(ConceptStore):
        def _read(self, stored: StoredConcept) -> Concept:
            other.import_concept(second, overwrite=True)
            other.collect(4e9)
            return super()._read(stored)

    store = Overtaken(at_once)
    store.import_concept(first)
    with pytest.raises(UnknownConcept):
        store.load("concept_id", first.concept_id)
    stored, concept = store.load("placeholder_token", "<cat-toy>")
    assert stored.concept_id == concept.concept_id == second.concept_id
    for opened in (store, other):
        opened.close()


def test_unknown_concepts_are_named_beside_known_ones(store: ConceptStore) -> None:
    store.import_concept(make_concept("<cat-toy>"))
    with pytest.raises(UnknownConcept, match="'<cat-toi>'; stored: <cat-toy>;") as error:
        store.find_by_token("<cat-toi>")
    assert error.value.placeholder_token == "<cat-toi>"


@pytest.mark.parametrize("token", ["../../escape", "/etc/passwd", "con", "a/b", "%2e%2e", "'; --"])
def test_names_never_become_paths(token: str, store: ConceptStore, tmp_path: Path) -> None:
    if " " in token:
        token = token.replace(" ", "")
    store.import_concept(make_concept(token))
    assert store.find_by_token(token).placeholder_token == token
    everything = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    file = f"{store.get(token).file_sha256}.safetensors"
    assert everything - {INDEX, f"{INDEX}-wal", f"{INDEX}-shm"} == {file}


def test_a_page_is_stable_while_concepts_come_and_go(store: ConceptStore) -> None:
    for token in ("<b>", "<d>", "<f>"):
        store.import_concept(make_concept(token))
    (first,) = store.list(limit=1)
    store.delete("<b>")
    store.import_concept(make_concept("<a>"))
    rest = store.list(limit=10, after=first.placeholder_token)
    assert [stored.placeholder_token for stored in rest] == ["<d>", "<f>"]


def test_deleting_removes_the_row_and_after_the_grace_the_file(
    store: ConceptStore, tmp_path: Path
) -> None:
    store.import_concept(make_concept())
    store.delete("<cat-toy>")
    with pytest.raises(UnknownConcept):
        store.find_by_token("<cat-toy>")
    with pytest.raises(UnknownConcept):
        store.delete("<cat-toy>")
    assert len(files_of(tmp_path / "concepts")) == 1
    store.collect(time.time() + 2 * DAY_S)
    assert files_of(tmp_path / "concepts") == []


@pytest.mark.parametrize(
    "damage", ["flipped", "truncated", "missing", "symlink", "hardlink", "pipe", "folder", "huge"]
)
def test_a_damaged_file_is_an_error_that_importing_again_mends(tmp_path: Path, damage: str) -> None:
    store = ConceptStore(StoreConfig(folder=tmp_path, cache_bytes=0))  # read from disk each time
    store.import_concept(make_concept())
    (path,) = files_of(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-3])
    elif damage == "flipped":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "huge":
        with path.open("ab") as file:
            file.truncate(1 << 40)
    else:
        moved = path.rename(tmp_path / "elsewhere")  # with the very content that is expected
        {"symlink": path.symlink_to, "hardlink": path.hardlink_to}.get(
            damage, lambda _: os.mkfifo(path) if damage == "pipe" else path.mkdir()
        )(moved)
    with pytest.raises(ConceptDamaged, match="'<cat-toy>' is damaged") as error:
        store.find_by_token("<cat-toy>")
    assert str(tmp_path) not in str(error.value)
    if damage == "folder":
        path.rmdir()  # the store does not remove what is not its own
    store.import_concept(make_concept(), overwrite=True)
    assert store.find_by_token("<cat-toy>").num_vectors == 2
    store.close()


def test_loaded_concepts_are_kept_up_to_a_number_of_bytes(tmp_path: Path) -> None:
    one_concept = make_concept().learned_embeddings.nbytes
    store = ConceptStore(StoreConfig(folder=tmp_path, cache_bytes=2 * one_concept))
    for value, token in enumerate(("<a>", "<b>", "<c>")):
        store.import_concept(make_concept(token, float(value)))
        store.find_by_token(token)
    for path in files_of(tmp_path):
        path.unlink()
    assert store.find_by_token("<b>") and store.find_by_token("<c>")  # from memory
    with pytest.raises(ConceptDamaged):
        store.find_by_token("<a>")
    store.close()


def test_threads_share_the_concepts_in_memory_and_their_bound() -> None:
    concepts = {f"{value}": make_concept(value=float(value)) for value in range(8)}
    bound = 3 * concepts["0"].learned_embeddings.nbytes
    cache = ConceptCache(bound)
    start = threading.Barrier(4)

    def look(worker: int) -> None:
        start.wait()
        for turn in range(300):
            key = f"{turn * (worker + 1) % 8}"
            assert cache.get(key, lambda key=key: concepts[key]) is concepts[key]

    with ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(look, worker) for worker in range(4)]:
            result.result()
    kept = [concept.learned_embeddings.nbytes for concept in cache._concepts.values()]
    assert sum(kept) == cache._num_bytes <= bound
    assert len(kept) == 3


def test_a_temporary_store_leaves_nothing_behind() -> None:
    store = ConceptStore.temporary()
    store.import_concept(make_concept())
    folder = store.folder
    assert folder
    assert store.find_by_token("<cat-toy>").num_vectors == 2
    store.close()
    assert not folder.exists()


def test_leftovers_of_a_killed_process_are_swept_away_when_they_are_old(tmp_path: Path) -> None:
    store = ConceptStore(tmp_path)
    store.import_concept(make_concept())
    store.close()
    kept = files_of(tmp_path)
    leftovers = [f"{'0' * 64}.safetensors", f".{'0' * 64}.safetensors.0123abcd"]
    for name in leftovers:
        (tmp_path / FILES / name).write_bytes(b"never got a row")
    ConceptStore(tmp_path).close()
    assert len(files_of(tmp_path)) == 3  # they may be what another process writes just now
    for path in files_of(tmp_path):
        os.utime(path, (0, 0))
    store = ConceptStore(tmp_path)
    assert files_of(tmp_path) == kept
    assert store.find_by_token("<cat-toy>").num_vectors == 2
    store.close()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    ConceptStore(tmp_path).close()
    for name in ("thesis.tex", "my-concept.safetensors", f"{'0' * 63}.safetensors", ".hidden"):
        (tmp_path / FILES / name).write_text("precious")
    (tmp_path / FILES / "folder").mkdir()
    (tmp_path / FILES / f"{'0' * 64}.safetensors").mkdir()
    before = files_of(tmp_path)
    store = ConceptStore(tmp_path)
    store.collect(4e9)
    store.close()
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("content", ["files/thesis.tex", "notes.txt", "files/sub/x"])
def test_a_folder_of_other_things_is_refused_and_untouched(tmp_path: Path, content: str) -> None:
    (tmp_path / content).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / content).write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="holds other things and no concept store; name a new"):
        ConceptStore(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_database_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    index = sqlite3.connect(tmp_path / INDEX)
    index.execute("CREATE TABLE thesis (chapter TEXT)")
    index.close()
    before = (tmp_path / INDEX).read_bytes()
    with pytest.raises(ConfigError, match="not the index of a concept store"):
        ConceptStore(tmp_path)
    assert (tmp_path / INDEX).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [INDEX]


def test_a_store_that_was_killed_while_it_was_made_can_be_made_again(tmp_path: Path) -> None:
    (tmp_path / INDEX).touch()  # SQLite makes an empty file first
    store = ConceptStore(tmp_path)
    assert store.import_concept(make_concept())[1]
    store.close()


@pytest.mark.parametrize("again", [False, True], ids=["removed", "removed and made again"])
def test_a_folder_removed_under_the_store_takes_no_concepts(tmp_path: Path, again: bool) -> None:
    folder = tmp_path / "concepts"
    store = ConceptStore(folder)
    store.import_concept(make_concept("<old>"))
    shutil.rmtree(folder)
    if again:
        ConceptStore(folder).close()
    for action in (
        lambda: store.import_concept(make_concept("<new>")),
        lambda: store.import_concept(make_concept("<old>")),
        lambda: store.delete("<old>"),
    ):
        with pytest.raises(StoreError, match="was removed or replaced.*start the server again"):
            action()
    store.close()
    assert folder.exists() == again
    if again:
        assert files_of(folder) == []


def test_an_acknowledged_file_is_on_disk_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was synced can still lose its name, unless its folder is synced after it."""
    store = ConceptStore(tmp_path)
    events: list[str] = []
    replace, fsync = os.replace, os.fsync

    def recorded_replace(source: Path, target: Path) -> None:
        replace(source, target)
        events.append("named")

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("folder" if is_folder else "file")

    monkeypatch.setattr("os.replace", recorded_replace)
    monkeypatch.setattr("os.fsync", recorded_fsync)
    store.import_concept(make_concept())
    assert events == ["file", "named", "folder"]
    store.close()


def test_threads_and_two_stores_on_one_folder_agree(tmp_path: Path) -> None:
    """Two handles stand for two processes: SQLite's locks do not tell them apart."""
    stores = [
        ConceptStore(tmp_path),
        ConceptStore(StoreConfig(folder=tmp_path, cache_bytes=0)),
    ]
    start = threading.Barrier(4)

    def work(worker: int) -> None:
        start.wait()
        store = stores[worker % 2]
        for turn in range(15):
            token = f"<c{turn % 3}>"
            store.import_concept(make_concept(token, float(turn % 3)), overwrite=True)
            try:
                assert store.find_by_token(token).learned_embeddings[0, 0] == turn % 3
                store.delete(token)
            except UnknownConcept:  # another worker was faster
                pass

    with ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(work, worker) for worker in range(4)]:
            result.result()
    for store in stores:
        for row in store.list(limit=10):
            assert store.find_by_token(row.placeholder_token).concept_id == row.concept_id
        store.close()


def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    store = ConceptStore(tmp_path)
    store.close()
    with closing(sqlite3.connect(tmp_path / INDEX)) as index:
        index.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="schema 99, this version reads 2"):
        ConceptStore(tmp_path)


def test_an_index_that_is_no_database_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(b"not a database, but long enough to have a header" * 4)
    with pytest.raises(StoreError, match="not a database"):
        ConceptStore(tmp_path)


def test_a_folder_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used now"):
        ConceptStore(tmp_path / "file")
