"""Options, shape checks and the fixtures that several test files share."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before torch is imported, also by processes that tests start: its threads wait for each other on
# models as small as these, and far longer where other work takes a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shape annotations are checked in tests and free in production.
install_import_hook("engine", "beartype.beartype")

from engine.pipeline import Pipeline  # noqa: E402
from tests.postgres_server import PostgresServer, running_server  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
EMOJI_MODEL = ROOT / "models" / "emoji"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run tests marked slow")
    parser.addoption("--run-gpu", action="store_true", help="run tests marked gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for mark in ("slow", "gpu"):
        if not config.getoption(f"--run-{mark}"):
            for item in items:
                if mark in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"needs --run-{mark}"))


@pytest.fixture(scope="session")
def emoji_bundle_path() -> Path:
    """The embedded model's bundle, built once and again only when its inputs have changed."""
    from trainer.export import build_bundle

    path = ROOT / "build" / "test" / "emoji"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of this run find it built
        build_bundle(str(EMOJI_MODEL), path, precision="fp32")
    return path


@pytest.fixture(scope="session")
def pipeline(emoji_bundle_path: Path) -> Pipeline:
    """The embedded model, loaded once for all tests."""
    return Pipeline.open(emoji_bundle_path)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server of the tests' own, started once; skips where none is installed."""
    with running_server() as server:
        yield server
