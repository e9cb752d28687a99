"""The blocking client."""

import asyncio

import pytest

from engine.client import Client
from engine.client.training import create_requests
from protos.oneword.v1 import training_pb2
from tests.training_harness import (
    IMAGES,
    SUCCEEDED,
    TIMEOUT_S,
    LearningServer,
)


async def test_the_client_has_a_word_learned(served: LearningServer) -> None:
    def learn() -> list[training_pb2.Training]:
        with Client(served.address, timeout_s=TIMEOUT_S) as client:
            created = client.training.create("<cat>", IMAGES, steps=5, request_id="r")
            *_, last = client.training.watch(created.training_id)
            described = client.training.get(created.training_id)
            assert described.concept_file and client.get("<cat>").concept_id
            assert client.training.cancel(created.training_id).state == SUCCEEDED
            listed = list(client.training.list())
            client.training.delete(created.training_id)
            assert list(client.training.list()) == []
            return [last.training, described.training, *listed]

    last, described, listed = await asyncio.to_thread(learn)
    assert last == described == listed and last.state == SUCCEEDED


def test_the_client_cuts_images_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.client.training.CHUNK_BYTES", 4)
    requests = list(create_requests(training_pb2.TrainingSpec(), {"a": b"0123456789"}, {}, {}))
    assert requests[0].HasField("spec")
    assert requests[-1].end.num_images == 1
    chunks = [(r.image.file_name, r.image.offset, r.image.data) for r in requests[1:-1]]
    assert chunks == [("a", 0, b"0123"), ("a", 4, b"4567"), ("a", 8, b"89")]
