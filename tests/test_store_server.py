"""The server and its concept store: where it is opened, and that it is kept tidy."""

import asyncio
from pathlib import Path

import pytest

from engine.errors import StoreError
from engine.serving.serve import open_store
from engine.serving.server_config import ServerConfig
from engine.store.concept_store import Collected, ConceptStore
from tests import service_harness
from tests.postgres_server import PostgresServer
from tests.service_harness import StartServer
from tests.store_setup import make_concept, value_of

# Fixtures.
start_server = service_harness.start_server


async def test_server_collects_again_and_again_whatever_happens(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, third, calls = asyncio.get_running_loop(), asyncio.Event(), 0

    def collect(self: ConceptStore) -> Collected:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise StoreError("locked")
        if calls == 3:
            loop.call_soon_threadsafe(third.set)
        return Collected(num_versions=1, num_files=1)

    monkeypatch.setattr("engine.serving.server.COLLECT_EVERY_S", 0.0)
    await start_server()
    monkeypatch.setattr(ConceptStore, "collect", collect)
    async with asyncio.timeout(60):
        await third.wait()


def test_servers_that_name_one_index_and_one_place_share_their_concepts(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    with postgres.schema() as url:
        config = ServerConfig(
            bundle=Path("none"), concept_index=url, concept_files=str(tmp_path / "files")
        )
        stores = [open_store(config) for _ in range(2)]
        stores[0].import_concept(make_concept("<c>"))
        assert value_of(stores[1], "<c>") == 1.0
        for store in stores:
            store.close()


def test_server_without_a_place_forgets_its_concepts(tmp_path: Path) -> None:
    store = open_store(ServerConfig(bundle=Path("none")))
    folder = store.folder
    store.close()
    assert folder and not folder.exists()
    kept = open_store(ServerConfig(bundle=Path("none"), concept_dir=tmp_path))
    assert kept.folder == tmp_path
    kept.close()
