"""Servers that do not learn, and say what they lack."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2

from engine.client import Client, ServerError
from engine.errors import ConfigError
from engine.serving.server import Server
from engine.serving.server_config import ServerConfig
from engine.store.concept_store import ConceptStore
from engine.training.config import TrainingConfig
from tests.fakes import DIM, FakeDenoiser, make_pipeline
from tests.training_harness import (
    IMAGES,
    Start,
    refusal,
    save_embeddings,
)


async def start_plain(**training: Any) -> Server:
    config = ServerConfig(
        bundle=Path("none"), listen="127.0.0.1:0", training=TrainingConfig(**training)
    )
    return Server(make_pipeline(FakeDenoiser()), ConceptStore.temporary(), config)


async def test_a_server_without_a_model_says_how_to_have_one() -> None:
    server = await start_plain()
    with Client(await server.start()) as client:
        for call in (
            lambda: client.training.create("<a>", IMAGES),
            lambda: list(client.training.watch("0")),
            lambda: client.training.get("0"),
            lambda: client.training.cancel("0"),
            lambda: list(client.training.list()),
            lambda: client.training.delete("0"),
        ):
            with pytest.raises(ServerError, match="--training-model DIFFUSERS_DIR") as caught:
                await asyncio.to_thread(call)
            assert caught.value.code == StatusCode.FAILED_PRECONDITION
    await server.stop()


async def test_another_model_than_the_bundles_is_refused_in_words(
    model: Path, tmp_path: Path, start: Start
) -> None:
    other = save_embeddings(tmp_path / "other", np.zeros((10, DIM), np.float32))
    (model / "text_encoder").rename(tmp_path / "moved")
    (other / "text_encoder").rename(model / "text_encoder")
    served = await start()
    error = await refusal(served.create())
    assert error.code() == StatusCode.FAILED_PRECONDITION
    assert "so its words would not fit" in (error.details() or "")
    assert await served.health() == health_pb2.HealthCheckResponse.NOT_SERVING
    assert served.leftovers() == []


@pytest.mark.parametrize("missing", ["model_index.json", "text_encoder"])
async def test_a_folder_that_is_no_model_is_refused(
    model: Path, tmp_path: Path, start: Start, missing: str
) -> None:
    (model / missing).rename(tmp_path / "moved")
    served = await start()
    error = await refusal(served.create())
    assert error.code() == StatusCode.FAILED_PRECONDITION
    assert str(tmp_path) not in (error.details() or "")


def test_a_server_that_learns_must_keep_what_it_learned(tmp_path: Path) -> None:
    training = TrainingConfig(training_model=tmp_path)
    with pytest.raises(ConfigError, match="give it a concept_dir"):
        ServerConfig(bundle=tmp_path, training=training)
    config = ServerConfig(bundle=tmp_path, training=training, concept_dir=tmp_path / "words")
    assert config.training_dir == tmp_path / "words-training"


@pytest.mark.parametrize("name", ["max_training_jobs", "max_queued_trainings", "max_attempts"])
def test_settings_out_of_range_are_refused_by_name(name: str) -> None:
    settings: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=name):
        TrainingConfig(**settings)
