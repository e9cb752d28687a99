"""Any sequence of calls: the store against a model of it in plain dictionaries."""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.errors import ConceptExists, StaleEtag, UnknownConcept
from engine.store.concept_store import ConceptStore, StoreConfig
from tests.postgres_server import PostgresServer
from tests.store_setup import DAY_S, Clock, make_concept

KEPT_VERSIONS = 2
# Mostly one name of one tenant, so that much happens to it.
TENANTS = st.sampled_from(["one", "one", "one", "two"])
NAMES = st.sampled_from(["<a>", "<a>", "<a>", "<b>"])
VALUES = st.sampled_from([0.0, 1.0, 2.0])
ALIASES = st.sampled_from(["stable", "x"])
VERSIONS = st.integers(1, 6)
IDS = {value: make_concept("<any>", value).concept_id for value in (0.0, 1.0, 2.0)}


@dataclass
class Name:
    """What the model knows of a name."""

    values: dict[int, float] = field(default_factory=dict[int, float])  # of what is not collected
    retired: dict[int, float] = field(default_factory=dict[int, float])  # when
    aliases: dict[str, int] = field(default_factory=dict[str, int])
    deleted: tuple[list[int], dict[str, int]] | None = None  # versions and aliases of before
    latest: int | None = None
    last: int = 0

    def live(self) -> list[int]:
        return sorted(set(self.values) - set(self.retired), reverse=True)

    def publish(self, value: float) -> None:
        self.last += 1
        self.latest, self.deleted = self.last, None
        self.values[self.last] = value

    def retire(self, versions: list[int], now: float) -> None:
        self.retired.update({version: now for version in versions})

    def retire_surplus(self, now: float) -> None:
        kept = {*self.live()[:KEPT_VERSIONS], *self.aliases.values()}
        self.retire([version for version in self.live() if version not in kept], now)


class StoreMachine(RuleBasedStateMachine):
    """Two stores on one place, as two servers, take turns; a subclass says where."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.stack = ExitStack()
        where = self.place(self.stack)
        config = StoreConfig(**where, kept_versions=KEPT_VERSIONS, cache_bytes=300)
        self.stores = [ConceptStore(config, clock=self.clock) for _ in range(2)]
        self.names: dict[tuple[str, str], Name] = {}
        self.etags: dict[tuple[str, str], str] = {}

    def place(self, stack: ExitStack) -> dict[str, Any]:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="oneword-machine-"))
        return {"folder": Path(folder)}

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        self.stack.close()

    @property
    def store(self) -> ConceptStore:
        self.stores.reverse()
        return self.stores[0]

    def name(self, tenant: str, token: str) -> Name | None:
        """A name that is not deleted."""
        name = self.names.get((tenant, token))
        return name if name and name.latest is not None else None

    @rule(tenant=TENANTS, token=NAMES, value=VALUES, overwrite=st.booleans())
    def publish(self, tenant: str, token: str, value: float, overwrite: bool) -> None:
        name = self.name(tenant, token)
        old = name.values[name.latest] if name and name.latest else None
        concept = make_concept(token, value)
        if old is not None and old != value and not overwrite:
            with pytest.raises(ConceptExists):
                self.store.import_concept(concept, tenant=tenant)
            return
        stored, changed = self.store.import_concept(concept, overwrite=overwrite, tenant=tenant)
        assert changed == (old != value)
        if old != value:
            name = self.names.setdefault((tenant, token), Name())
            name.publish(value)
            name.retire_surplus(self.clock.now)
        assert name and stored.version == name.latest

    @rule(tenant=TENANTS, token=NAMES)
    def replace(self, tenant: str, token: str) -> None:
        """Publish other vectors than there are: most versions come about here."""
        name = self.name(tenant, token)
        old = name.values[name.latest] if name and name.latest else 0.0
        self.publish(tenant, token, (old + 1.0) % 3.0, overwrite=True)

    @rule(tenant=TENANTS, token=NAMES, alias=ALIASES, version=st.none() | VERSIONS)
    def set_alias(self, tenant: str, token: str, alias: str, version: int | None) -> None:
        name = self.name(tenant, token)
        number = version or (name.latest if name else None)
        if name is None or number not in name.live():
            with pytest.raises(UnknownConcept):
                self.store.set_alias(token, alias, version=version, tenant=tenant)
            return
        assert number is not None
        stored = self.store.set_alias(token, alias, version=version, tenant=tenant)
        assert stored.version == number
        name.aliases[alias] = number
        name.retire_surplus(self.clock.now)

    @rule(tenant=TENANTS, token=NAMES, alias=ALIASES)
    def delete_alias(self, tenant: str, token: str, alias: str) -> None:
        name = self.name(tenant, token)
        if name is None or alias not in name.aliases:
            with pytest.raises(UnknownConcept):
                self.store.delete_alias(token, alias, tenant=tenant)
            return
        self.store.delete_alias(token, alias, tenant=tenant)
        del name.aliases[alias]
        name.retire_surplus(self.clock.now)

    @rule(tenant=TENANTS, token=NAMES)
    def delete(self, tenant: str, token: str) -> None:
        name = self.name(tenant, token)
        if name is None:
            with pytest.raises(UnknownConcept):
                self.store.delete(token, tenant=tenant)
            return
        self.store.delete(token, tenant=tenant)
        name.deleted = name.live(), name.aliases
        name.retire(name.live(), self.clock.now)
        name.latest, name.aliases = None, {}

    @rule(tenant=TENANTS, token=NAMES)
    def undelete(self, tenant: str, token: str) -> None:
        name = self.names.get((tenant, token))
        if name is None or name.deleted is None:
            with pytest.raises(UnknownConcept if name is None else ConceptExists):
                self.store.undelete(token, tenant=tenant)
            return
        versions, name.aliases = name.deleted
        assert self.store.undelete(token, tenant=tenant).version == versions[0]
        name.latest, name.deleted = versions[0], None
        for version in versions:
            del name.retired[version]

    @precondition(lambda self: self.etags)
    @rule(token=NAMES, tenant=TENANTS, value=VALUES)
    def publish_with_the_etag_seen_last(self, token: str, tenant: str, value: float) -> None:
        etag = self.etags.get((tenant, token))
        if etag is None:
            return
        now = self.store.list(limit=1, after=token[:-2], tenant=tenant)
        concept = make_concept(token, value)
        old = self.name(tenant, token)
        unchanged = old and old.latest and old.values[old.latest] == value
        if unchanged or (now and now[0].placeholder_token == token and now[0].etag == etag):
            self.store.import_concept(concept, overwrite=True, etag=etag, tenant=tenant)
            name = self.names[(tenant, token)]
            assert name.latest
            if name.values[name.latest] != value:
                name.publish(value)
                name.retire_surplus(self.clock.now)
        else:
            with pytest.raises(StaleEtag):
                self.store.import_concept(concept, overwrite=True, etag=etag, tenant=tenant)

    @rule(tenant=TENANTS, token=NAMES)
    def look_at_the_etag(self, tenant: str, token: str) -> None:
        if self.name(tenant, token):
            self.etags[(tenant, token)] = self.store.get(token, tenant=tenant).etag

    @rule(hours=st.sampled_from([1.0, 13.0, 24.0]))
    def wait(self, hours: float) -> None:
        self.clock.advance(3600.0 * hours)

    @rule()
    def collect(self) -> None:
        before = self.clock.now - DAY_S
        expected = 0
        for key, name in list(self.names.items()):
            for version in [v for v, time in name.retired.items() if time <= before]:
                expected += 1
                del name.values[version], name.retired[version]
            if not name.values:
                del self.names[key]
        assert self.store.collect().num_versions == expected

    @rule(tenant=TENANTS, token=NAMES, version=VERSIONS, alias=ALIASES, value=VALUES)
    def resolve(self, tenant: str, token: str, version: int, alias: str, value: float) -> None:
        name = self.name(tenant, token)
        versions = name.live() if name else []
        self.check(tenant, f"{token}@{version}", version if version in versions else None)
        self.check(tenant, f"{token}@{alias}", name.aliases.get(alias) if name else None)
        every = self.names.get((tenant, token), Name())
        having = [number for number, of in every.values.items() if of == value]
        found = max(having, key=lambda number: (number not in every.retired, number), default=None)
        self.check(tenant, f"{token}@sha256:{IDS[value][:16]}", found)

    @invariant()
    def all_that_should_be_there_is_there(self) -> None:
        for tenant in ("one", "two"):
            tokens = [t for (of, t) in sorted(self.names) if of == tenant and self.name(of, t)]
            listed = self.store.list(limit=9, tenant=tenant)
            assert [stored.placeholder_token for stored in listed] == tokens
            for stored in listed:
                name = self.names[(tenant, stored.placeholder_token)]
                assert stored.version == name.latest
                versions = self.store.versions(stored.placeholder_token, tenant=tenant)
                assert [version.version for version in versions] == name.live()
                self.check(tenant, stored.placeholder_token, name.latest)

    def check(self, tenant: str, reference: str, version: int | None) -> None:
        """That a reference finds this version, with its vectors, or nothing."""
        store = self.store
        if version is None:
            with pytest.raises(UnknownConcept):
                store.load("placeholder_token", reference, tenant=tenant)
            return
        stored, concept = store.load("placeholder_token", reference, tenant=tenant)
        value = self.names[(tenant, stored.placeholder_token)].values[version]
        assert (stored.version, concept.concept_id) == (version, IDS[value])


def _settings(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        stateful_step_count=50,
        deadline=None,
        database=None,
        derandomize=True,
        # A failure is told as it was found: making it smaller takes minutes of writing to disk.
        phases=(Phase.generate,),
        suppress_health_check=[HealthCheck.too_slow],
    )


def test_store_in_a_folder_does_what_its_model_does() -> None:
    run_state_machine_as_test(StoreMachine, settings=_settings(12))


def test_store_in_postgresql_does_what_its_model_does(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    class PostgresMachine(StoreMachine):
        def place(self, stack: ExitStack) -> dict[str, Any]:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=tmp_path))
            return {"index": stack.enter_context(postgres.schema()), "files": folder}

    run_state_machine_as_test(PostgresMachine, settings=_settings(3))
