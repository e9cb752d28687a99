"""From images to a concept that can be used; specs that are refused; the same request twice."""

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2

from engine.concepts import Concept
from engine.training.folder import TrainingFolder
from engine.training.spec import TrainingLimits
from protos.oneword.v1 import training_pb2
from tests.fakes import DIM
from tests.scripted_worker import STEPS
from tests.test_service import field_of
from tests.training_harness import (
    SUCCEEDED,
    LearningServer,
    Start,
    chunk,
    end,
    list_all,
    png,
    refusal,
    spec,
)


async def test_a_training_becomes_a_concept_that_can_be_used_at_once(
    served: LearningServer,
) -> None:
    assert await served.health() == health_pb2.HealthCheckResponse.SERVING
    created = await served.create("<cat>", options={"steps": 7, "seed": 2**63 - 1})
    assert created.num_images == 2 and len(created.training_id) == 32
    assert created.spec.placeholder_token == "<cat>"
    assert (created.spec.options.steps, created.spec.options.seed) == (7, 2**63 - 1)
    assert not created.spec.options.HasField("batch_size")  # what was not asked for is not told
    responses = await served.watch(created.training_id)
    steps = [r.training.progress.step for r in responses if r.training.HasField("progress")]
    assert steps == sorted(steps) and steps[-1] == STEPS
    ended = responses[-1].training
    assert ended.state == SUCCEEDED and not ended.error
    assert ended.progress.best_evaluation_loss == 1.0 / STEPS
    stored, concept = served.store.load("placeholder_token", "<cat>")
    assert stored.concept_id == ended.concept_id
    np.testing.assert_array_equal(concept.learned_embeddings, np.full((1, DIM), 0.25, np.float32))
    times = [t.ToMicroseconds() for t in (ended.create_time, ended.start_time, ended.end_time)]
    assert times == sorted(times)
    assert abs(times[0] / 1e6 - time.time()) < 60


async def test_what_a_training_needs_no_more_is_removed(served: LearningServer) -> None:
    training_id = (await served.create()).training_id
    await served.ended(training_id)
    while any("images" in path for path in served.leftovers()):
        await asyncio.sleep(0.01)
    assert not any("checkpoint" in path for path in served.leftovers())
    request = training_pb2.GetTrainingRequest(training_id=training_id)
    file = (await served.stub.GetTraining(request)).concept_file
    assert file == (served.folder / "jobs" / training_id / "concept.safetensors").read_bytes()


async def test_images_are_stored_as_sent_and_under_no_name_of_the_caller(
    served: LearningServer, tmp_path: Path
) -> None:
    names = ["../../../evil.png", "/etc/passwd", "a\x00b\n\x1b[2J.txt"]
    images = {name: png(seed, side=16) for seed, name in enumerate(names)}
    created = await served.create(images=images, initializer="hold")
    await served.progressed(created.training_id)
    folder = TrainingFolder(served.folder / "jobs" / created.training_id)
    record = folder.read_record()
    assert [image.file_name for image in record.images] == names
    stored = sorted(path for path in folder.images.iterdir())
    assert [path.read_bytes() for path in stored] == list(images.values())
    assert [path.name for path in stored] == [
        f"{index:04d}-{image.sha256}" for index, image in enumerate(record.images)
    ]
    outside = {path.name for path in tmp_path.rglob("*") if served.folder not in path.parents}
    assert not {"evil.png", "passwd"} & outside


async def test_an_image_in_many_chunks_arrives_whole(served: LearningServer) -> None:
    content = png(3)
    parts = [chunk("x", content[at : at + 100], at) for at in range(0, len(content), 100)]
    created = await served.upload([spec(options={"initializer_token": "hold"}), *parts, end(1)])
    (stored,) = (served.folder / "jobs" / created.training_id / "images").iterdir()
    assert stored.read_bytes() == content


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"token": ""}, "placeholder_token"),
        ({"token": "two words"}, "placeholder_token"),
        ({"token": "x" * 65}, "placeholder_token"),
        ({"options": {"steps": 0}}, "options.steps"),
        ({"options": {"steps": 10_001}}, "options.steps"),
        ({"options": {"batch_size": 0}}, "options.batch_size"),
        ({"options": {"batch_size": 65}}, "options.batch_size"),
        ({"options": {"learning_rate": 0.0}}, "options.learning_rate"),
        ({"options": {"learning_rate": float("nan")}}, "options.learning_rate"),
        ({"options": {"learning_rate": 1.5}}, "options.learning_rate"),
        ({"options": {"num_vectors": 0}}, "options.num_vectors"),
        ({"options": {"num_vectors": 76}}, "options.num_vectors"),
        ({"options": {"seed": 2**63}}, "options.seed"),
        ({"options": {"learnable_property": 9}}, "options.learnable_property"),
        ({"options": {"optimizer": 4}}, "options.optimizer"),
        ({"options": {"stop": -1}}, "options.stop"),
        ({"options": {"eval_every": 0}}, "options.eval_every"),
        ({"options": {"stop_window": 1}}, "options.stop_window"),
        ({"options": {"stop_threshold": 1.0}}, "options.stop_threshold"),
        ({"options": {"stop_threshold": float("nan")}}, "options.stop_threshold"),
        ({"options": {"regularization": -1.0}}, "options.regularization"),
        ({"options": {"progressive": True}}, "options.num_vectors"),
        (
            {"options": {"cross_initialization": True, "optimizer": 3}},
            "options.cross_initialization",
        ),
        (
            {"options": {"progressive": True, "num_vectors": 2, "per_image_tokens": True}},
            "options.progressive",
        ),
        ({"options": {"initializer_candidates": ["a"]}}, "options.initializer_candidates"),
        (
            {"initializer": "auto", "options": {"initializer_candidates": ["a"] * 513}},
            "options.initializer_candidates",
        ),
        (
            {"initializer": "auto", "options": {"initializer_candidates": ["a", " "]}},
            "options.initializer_candidates",
        ),
        (
            {"initializer": "auto", "options": {"initializer_candidates": ["a" * 201]}},
            "options.initializer_candidates",
        ),
        ({"initializer": "x" * 201}, "options.initializer_token"),
        ({"request_id": "x" * 65}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"preview_every_steps": 100_001}, "preview_every_steps"),
    ],
)
async def test_a_bad_spec_is_refused_by_field(
    served: LearningServer, fields: dict[str, Any], field: str
) -> None:
    error = await refusal(served.create(**fields))
    assert error.code() == StatusCode.INVALID_ARGUMENT
    assert field_of(error) == field
    assert served.leftovers() == []


async def test_a_name_that_is_taken_is_refused_before_anything_is_learned(
    served: LearningServer,
) -> None:
    vectors = np.ones((1, DIM), np.float32)
    served.store.import_concept(Concept(placeholder_token="<cat>", learned_embeddings=vectors))
    error = await refusal(served.create("<cat>"))
    assert error.code() == StatusCode.ALREADY_EXISTS
    overwriting = await served.create("<cat>", overwrite=True)
    assert (await served.ended(overwriting.training_id)).state == SUCCEEDED
    assert served.store.get("<cat>").concept_id != read_id(vectors)


def read_id(vectors: np.ndarray) -> str:
    return Concept(placeholder_token="<x>", learned_embeddings=vectors).concept_id


async def test_a_name_that_is_being_learned_is_refused(served: LearningServer) -> None:
    first = await served.create("<cat>", initializer="hold")
    error = await refusal(served.create("<cat>"))
    assert error.code() == StatusCode.ALREADY_EXISTS
    assert first.training_id in (error.details() or "")


# The same request twice


async def test_the_same_request_again_is_the_same_training(served: LearningServer) -> None:
    first = await served.create("<cat>", request_id="once")
    await served.ended(first.training_id)
    again = await served.create("<cat>", request_id="once")  # though the name is taken by now
    assert again.training_id == first.training_id and again.state == SUCCEEDED
    assert len(await list_all(served)) == 1


async def test_the_same_request_many_times_at_once_is_one_training(start: Start) -> None:
    served = await start(limits=TrainingLimits(max_uploads=10))
    made = await asyncio.gather(*(served.create(request_id="once") for _ in range(10)))
    assert len({training.training_id for training in made}) == 1
    assert len(await list_all(served)) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"options": {"steps": 2}},
        {"images": {"a.png": png(1), "b.png": png(3)}},
        {"images": {"a.png": png(1), "c.png": png(2)}},
        {"token": "<dog>"},
    ],
)
async def test_another_request_under_a_used_id_is_refused(
    served: LearningServer, other: dict[str, Any]
) -> None:
    await served.create(request_id="once", initializer="hold")
    error = await refusal(served.create(request_id="once", initializer="hold", **other))
    assert error.code() == StatusCode.INVALID_ARGUMENT
    assert field_of(error) == "request_id"
