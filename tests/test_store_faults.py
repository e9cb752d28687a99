"""Faults under a concept store: killed processes, locks, full and read-only disks, links."""

import errno
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from engine import files
from engine.errors import ConfigError, StorageFull, StoreError
from engine.store.concept_store import Collected, ConceptStore, StoreConfig
from engine.store.places import FILES
from engine.store.sqlite import INDEX
from tests.store_setup import DAY_S, ROOT, in_process, make_concept, value_of

FAR_AHEAD = 4e9

_PUBLISH_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np
from engine.concepts import Concept
from engine.store.concept_store import ConceptStore, StoreConfig
store = ConceptStore(StoreConfig(folder=Path(sys.argv[1]), kept_versions=2))
print("ready", flush=True)
for value in range(int(sys.argv[2]), 10**9):
    vectors = np.full((2, 4), value, np.float32)
    concept = Concept(placeholder_token=f"<c{value % 3}>", learned_embeddings=vectors)
    store.import_concept(concept, overwrite=True)
    store.set_alias(concept.placeholder_token, "stable")
    print(value, flush=True)
"""


def test_process_killed_at_any_moment_leaves_a_sound_store(tmp_path: Path) -> None:
    """SIGKILL after some acknowledged publishes and a random bit more, within one or between two.

    What was acknowledged is there; the one under way is there whole or not at all.
    """
    chance = random.Random(7)
    done = -1  # the last acknowledged value
    for _ in range(4):
        with in_process(_PUBLISH_FOR_EVER, str(tmp_path), str(done + 1)) as process:
            assert process.stdout and process.stdout.readline() == b"ready\n"
            for _ in range(chance.randrange(1, 12)):
                done = int(process.stdout.readline())
            for _ in range(chance.randrange(0, 20_000)):
                pass  # somewhere in the next publish
            process.kill()
            done = max([done, *map(int, process.stdout.read().split())])
        store = ConceptStore(StoreConfig(folder=tmp_path, kept_versions=2, cache_bytes=0))
        for row in store.list(limit=9):
            # Its last acknowledged value, or the one that there was no time to acknowledge.
            expected = [v for v in range(done + 2) if f"<c{v % 3}>" == row.placeholder_token]
            acknowledged = max([v for v in expected if v <= done], default=None)
            assert value_of(store, row.placeholder_token) in (acknowledged, max(expected))
            if acknowledged is not None:
                stable = value_of(store, f"{row.placeholder_token}@stable")
                assert stable in (acknowledged, max(expected))
            for version in store.versions(row.placeholder_token):
                value_of(store, f"{row.placeholder_token}@{version.version}")
        store.close()
    store = ConceptStore(tmp_path)
    store.collect(FAR_AHEAD)
    tokens = [row.placeholder_token for row in store.list(limit=9)]
    needed = {version.file_sha256 for token in tokens for version in store.versions(token)}
    assert {path.stem for path in (tmp_path / FILES).iterdir()} == needed
    store.close()


def test_index_that_is_locked_for_long_is_unavailable_for_changes_alone(tmp_path: Path) -> None:
    store = ConceptStore(StoreConfig(folder=tmp_path, busy_timeout_s=0.05))
    store.import_concept(make_concept("<c>"))
    with closing(sqlite3.connect(tmp_path / INDEX, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="database is locked; try again") as error:
            store.import_concept(make_concept("<d>"))
        assert not isinstance(error.value, StorageFull)
        assert value_of(store, "<c>") == 1.0
        reader = ConceptStore(StoreConfig(folder=tmp_path, busy_timeout_s=0.05))
        assert value_of(reader, "<c>") == 1.0
        reader.close()
    assert store.import_concept(make_concept("<d>"))[1]
    store.close()


def _fill_files(patch: pytest.MonkeyPatch) -> None:
    def write(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "temporary")

    patch.setattr(files, "_write_and_rename", write)


def _fill_index(store: ConceptStore, pages: int) -> None:
    """SQLite's own limit gives the error of a full disk."""
    slot = store._database._writer
    slot.run(lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}"))


def test_full_disk_refuses_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ConceptStore(tmp_path)
    store.import_concept(make_concept("<c>"))
    with monkeypatch.context() as patch:
        _fill_files(patch)
        with pytest.raises(StorageFull, match="No space left on device; try again, or see to"):
            store.import_concept(make_concept("<c>", 2.0), overwrite=True)
    _fill_index(store, 1)
    with pytest.raises(StorageFull, match="database or disk is full"):
        for value in range(200):  # until the pages that are there are full
            store.import_concept(make_concept(f"<n{value}>", metadata={"long": "x" * 99}))
    _fill_index(store, 1 << 30)
    assert store.import_concept(make_concept("<c>", 2.0), overwrite=True)[0].version == 2
    for row in store.list(limit=999):
        assert store.find_by_token(row.placeholder_token).concept_id == row.concept_id
    store.close()


_READ_ONLY = """
import os, sys
from pathlib import Path
from engine.errors import StoreError
from engine.store.concept_store import ConceptStore
from tests.store_setup import make_concept, value_of
os.setgroups([]); os.setgid(65534); os.setuid(65534)
store = ConceptStore(Path(sys.argv[1]))
print(value_of(store, "<c>"))
for change in (
    lambda: store.import_concept(make_concept("<c>", 2.0), overwrite=True),
    lambda: store.set_alias("<c>", "stable"),
    lambda: store.delete("<c>"),
):
    try:
        change()
    except StoreError as error:
        print(type(error).__name__, error)
print("waiting", flush=True)
sys.stdin.readline()
print(value_of(store, "<c>"), len(store.versions("<c>")))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="oneword-faults-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to read as somebody who may not write")
@pytest.mark.parametrize("in_use", [False, True])
def test_read_only_folder_is_read_and_not_written(open_folder: Path, in_use: bool) -> None:
    """By another user; at rest, and while somebody who may write has it open. In both cases what
    is published afterwards is seen."""
    folder = open_folder / "concepts"
    owner = ConceptStore(folder)
    owner.import_concept(make_concept("<c>"))
    if not in_use:
        owner.close()
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_READ_ONLY), str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "1.0\n"
        for _ in range(3):
            # The file comes first, and it is the folder that refuses it; else it is the index.
            line = process.stdout.readline()
            assert line.startswith("StoreError the concept store cannot be used now: ")
            assert "Permission denied" in line or "write a readonly database" in line
        assert process.stdout.readline() == "waiting\n"
        if not in_use:
            owner = ConceptStore(folder)
        owner.import_concept(make_concept("<c>", 2.0), overwrite=True)
        owner.close()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "2.0 2\n"


@pytest.mark.parametrize(
    "make", [Path.symlink_to, Path.hardlink_to], ids=["symbolic link", "hard link"]
)
@pytest.mark.parametrize("name", [INDEX, f"{INDEX}-wal"])
def test_index_that_is_a_link_is_refused_and_what_it_leads_to_is_untouched(
    tmp_path: Path, name: str, make: Callable[[Path, Path], None]
) -> None:
    folder, outside = tmp_path / "concepts", tmp_path / "outside"
    ConceptStore(folder).close()
    if name == INDEX:
        shutil.move(folder / INDEX, outside)
    else:
        outside.write_bytes(b"precious")
    before = outside.read_bytes()
    make(folder / name, outside)
    with pytest.raises(ConfigError, match="is a link or not a file at all; the index"):
        ConceptStore(folder)
    assert outside.read_bytes() == before


def test_folder_of_files_that_is_a_link_is_refused(tmp_path: Path) -> None:
    folder, outside = tmp_path / "concepts", tmp_path / "outside"
    store = ConceptStore(folder)
    store.import_concept(make_concept("<c>"))
    shutil.move(folder / FILES, outside)
    before = sorted(outside.iterdir())
    (folder / FILES).symlink_to(outside)
    with pytest.raises(ConfigError, match="is a link; the files of a concept store must be in"):
        store.import_concept(make_concept("<d>"))
    store.close()
    with pytest.raises(ConfigError, match="is a link"):
        ConceptStore(folder)
    assert sorted(outside.iterdir()) == before


def test_link_beside_the_files_is_collected_and_what_it_leads_to_is_not(tmp_path: Path) -> None:
    store = ConceptStore(tmp_path / "concepts")
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    link = tmp_path / "concepts" / FILES / f"{'0' * 64}.safetensors"
    link.symlink_to(outside)
    os.utime(link, (0, 0), follow_symlinks=False)
    assert store.collect() == Collected(num_versions=0, num_files=1)
    assert outside.read_bytes() == b"precious"
    store.close()


def test_clock_set_back_keeps_more_and_never_less(tmp_path: Path) -> None:
    now = 2e9
    store = ConceptStore(StoreConfig(folder=tmp_path, cache_bytes=0), clock=lambda: now)
    store.import_concept(make_concept("<c>", 1.0))
    store.delete("<c>")
    now -= 10 * DAY_S
    store.import_concept(make_concept("<c>", 2.0))
    assert store.collect() == Collected(num_versions=0, num_files=0)
    assert value_of(store, f"<c>@sha256:{make_concept(value=1.0).concept_id}") == 1.0
    assert value_of(store, "<c>") == 2.0
    store.close()


def test_closed_store_says_so(tmp_path: Path) -> None:
    store = ConceptStore(tmp_path)
    store.close()
    for action in (lambda: store.list(limit=1), lambda: store.import_concept(make_concept())):
        with pytest.raises(StoreError, match="is closed; open it again"):
            action()
