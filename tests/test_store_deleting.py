"""What every concept store does when concepts are deleted, brought back and collected."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from engine.errors import (
    ConceptExists,
    TenantFull,
    UnknownConcept,
)
from engine.store.concept_store import Collected
from tests import store_setup
from tests.store_setup import (
    DAY_S,
    HOUR_S,
    Clock,
    OpenStore,
    assert_unknown,
    make_concept,
    publish,
    value_of,
)

# Fixtures.
place, open_store, store = store_setup.place, store_setup.open_store, store_setup.store


def test_deleted_concept_is_had_by_its_digest_until_collected(open_store: OpenStore) -> None:
    clock = Clock()
    store = open_store(clock, cache_bytes=0)
    publish(store, 1.0, 2.0)
    store.set_alias("<c>", "stable", version=1)
    ids = [make_concept(value=value).concept_id for value in (1.0, 2.0)]
    store.delete("<c>")
    assert store.list(limit=9) == []
    assert_unknown(store, "<c>", "<c>@1", "<c>@2", "<c>@latest", "<c>@stable")
    clock.advance(DAY_S - 1.0)
    assert store.collect() == Collected(num_versions=0, num_files=0)
    for value, concept_id in zip((1.0, 2.0), ids, strict=True):
        assert value_of(store, f"<c>@sha256:{concept_id}") == value
        assert store.find_by_id(concept_id).learned_embeddings[0, 0] == value
    clock.advance(1.0)
    assert store.collect() == Collected(num_versions=2, num_files=2)
    for concept_id in ids:
        assert_unknown(store, f"<c>@sha256:{concept_id}")
        with pytest.raises(UnknownConcept):
            store.find_by_id(concept_id)
    with pytest.raises(UnknownConcept):
        store.delete("<c>")


def test_undeleted_concept_is_what_it_was(open_store: OpenStore) -> None:
    clock = Clock()
    store = open_store(clock, kept_versions=2)
    publish(store, 1.0, 2.0, 3.0)  # the first is retired
    store.set_alias("<c>", "stable", version=2)
    clock.advance(-HOUR_S)  # another server's clock, which lags behind
    etag = store.get("<c>").etag
    store.delete("<c>")
    clock.advance(2 * HOUR_S)
    store = open_store(clock, kept_versions=2)
    back = store.undelete("<c>")
    assert (back.version, back.retired_time) == (3, None)
    assert back.etag != etag
    assert [stored.version for stored in store.versions("<c>")] == [3, 2]
    assert store.aliases("<c>") == {"stable": 2}
    assert [value_of(store, of) for of in ("<c>", "<c>@2", "<c>@stable")] == [3.0, 2.0, 2.0]
    clock.advance(2 * DAY_S)
    assert store.collect().num_versions == 1
    publish(store, 4.0)
    assert store.get("<c>").version == 4


def test_undeleting_what_is_not_deleted_is_refused(open_store: OpenStore) -> None:
    clock = Clock()
    store = open_store(clock, max_concepts_per_tenant=1)
    publish(store, 1.0)
    store.set_alias("<c>", "stable")
    with pytest.raises(ConceptExists, match="'<c>' is not deleted"):
        store.undelete("<c>")
    for name in ("<d>", "<c>@1", "a\0b"):
        with pytest.raises(UnknownConcept):
            store.undelete(name)
    store.delete("<c>")
    with pytest.raises(UnknownConcept):
        store.undelete("<c>", tenant="other")
    publish(store, 2.0, token="<d>")
    with pytest.raises(TenantFull, match="1 concepts are stored"):
        store.undelete("<c>")
    store.delete("<d>")
    publish(store, 3.0)  # in place of what was deleted
    with pytest.raises(ConceptExists):
        store.undelete("<c>")
    assert store.aliases("<c>") == {}
    store.delete("<c>")
    clock.advance(DAY_S)
    store.collect()
    with pytest.raises(UnknownConcept):
        store.undelete("<c>")


def test_aliases_do_not_outlive_a_collected_name(open_store: OpenStore) -> None:
    clock = Clock()
    store = open_store(clock)
    publish(store, 1.0)
    store.set_alias("<c>", "stable")
    store.delete("<c>")
    clock.advance(DAY_S)
    store.collect()
    publish(store, 2.0)
    assert_unknown(store, "<c>@stable")
    assert store.aliases_of([store.get("<c>")]) == [()]


def test_versions_are_numbered_on_while_an_old_one_can_be_had(open_store: OpenStore) -> None:
    clock = Clock()
    store = open_store(clock)
    publish(store, 1.0, 2.0)
    store.delete("<c>")
    publish(store, 3.0)
    assert store.get("<c>").version == 3
    assert_unknown(store, "<c>@1", "<c>@2")
    store.delete("<c>")
    clock.advance(DAY_S)
    store.collect()
    publish(store, 4.0)
    assert store.get("<c>").version == 1


def test_file_stays_as_long_as_any_tenant_or_version_needs_it(open_store: OpenStore) -> None:
    clock = Clock()
    store = open_store(clock, cache_bytes=0)
    publish(store, 1.0, tenant="one")
    publish(store, 1.0, tenant="two")
    publish(store, 1.0, 2.0, 1.0, tenant="three")
    for tenant, left in (("one", 0), ("two", 0), ("three", 2)):
        store.delete("<c>", tenant=tenant)
        clock.advance(DAY_S)
        assert store.collect().num_files == left


def test_collecting_spares_what_is_young_and_what_lives(open_store: OpenStore) -> None:
    """By the real clock, which is also that of the files."""
    store = open_store()
    publish(store, 1.0, 2.0)
    store.delete("<c>")
    publish(store, 3.0, token="<d>")
    assert store.collect(time.time() + 23 * HOUR_S) == Collected(num_versions=0, num_files=0)
    assert store.collect(time.time() - 1e6 * DAY_S) == Collected(num_versions=0, num_files=0)
    assert store.collect(time.time() + 25 * HOUR_S) == Collected(num_versions=2, num_files=2)
    assert store.collect(4e9) == Collected(num_versions=0, num_files=0)
    assert value_of(store, "<d>") == 3.0


def test_opening_collects(open_store: OpenStore) -> None:
    clock = Clock()
    store = open_store(clock)
    publish(store, 1.0)
    store.delete("<c>")
    clock.advance(DAY_S)
    open_store(clock)
    assert store.collect() == Collected(num_versions=0, num_files=0)
    assert_unknown(store, f"<c>@sha256:{make_concept(value=1.0).concept_id}")


def test_publishing_and_collecting_at_once_lose_nothing(open_store: OpenStore) -> None:
    """Without a grace, each file is at the collector's mercy as soon as no row needs it."""
    clock = Clock()
    settings: dict[str, Any] = {"grace_s": 0.0, "kept_versions": 1, "cache_bytes": 0}
    stores = [open_store(clock, **settings) for _ in range(2)]
    done = threading.Event()

    def collect() -> int:
        collected = 0
        while not done.is_set():
            collected += stores[1].collect().num_files
        return collected

    with ThreadPoolExecutor(1) as pool:
        collector = pool.submit(collect)
        try:
            for turn in range(20):
                publish(stores[0], float(turn % 3))
                assert value_of(stores[0], "<c>") == turn % 3
        finally:
            done.set()
    collected = collector.result() + stores[0].collect().num_files
    assert collected >= 2
