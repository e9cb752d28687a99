"""What every concept store does, wherever its index and files are."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import (
    ConceptExists,
    ConfigError,
    InvalidRequest,
    StaleEtag,
    TenantFull,
    UnknownConcept,
)
from engine.store.concept_store import Collected, ConceptStore
from tests import store_setup
from tests.store_setup import (
    DAY_S,
    Clock,
    OpenStore,
    assert_unknown,
    make_concept,
    publish,
    value_of,
)

# Fixtures.
place, open_store, store = store_setup.place, store_setup.open_store, store_setup.store


# --- what is stored comes back ---


def test_concept_comes_back_whole_from_another_store(open_store: OpenStore) -> None:
    concept = make_concept(embedding_fingerprint="f" * 64, metadata={"steps": "500"})
    stored, changed = open_store().import_concept(concept)
    other = open_store()
    for found in (other.find_by_token("<cat-toy>"), other.find_by_id(concept.concept_id)):
        np.testing.assert_array_equal(found.learned_embeddings, concept.learned_embeddings)
        assert (found.embedding_fingerprint, dict(found.metadata)) == ("f" * 64, {"steps": "500"})
    assert changed
    assert other.get("<cat-toy>") == stored
    assert (stored.version, stored.num_vectors, stored.dim) == (1, 2, 4)
    assert stored.concept_id == concept.concept_id


def test_publish_is_seen_by_other_stores_at_their_next_look(open_store: OpenStore) -> None:
    """Two stores on one place stand for two processes: they share nothing in memory."""
    publisher, reader = open_store(), open_store()
    for value in (1.0, 2.0, 3.0):
        publish(publisher, value)
        assert value_of(reader, "<c>") == value
    publisher.set_alias("<c>", "stable", version=1)
    assert value_of(reader, "<c>@stable") == 1.0
    publisher.delete("<c>")
    assert_unknown(reader, "<c>", "<c>@1", "<c>@stable")


def test_names_sort_by_code_points_and_pages_join_without_gap(store: ConceptStore) -> None:
    tokens = [
        "<Zoo>",
        "<a-b>",
        "<ab>",
        "<a_b>",
        "<cat>",
        "<çat>",
        "<Cat>",
        "zoo",
        "ab",
        "<\U0001f600>",
    ]
    for index, token in enumerate(tokens):
        publish(store, float(index), token=token)
    found: list[str] = []
    while page := store.list(limit=3, after=found[-1] if found else ""):
        found += [stored.placeholder_token for stored in page]
    assert found == sorted(tokens)
    assert [s.placeholder_token for s in store.list(limit=1, after="<cat\0>")] == ["<cat>"]
    assert value_of(store, "<cat>") == 4.0


# --- versions and references ---


def test_each_reference_finds_its_version(store: ConceptStore) -> None:
    publish(store, 1.0, 2.0, 3.0)
    store.set_alias("<c>", "stable", version=2)
    digest = make_concept(value=1.0).concept_id
    for reference, value in {
        "<c>": 3.0,
        "<c>@latest": 3.0,
        "<c>@3": 3.0,
        "<c>@1": 1.0,
        "<c>@stable": 2.0,
        f"<c>@sha256:{digest}": 1.0,
        f"<c>@sha256:{digest[:8]}": 1.0,
        f"<c>@sha256:{digest[:20].upper()}": 1.0,
        "default/<c>": 3.0,
        "default/<c>@1": 1.0,
    }.items():
        assert value_of(store, reference) == value, reference
    assert_unknown(store, "<c>@4", "<c>@0", "<c>@01", "<c>@9999999999999999999", "<c>@other")
    assert_unknown(store, "<c>@", "@1", "@", "<c>@1@latest", f"<c>@sha256:{'0' * 64}", "<c>\0")


def test_short_and_ambiguous_digests_are_said_to_be_so(
    store: ConceptStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 1.0)
    with pytest.raises(InvalidRequest, match="7 digits, it needs 8 to 64"):
        store.get("<c>@sha256:0123456")
    # No two vectors whose ids begin alike can be found by trying: the rows are told they do.
    for value, concept_id in ((5.0, "a" * 63 + "b"), (6.0, "a" * 63 + "c"), (7.0, "a" * 63 + "c")):
        with monkeypatch.context() as patch:
            patch.setattr("engine.concepts.Concept.concept_id", concept_id)
            publish(store, value)
    with pytest.raises(InvalidRequest, match="several versions of '<c>' begin with sha256:a{12};"):
        store.get(f"<c>@sha256:{'a' * 12}")
    assert store.get(f"<c>@sha256:{'a' * 63}b").version == 2
    assert store.get(f"<c>@sha256:{'a' * 63}c").version == 4  # the newest of those with the vectors


def test_name_that_reads_like_a_reference_is_a_name_first(store: ConceptStore) -> None:
    publish(store, 1.0, token="cat")
    publish(store, 2.0, token="cat@1")
    publish(store, 3.0, token="default/cat")
    assert [value_of(store, name) for name in ("cat", "cat@1", "default/cat")] == [1.0, 2.0, 3.0]
    assert value_of(store, "cat@latest") == 1.0
    assert value_of(store, "cat@1@latest") == 2.0


def test_other_file_is_a_new_version_and_the_same_one_is_not(store: ConceptStore) -> None:
    first, _ = store.import_concept(make_concept("<c>", 1.0))
    assert store.import_concept(make_concept("<c>", 1.0), overwrite=True) == (first, False)
    with pytest.raises(ConceptExists, match="'<c>' is taken"):
        store.import_concept(make_concept("<c>", 2.0))
    noted, changed = store.import_concept(
        make_concept("<c>", 1.0, metadata={"steps": "2"}), overwrite=True
    )
    assert (noted.version, changed, noted.concept_id) == (2, False, first.concept_id)
    other, changed = store.import_concept(make_concept("<c>", 2.0), overwrite=True)
    back, again = store.import_concept(make_concept("<c>", 1.0), overwrite=True)
    assert (other.version, changed, back.version, again) == (3, True, 4, True)
    assert [stored.version for stored in store.versions("<c>")] == [4, 3, 2, 1]
    assert len({stored.etag for stored in (first, noted, other, back)}) == 4


def test_only_the_newest_versions_and_those_with_an_alias_are_kept(open_store: OpenStore) -> None:
    clock = Clock()
    store = open_store(clock, kept_versions=2)
    publish(store, 1.0)
    store.set_alias("<c>", "first")
    publish(store, 2.0, 3.0, 4.0)
    assert [stored.version for stored in store.versions("<c>")] == [4, 3, 1]
    assert_unknown(store, "<c>@2")
    retired = make_concept(value=2.0).concept_id
    assert value_of(store, f"<c>@sha256:{retired}") == 2.0
    store.set_alias("<c>", "first", version=3)
    assert [stored.version for stored in store.versions("<c>")] == [4, 3]
    clock.advance(DAY_S)
    assert store.collect() == Collected(num_versions=2, num_files=2)
    assert_unknown(store, f"<c>@sha256:{retired}", "<c>@1")
    assert value_of(store, "<c>@first") == 3.0


# --- aliases and etags ---


def test_alias_moves_and_goes(store: ConceptStore) -> None:
    publish(store, 1.0, 2.0)
    assert store.set_alias("<c>", "stable", version=1).version == 1
    publish(store, 3.0)
    assert value_of(store, "<c>@stable") == 1.0
    assert store.set_alias("<c>", "stable").version == 3
    store.set_alias("<c>", "canary", version=2)
    assert store.aliases("<c>") == {"canary": 2, "stable": 3}
    store.delete_alias("<c>", "stable")
    assert_unknown(store, "<c>@stable")
    assert value_of(store, "<c>@canary") == 2.0


@pytest.mark.parametrize("alias", ["latest", "3", "", "Stable", "sha256:00", "a b", "a" * 64, "-a"])
def test_alias_that_could_be_something_else_is_refused(store: ConceptStore, alias: str) -> None:
    publish(store, 1.0)
    with pytest.raises(InvalidRequest, match="cannot be an alias"):
        store.set_alias("<c>", alias)


def test_versions_come_in_pages_with_their_aliases(store: ConceptStore) -> None:
    publish(store, 1.0, 2.0, 3.0, 4.0)
    publish(store, 1.0, token="<d>")
    publish(store, 5.0, tenant="other")
    for alias, version in (("stable", 2), ("canary", 3), ("old", 2)):
        store.set_alias("<c>", alias, version=version)
    store.set_alias("<d>", "stable")
    store.set_alias("<c>", "stable", tenant="other")
    first = store.versions("<c>", limit=2)
    second = store.versions("<c>", below=first[-1].version, limit=9)
    assert [stored.version for stored in (*first, *second)] == [4, 3, 2, 1]
    assert store.versions("<c>", below=1) == ()
    pages = [*first, *second, store.get("<d>")]
    assert store.aliases_of(pages) == [(), ("canary",), ("old", "stable"), (), ("stable",)]
    assert store.aliases_of([]) == []
    loaded = store.find_by_token("<c>@stable")
    assert (loaded.version, store.find_by_token("<c>").version) == (2, 4)


def test_alias_of_what_is_not_there_is_unknown(store: ConceptStore) -> None:
    publish(store, 1.0)
    for name, version in (("<d>", None), ("<c>", 2), ("<c>", -1), ("<c>", 1 << 70)):
        with pytest.raises(UnknownConcept):
            store.set_alias(name, "stable", version=version)
    for name, alias in (("<d>", "stable"), ("<c>", "stable")):
        with pytest.raises(UnknownConcept):
            store.delete_alias(name, alias)
    for ask in (store.aliases, store.versions):
        with pytest.raises(UnknownConcept):
            ask("<d>")


def test_etag_changes_with_each_change_of_its_name_alone(store: ConceptStore) -> None:
    publish(store, 1.0, token="<other>")
    publish(store, 1.0)
    etags, other = [store.get("<c>").etag], store.get("<other>").etag
    for change in (
        lambda: publish(store, 2.0),
        lambda: store.set_alias("<c>", "stable", version=1),
        lambda: store.set_alias("<c>", "stable", version=2),
        lambda: store.delete_alias("<c>", "stable"),
        lambda: store.delete("<c>"),
        lambda: publish(store, 2.0),
    ):
        change()
        if found := store.list(limit=1, after="<b>"):
            etags.append(found[0].etag)
    assert len(etags) == 7 and len(set(etags[:5] + etags[6:])) == 6
    assert store.get("<other>").etag == other
    # Nothing changed: neither does the etag.
    store.set_alias("<c>", "stable")
    etag = store.get("<c>").etag
    store.set_alias("<c>", "stable")
    publish(store, 2.0)
    assert store.get("<c>").etag == etag


def test_stale_etag_is_refused_and_changes_nothing(store: ConceptStore) -> None:
    publish(store, 1.0)
    old = store.get("<c>").etag
    store.set_alias("<c>", "stable")
    before = store.get("<c>")
    for change in (
        lambda: store.import_concept(make_concept("<c>", 2.0), overwrite=True, etag=old),
        lambda: store.delete("<c>", etag=old),
        lambda: store.set_alias("<c>", "canary", etag=old),
        lambda: store.delete_alias("<c>", "stable", etag=old),
    ):
        with pytest.raises(StaleEtag, match="'<c>' has changed since its etag was read"):
            change()
    assert store.get("<c>") == before
    assert store.aliases("<c>") == {"stable": 1}
    new, _ = store.import_concept(make_concept("<c>", 2.0), overwrite=True, etag=before.etag)
    store.delete("<c>", etag=new.etag)
    with pytest.raises(StaleEtag, match="'<c>' was deleted since"):
        store.import_concept(make_concept("<c>", 2.0), overwrite=True, etag=new.etag)


def test_what_is_there_already_needs_no_etag(store: ConceptStore) -> None:
    """A change whose answer was lost is asked for again, with an etag of before it."""
    publish(store, 1.0)
    old = store.get("<c>").etag
    for _ in range(2):
        store.import_concept(make_concept("<c>", 2.0), overwrite=True, etag=old)
    old, number = store.get("<c>").etag, store.get("<c>").version
    for _ in range(2):
        assert store.set_alias("<c>", "stable", version=1, etag=old).version == 1
    assert (number, store.get("<c>").version) == (2, 2)
    old = store.get("<c>").etag
    store.delete_alias("<c>", "stable", etag=old)
    with pytest.raises(UnknownConcept):
        store.delete_alias("<c>", "stable", etag=old)
    with pytest.raises(StaleEtag):
        store.set_alias("<c>", "stable", version=1, etag=old)


def test_one_of_many_that_change_by_the_same_etag_wins(open_store: OpenStore) -> None:
    stores = [open_store(), open_store()]
    publish(stores[0], 0.0)
    etag = stores[0].get("<c>").etag
    start = threading.Barrier(4)

    def overwrite(worker: int) -> bool:
        start.wait()
        concept = make_concept("<c>", float(worker + 1))
        try:
            stores[worker % 2].import_concept(concept, overwrite=True, etag=etag)
        except StaleEtag:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(overwrite, range(4)))
    assert won.count(True) == 1
    assert value_of(stores[0], "<c>") == won.index(True) + 1.0
    assert [stored.version for stored in stores[1].versions("<c>")] == [2, 1]


# --- tenants and their shares ---


def test_tenants_do_not_see_each_other(store: ConceptStore) -> None:
    publish(store, 1.0, tenant="one")
    publish(store, 2.0, tenant="two")
    store.set_alias("<c>", "stable", tenant="two")
    digest = make_concept(value=2.0).concept_id
    assert value_of(store, "<c>", tenant="one") == 1.0
    assert value_of(store, "two/<c>@stable", tenant="two") == 2.0
    for tenant in ("one", "three"):
        with pytest.raises(UnknownConcept):
            store.find_by_id(digest, tenant=tenant)
        # The same words, whether the other tenant has it or nobody.
        texts: set[str] = set()
        for reference in ("two/<c>", "two/<d>", "six/<c>"):
            for selector in ("", "@1", "@stable", "@latest", f"@sha256:{digest[:8]}"):
                with pytest.raises(UnknownConcept) as error:
                    store.get(reference + selector, tenant=tenant)
                texts.add(str(error.value).replace(repr(reference + selector), "it"))
        stored = "<c>" if tenant == "one" else "none"
        assert texts == {f"unknown concept it; stored: {stored}; import it or send it along"}
    for change in (store.delete, store.versions, store.aliases):
        with pytest.raises(UnknownConcept):
            change("<c>", tenant="three")
    assert store.list(limit=9) == []


def test_tenant_has_a_share_of_names(open_store: OpenStore) -> None:
    clock = Clock()
    store = open_store(clock, max_concepts_per_tenant=2)
    for token in ("<a>", "<b>"):
        publish(store, 1.0, token=token)
    with pytest.raises(TenantFull, match="2 concepts are stored, the limit is 2; delete some"):
        store.import_concept(make_concept("<c>"))
    publish(store, 2.0, token="<a>")  # of a name that is there
    publish(store, 1.0, token="<c>", tenant="other")
    store.delete("<b>")
    publish(store, 1.0)
    assert [stored.placeholder_token for stored in store.list(limit=9)] == ["<a>", "<c>"]


def test_tenant_has_a_share_of_bytes_that_deleting_frees_after_the_grace(
    open_store: OpenStore,
) -> None:
    clock = Clock()
    num_bytes = open_store().import_concept(make_concept("<a>"), tenant="other")[0].num_bytes
    store = open_store(clock, max_bytes_per_tenant=2 * num_bytes)
    publish(store, 1.0, 2.0, token="<a>")
    with pytest.raises(TenantFull, match=f"take {2 * num_bytes} bytes.*room is free 24 h later"):
        publish(store, 3.0, token="<a>")
    publish(store, 2.0, token="<a>")  # the same again takes no room
    store.delete("<a>")
    with pytest.raises(TenantFull):
        publish(store, 3.0, token="<a>")
    clock.advance(DAY_S)
    store.collect()
    publish(store, 3.0, token="<a>")
    assert value_of(store, "<a>") == 3.0


def test_name_has_a_share_of_aliases(open_store: OpenStore) -> None:
    store = open_store(max_aliases=2)
    publish(store, 1.0, 2.0)
    for alias in ("a", "b"):
        store.set_alias("<c>", alias, version=1)
    with pytest.raises(TenantFull, match="2 aliases, the limit is 2; delete one, or move one"):
        store.set_alias("<c>", "c")
    assert store.set_alias("<c>", "b", version=2).version == 2


# --- places ---


def test_stores_that_are_made_at_once_are_one_store(open_store: OpenStore) -> None:
    start = threading.Barrier(3)

    def open_and_publish(worker: int) -> None:
        start.wait()
        publish(open_store(), float(worker), token=f"<c{worker}>")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(open_and_publish, range(3)))
    store = open_store()
    for worker, stored in enumerate(store.list(limit=9)):
        assert value_of(store, stored.placeholder_token) == float(worker)
    assert len(store.list(limit=9)) == 3


def test_files_belong_to_one_index(
    open_store: OpenStore, place: dict[str, Any], tmp_path: Path
) -> None:
    """Another index would collect the files of the first."""
    if not place.get("files"):
        pytest.skip("the files of this kind are in the folder of the index")
    publish(open_store(), 1.0)
    with pytest.raises(ConfigError, match="belong to another index; give each index a place"):
        open_store(index="", folder=tmp_path / "second")
    assert value_of(open_store(), "<c>") == 1.0
