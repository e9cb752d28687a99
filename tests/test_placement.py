"""Where a model is put: a device that cannot be used is refused in words, wherever it is named."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from torch import nn

from protos.oneword.v1 import training_pb2
from tests.learning_setup import tiny_model
from tests.training_harness import LearningServer, pipeline_of
from trainer.errors import LearningError
from trainer.model import DiffusionModel, load_model
from trainer.placement import place
from trainer.training_worker import failure_of

UNUSABLE = ("abacus", "cuda:99", "hpu", "meta", "")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("placed")
    tiny_model(path)
    return path


@pytest.fixture
def model(model_path: Path) -> DiffusionModel:
    return load_model(model_path)


def test_all_parts_of_a_model_are_moved(model: DiffusionModel) -> None:
    placed = place(model, torch.device("cpu"))
    assert placed is model
    devices = {weight.device for part in model.modules.values() for weight in part.parameters()}
    assert devices == {torch.device("cpu")}


@pytest.mark.parametrize("device", UNUSABLE)
def test_a_device_that_cannot_be_used_is_refused_in_one_line(
    model: DiffusionModel, device: str
) -> None:
    with pytest.raises(LearningError) as caught:
        place(model, device)
    message = str(caught.value)
    assert message.startswith(f"cannot use the device {device or repr('')}: ")
    assert message.count("cpu") and message.count("\n") == 0
    assert not failure_of(caught.value, Path("model")).retryable  # it would be refused again


class FullDevice(nn.Module):
    """A part for which the device has no room."""

    def to(self, *_: object, **__: object) -> "FullDevice":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


def test_a_device_that_is_full_now_is_worth_another_attempt(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffusionModel, "modules", {"unet": FullDevice()})
    with pytest.raises(LearningError, match="cannot use the device cpu: CUDA out of") as caught:
        place(model, "cpu")
    assert failure_of(caught.value, Path("model")).retryable


@pytest.fixture
async def served(model_path: Path, tmp_path: Path) -> AsyncIterator[LearningServer]:
    pipeline = pipeline_of(load_model(model_path).token_embedding.numpy())
    server = await LearningServer.start(
        pipeline, model_path, tmp_path / "trainings", training_device="cuda:99"
    )
    yield server
    await server.stop()


async def test_a_training_on_a_device_that_is_not_there_fails_at_once_and_says_why(
    served: LearningServer,
) -> None:
    ended = await served.ended((await served.create()).training_id)
    assert ended.state == training_pb2.TRAINING_STATE_FAILED
    assert ended.error.startswith("cannot use the device cuda:99: ")  # not: given up after 3
