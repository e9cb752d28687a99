"""The limits that a server publishes are those that it holds callers to."""

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode
from PIL import Image

from engine.client import Client
from engine.serving.server import Server
from engine.serving.server_config import ServerConfig
from engine.store.concept_store import ConceptStore
from engine.training.spec import TrainingLimits
from protos.oneword.v1 import server_info_pb2
from tests.fakes import FakeDenoiser, make_pipeline
from tests.training_harness import (
    QUEUED,
    RUNNING,
    LearningServer,
    Start,
    chunk,
    end,
    list_all,
    png,
    refusal,
    spec,
)

Published = server_info_pb2.TrainingLimits
TIGHT = TrainingLimits(
    max_images=2,
    max_image_bytes=5_100,
    max_upload_bytes=7_300,
    max_uploads=1,
    max_kept_trainings=1,
    max_steps=30,
    max_batch_size=3,
)


@pytest.fixture
async def tight(start: Start) -> LearningServer:
    return await start(limits=TIGHT, max_queued_trainings=1, max_attempts=2, upload_timeout_s=5.0)


async def published(served: LearningServer) -> Published:
    with Client(served.address) as client:
        return (await asyncio.to_thread(client.server_info)).training


def padded(num_bytes: int, seed: int = 0) -> bytes:
    """A picture of so many bytes."""
    picture = png(seed, side=16)
    assert len(picture) <= num_bytes
    return picture + bytes(num_bytes - len(picture))


def wide(num_pixels: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (1024, -(-num_pixels // 1024))).save(buffer, format="PNG")
    return buffer.getvalue()


def beyond_two(at_most: int, first: int) -> dict[str, bytes]:
    return {"a": padded(first), "b": padded(at_most - first, 1)}


# What is asked for when exactly so much of the limit is used.
AT: dict[str, Callable[[Published, int], dict[str, Any]]] = {
    "max_images": lambda at, more: {
        "images": {str(n): png(n, side=16) for n in range(at.max_images + more)}
    },
    "max_image_bytes": lambda at, more: {"images": {"a": padded(at.max_image_bytes + more)}},
    "max_upload_bytes": lambda at, more: {"images": beyond_two(at.max_upload_bytes + more, 5_000)},
    "max_captions_bytes": lambda at, more: {
        "images": {"a": png(side=16)},
        "captions": {"a": "x" * (at.max_captions_bytes + more)},
    },
    "max_steps": lambda at, more: {"options": {"steps": at.max_steps + more}},
    "max_batch_size": lambda at, more: {"options": {"batch_size": at.max_batch_size + more}},
    "max_num_vectors": lambda at, more: {"options": {"num_vectors": at.max_num_vectors + more}},
}


@pytest.mark.parametrize("name", AT)
async def test_what_is_asked_for_may_reach_a_published_limit_and_not_pass_it(
    start: Start, name: str
) -> None:
    # Captions may have more bytes than the images of the other cases together.
    limits = TrainingLimits() if name == "max_captions_bytes" else TIGHT
    served = await start(limits=limits)
    at = await published(served)
    images = {"images": {"a": png(side=16)}}
    await served.create("<a>", **{**images, **AT[name](at, 0)})
    error = await refusal(served.create("<b>", **{**images, **AT[name](at, 1)}))
    assert error.code() == StatusCode.INVALID_ARGUMENT
    limit = getattr(at, name)
    assert str(limit) in (error.details() or "")


async def test_the_published_number_of_pixels_is_the_limit(start: Start) -> None:
    served = await start(limits=TIGHT)
    at = (await published(served)).max_image_pixels
    assert at % 1024 == 0
    full, more = wide(at), wide(at + 1)
    # By its beginning alone: the rest of the picture is not decoded.
    fits, too_large = (
        [spec(token), chunk("x", picture[: TIGHT.max_image_bytes]), end(1)]
        for token, picture in (("<a>", full), ("<b>", more))
    )
    await served.upload(fits)
    error = await refusal(served.upload(too_large))
    assert f"the limit is {at} pixels" in (error.details() or "")


async def test_published_numbers_of_trainings_are_the_limits(tight: LearningServer) -> None:
    served = tight
    at = await published(served)
    assert (at.max_training_jobs, at.max_queued_trainings, at.max_attempts) == (1, 1, 2)
    assert (at.max_kept_trainings, at.max_uploads, at.upload_timeout_s) == (1, 1, 5.0)
    images = {"a": png(side=16)}
    killed = await served.create("<k>", images, initializer="killed")
    assert (await served.ended(killed.training_id)).error.startswith("given up after 2 attempts")
    made = [await served.create("<a>", images, initializer="hold")]
    await served.progressed(made[0].training_id)
    made.append(await served.create("<b>", images, initializer="hold"))
    assert [(await served.get(t.training_id)).state for t in made] == [RUNNING, QUEUED]
    error = await refusal(served.create("<c>", images))
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    for training in reversed(made):
        await served.cancel(training.training_id)
        await served.ended(training.training_id)
    while len(await list_all(served)) > at.max_kept_trainings:
        await asyncio.sleep(0.01)
    call = served.stub.CreateTraining()
    await call.write(spec("<d>"))
    while not any(path.startswith("incoming") for path in served.leftovers()):
        await asyncio.sleep(0.01)
    error = await refusal(served.create("<e>", images))
    assert f"{at.max_uploads} uploads are under way" in (error.details() or "")
    error = await refusal(call)  # which sends nothing more
    assert f"more than {at.upload_timeout_s:g} s" in (error.details() or "")


async def test_a_server_that_does_not_learn_publishes_no_limits() -> None:
    config = ServerConfig(bundle=Path("none"), listen="127.0.0.1:0")
    server = Server(make_pipeline(FakeDenoiser()), ConceptStore.temporary(), config)
    with Client(await server.start()) as client:
        info = await asyncio.to_thread(client.server_info)
    await server.stop()
    assert info.HasField("limits") and not info.HasField("training")
