"""A server that learns by scripted processes, for the tests of this folder."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes import FakeDenoiser, make_pipeline
from tests.training_harness import (
    SCRIPTED,
    SMALL,
    LearningServer,
    Start,
    save_embeddings,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    table = make_pipeline(FakeDenoiser()).bundle.token_embedding
    return save_embeddings(tmp_path / "model", np.asarray(table))


@pytest.fixture
async def start(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Start]:
    monkeypatch.setattr(
        "engine.serving.server.worker_command", lambda *_words, **_settings: SCRIPTED
    )
    started: list[LearningServer] = []

    async def start(**settings: Any) -> LearningServer:
        settings = {"limits": SMALL, **settings}
        folder = tmp_path / "trainings"
        server = await LearningServer.start(
            make_pipeline(FakeDenoiser()), model, folder, **settings
        )
        started.append(server)
        return server

    yield start
    for server in started:
        await server.stop()


@pytest.fixture
async def served(start: Start) -> LearningServer:
    return await start()
