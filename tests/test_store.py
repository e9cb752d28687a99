"""The concept store: what it keeps, what it refuses, what a crash or another process leaves."""

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engine.concepts import Concept
from engine.errors import (
    ConceptDamaged,
    ConceptExists,
    ConfigError,
    StoreError,
    UnknownConcept,
)
from engine.store import FILES, INDEX, ConceptStore, StoredConcept

ROOT = Path(__file__).resolve().parent.parent


def make_concept(token: str = "<cat-toy>", value: float = 1.0, **fields: object) -> Concept:
    return Concept(
        placeholder_token=token,
        learned_embeddings=np.full((2, 4), value, np.float32),
        **fields,  # pyright: ignore[reportArgumentType]
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ConceptStore]:
    store = ConceptStore(tmp_path / "concepts")
    yield store
    store.close()


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / FILES).iterdir())


def test_a_concept_comes_back_as_it_was_after_reopening(tmp_path: Path) -> None:
    concept = make_concept(embedding_fingerprint="f" * 64, metadata={"steps": "500"})
    first = ConceptStore(tmp_path)
    stored, changed = first.import_concept(concept)
    first.close()
    second = ConceptStore(tmp_path)
    for found in (second.find_by_token("<cat-toy>"), second.find_by_id(concept.concept_id)):
        np.testing.assert_array_equal(found.learned_embeddings, concept.learned_embeddings)
        assert found.placeholder_token == "<cat-toy>"
        assert found.embedding_fingerprint == "f" * 64
        assert found.metadata == {"steps": "500"}
    assert changed
    assert second.get("<cat-toy>") == stored
    assert (stored.num_vectors, stored.dim, stored.concept_id) == (2, 4, concept.concept_id)
    second.close()


def test_the_same_vectors_again_change_nothing(store: ConceptStore) -> None:
    stored, _ = store.import_concept(make_concept(metadata={"steps": "1"}))
    again, changed = store.import_concept(make_concept(metadata={"steps": "2"}))
    assert (again, changed) == (stored, False)


def test_other_vectors_under_a_taken_name_are_refused(store: ConceptStore) -> None:
    store.import_concept(make_concept(value=1.0))
    with pytest.raises(ConceptExists, match="'<cat-toy>' is taken"):
        store.import_concept(make_concept(value=2.0))
    assert store.find_by_token("<cat-toy>").learned_embeddings[0, 0] == 1.0


def test_overwriting_replaces_the_concept_and_its_file(store: ConceptStore, tmp_path: Path) -> None:
    store.import_concept(make_concept(value=1.0))
    stored, changed = store.import_concept(make_concept(value=2.0), overwrite=True)
    assert changed
    assert store.find_by_token("<cat-toy>").learned_embeddings[0, 0] == 2.0
    assert [path.stem for path in files_of(tmp_path / "concepts")] == [stored.file_sha256]
    with pytest.raises(UnknownConcept):
        store.find_by_id(make_concept(value=1.0).concept_id)


def test_overwriting_with_the_same_vectors_is_no_change(store: ConceptStore) -> None:
    stored, _ = store.import_concept(make_concept())
    again, changed = store.import_concept(make_concept(), overwrite=True)
    assert (again, changed) == (stored, False)


def test_overwriting_with_other_metadata_keeps_the_new_metadata(
    store: ConceptStore, tmp_path: Path
) -> None:
    store.import_concept(make_concept(metadata={"steps": "1"}))
    stored, changed = store.import_concept(make_concept(metadata={"steps": "2"}), overwrite=True)
    assert not changed  # `changed` is about the vectors
    assert store.find_by_token("<cat-toy>").metadata == {"steps": "2"}
    assert [path.stem for path in files_of(tmp_path / "concepts")] == [stored.file_sha256]


def test_a_long_unknown_name_leaves_room_for_the_known_ones(store: ConceptStore) -> None:
    store.import_concept(make_concept("<cat-toy>"))
    with pytest.raises(UnknownConcept, match="stored: <cat-toy>;") as error:
        store.find_by_token("\U0001f600" * 5000)
    assert len(str(error.value)) < 200


def test_an_id_is_never_answered_with_other_vectors(tmp_path: Path) -> None:
    """Another process replaces the concept between the look-up of its id and the reading."""
    first, second = make_concept(value=1.0), make_concept(value=2.0)
    other = ConceptStore(tmp_path)

    class Overtaken(ConceptStore):
        def _read(self, stored: StoredConcept) -> Concept:
            other.import_concept(second, overwrite=True)
            return super()._read(stored)

    store = Overtaken(tmp_path)
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


def test_names_differ_by_case_and_accents(store: ConceptStore) -> None:
    for value, token in enumerate(("<Cat>", "<cat>", "<çat>")):
        store.import_concept(make_concept(token, float(value)))
    assert store.find_by_token("<cat>").learned_embeddings[0, 0] == 1.0


@pytest.mark.parametrize("token", ["../../escape", "/etc/passwd", "con", "a/b", "%2e%2e", "'; --"])
def test_names_never_become_paths(token: str, store: ConceptStore, tmp_path: Path) -> None:
    if " " in token:
        token = token.replace(" ", "")
    store.import_concept(make_concept(token))
    assert store.find_by_token(token).placeholder_token == token
    everything = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    file = f"{store.get(token).file_sha256}.safetensors"
    assert everything - {INDEX, f"{INDEX}-wal", f"{INDEX}-shm"} == {file}


def test_pages_follow_each_other_without_gap_or_overlap(store: ConceptStore) -> None:
    tokens = [f"<c{index:04d}>" for index in range(250)]
    for index, token in enumerate(reversed(tokens)):
        store.import_concept(make_concept(token, float(index)))
    found: list[str] = []
    while page := store.list(limit=70, after=found[-1] if found else ""):
        found += [stored.placeholder_token for stored in page]
    assert found == tokens


def test_a_page_is_stable_while_concepts_come_and_go(store: ConceptStore) -> None:
    for token in ("<b>", "<d>", "<f>"):
        store.import_concept(make_concept(token))
    (first,) = store.list(limit=1)
    store.delete("<b>")
    store.import_concept(make_concept("<a>"))
    rest = store.list(limit=10, after=first.placeholder_token)
    assert [stored.placeholder_token for stored in rest] == ["<d>", "<f>"]


def test_deleting_removes_the_row_and_the_file(store: ConceptStore, tmp_path: Path) -> None:
    store.import_concept(make_concept())
    store.delete("<cat-toy>")
    assert files_of(tmp_path / "concepts") == []
    with pytest.raises(UnknownConcept):
        store.find_by_token("<cat-toy>")
    with pytest.raises(UnknownConcept):
        store.delete("<cat-toy>")


def test_tenants_do_not_see_each_other(store: ConceptStore) -> None:
    store.import_concept(make_concept(value=1.0), tenant="one")
    store.import_concept(make_concept(value=2.0), tenant="two")
    assert store.find_by_token("<cat-toy>", tenant="one").learned_embeddings[0, 0] == 1.0
    with pytest.raises(UnknownConcept, match="stored: none"):
        store.find_by_token("<cat-toy>")


def test_a_file_that_two_tenants_share_goes_with_the_last_of_them(
    store: ConceptStore, tmp_path: Path
) -> None:
    for tenant in ("one", "two"):
        store.import_concept(make_concept(), tenant=tenant)
    assert len(files_of(tmp_path / "concepts")) == 1
    store.delete("<cat-toy>", tenant="one")
    assert store.find_by_token("<cat-toy>", tenant="two").num_vectors == 2
    store.delete("<cat-toy>", tenant="two")
    assert files_of(tmp_path / "concepts") == []


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "replaced"])
def test_a_damaged_file_is_an_error_that_importing_again_mends(tmp_path: Path, damage: str) -> None:
    store = ConceptStore(tmp_path, cache_bytes=0)  # read from disk each time
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
    else:
        path.unlink()
        path.symlink_to("/etc/hostname")
    with pytest.raises(ConceptDamaged, match="'<cat-toy>' is damaged") as error:
        store.find_by_token("<cat-toy>")
    assert str(tmp_path) not in str(error.value)
    store.import_concept(make_concept(), overwrite=True)
    assert store.find_by_token("<cat-toy>").num_vectors == 2
    store.close()


def test_loaded_concepts_are_kept_up_to_a_number_of_bytes(tmp_path: Path) -> None:
    one_concept = make_concept().learned_embeddings.nbytes
    store = ConceptStore(tmp_path, cache_bytes=2 * one_concept)
    for value, token in enumerate(("<a>", "<b>", "<c>")):
        store.import_concept(make_concept(token, float(value)))
        store.find_by_token(token)
    for path in files_of(tmp_path):
        path.unlink()
    assert store.find_by_token("<b>") and store.find_by_token("<c>")  # from memory
    with pytest.raises(ConceptDamaged):
        store.find_by_token("<a>")
    store.close()


def test_a_temporary_store_leaves_nothing_behind() -> None:
    store = ConceptStore.temporary()
    store.import_concept(make_concept())
    folder = store._files.parent
    assert store.find_by_token("<cat-toy>").num_vectors == 2
    store.close()
    assert not folder.exists()


def test_leftovers_of_a_killed_process_are_swept_away(tmp_path: Path) -> None:
    store = ConceptStore(tmp_path)
    store.import_concept(make_concept())
    store.close()
    kept = files_of(tmp_path)
    (tmp_path / FILES / ("0" * 64 + ".safetensors")).write_bytes(b"never got a row")
    (tmp_path / FILES / f".{'0' * 64}.safetensors.0123abcd").write_bytes(b"half")
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
    ConceptStore(tmp_path).close()
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


_IMPORT_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np
from engine.concepts import Concept
from engine.store import ConceptStore
store = ConceptStore(Path(sys.argv[1]))
for value in range(10**9):
    vectors = np.full((2, 4), value % 7, np.float32)
    store.import_concept(
        Concept(placeholder_token=f"<c{value % 5}>", learned_embeddings=vectors), overwrite=True
    )
    print(value, flush=True)
"""


def test_a_process_killed_in_the_middle_leaves_a_sound_store(tmp_path: Path) -> None:
    for kill_after in (1, 7, 30):
        with subprocess.Popen(
            [sys.executable, "-c", _IMPORT_FOR_EVER, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout
            for _ in range(kill_after):
                assert process.stdout.readline()
            process.kill()
        store = ConceptStore(tmp_path)
        rows = store.list(limit=100)
        assert len(rows) >= min(kill_after, 5)
        for row in rows:
            assert store.find_by_token(row.placeholder_token).concept_id == row.concept_id
        assert {path.stem for path in files_of(tmp_path)} == {row.file_sha256 for row in rows}
        store.close()


def test_threads_and_two_stores_on_one_folder_agree(tmp_path: Path) -> None:
    """Two handles stand for two processes: SQLite's locks do not tell them apart."""
    stores = [ConceptStore(tmp_path), ConceptStore(tmp_path, cache_bytes=0)]
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
    store._index.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(StoreError, match="schema 99, this version reads 1"):
        ConceptStore(tmp_path)


def test_an_index_that_is_no_database_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(b"not a database, but long enough to have a header" * 4)
    with pytest.raises(StoreError, match="not a database"):
        ConceptStore(tmp_path)


def test_a_folder_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used now"):
        ConceptStore(tmp_path / "file")
