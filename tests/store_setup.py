"""Concept stores for tests: the three kinds of places, and a clock that is moved by hand."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.concepts import Concept
from engine.errors import UnknownConcept
from engine.store.concept_store import ConceptStore, StoreConfig

ROOT = Path(__file__).resolve().parent.parent
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
OpenStore = Callable[..., ConceptStore]


def make_concept(token: str = "<cat-toy>", value: float = 1.0, **fields: Any) -> Concept:
    return Concept(
        placeholder_token=token, learned_embeddings=np.full((2, 4), value, np.float32), **fields
    )


def value_of(store: ConceptStore, reference: str, **tenant: str) -> float:
    """What the vectors that a reference finds were made of."""
    return float(store.find_by_token(reference, **tenant).learned_embeddings[0, 0])


class Clock:
    """Moved by hand; begins far enough ahead of the files' own times for them to be older."""

    def __init__(self, now: float = 4e9) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(params=["sqlite", "fsspec", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Where a store is, as settings of `StoreConfig`: of each kind in turn."""
    with ExitStack() as stack:
        yield _place(request, tmp_path, stack)


def _place(request: pytest.FixtureRequest, folder: Path, stack: ExitStack) -> dict[str, Any]:
    match request.param:
        case "postgres":
            url = stack.enter_context(request.getfixturevalue("postgres").schema())
            return {"index": url, "files": str(folder / "files")}
        case "fsspec":
            fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
            url = f"memory://{folder.name}"
            stack.callback(fsspec.filesystem("memory").rm, f"/{folder.name}", recursive=True)
            return {"folder": folder / "index", "files": url}
        case _:
            return {"folder": folder / "concepts"}


@pytest.fixture
def open_store(place: dict[str, Any]) -> Iterator[OpenStore]:
    """Open a store on the place, as another process would; all are closed at the end."""
    opened: list[ConceptStore] = []

    def open_(clock: Callable[[], float] | None = None, **settings: Any) -> ConceptStore:
        config = StoreConfig(**{**place, **settings})
        store = ConceptStore(config, clock=clock) if clock else ConceptStore(config)
        opened.append(store)
        return store

    yield open_
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: OpenStore) -> ConceptStore:
    return open_store()


def publish(store: ConceptStore, *values: float, token: str = "<c>", **tenant: str) -> None:
    for value in values:
        store.import_concept(make_concept(token, value), overwrite=True, **tenant)


def assert_unknown(store: ConceptStore, *references: str, **tenant: str) -> None:
    for reference in references:
        with pytest.raises(UnknownConcept, match=re.escape(repr(reference))):
            store.get(reference, **tenant)


def in_process(code: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """Run a program beside the tests, on one core and with the tests' own modules."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
