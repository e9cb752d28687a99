"""Trainings over a real gRPC server: what is taken, refused, watched, stopped, kept and forgotten.

The learning processes are real ones that keep the contract of the trainer's own without PyTorch
(`tests/scripted_worker.py`); `tests/test_training_worker.py` has the trainer's.
"""

import asyncio
import json
import resource
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2

from engine.client import Client, ServerError
from engine.concepts import Concept, read_concept
from engine.errors import ConfigError
from engine.server import Server, ServerConfig
from engine.store import ConceptStore
from engine.training_client import create_requests
from engine.training_config import TrainingConfig
from engine.training_folder import TrainingFolder, TrainingRecord, TrainingState, UploadedImage
from engine.training_spec import TrainingLimits, TrainingSpec
from engine.training_store import TrainingStore
from protos.oneword.v1 import training_pb2
from protos.oneword.v1.training_pb2 import CreateTrainingRequest, ImageChunk
from tests.fakes import DIM, FakeDenoiser, make_pipeline
from tests.scripted_worker import FLOOD_STEPS, PREVIEW_BYTES, STEPS
from tests.test_service import details, field_of
from tests.training_harness import (
    IMAGES,
    SCRIPTED,
    TIMEOUT_S,
    LearningServer,
    png,
    save_embeddings,
)

QUEUED, RUNNING = training_pb2.TRAINING_STATE_QUEUED, training_pb2.TRAINING_STATE_RUNNING
CANCELLING = training_pb2.TRAINING_STATE_CANCELLING
SUCCEEDED, FAILED = training_pb2.TRAINING_STATE_SUCCEEDED, training_pb2.TRAINING_STATE_FAILED
CANCELLED = training_pb2.TRAINING_STATE_CANCELLED
SMALL = TrainingLimits(max_images=3, max_image_bytes=20_000, max_upload_bytes=30_000, max_uploads=2)

GIVEN_UP = "given up after 3 attempts: "

Start = Callable[..., Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    table = make_pipeline(FakeDenoiser()).bundle.token_embedding
    return save_embeddings(tmp_path / "model", np.asarray(table))


@pytest.fixture
async def start(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Start]:
    monkeypatch.setattr("engine.server.worker_command", lambda *_words, **_settings: SCRIPTED)
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


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def chunk(name: str, data: bytes, offset: int = 0) -> CreateTrainingRequest:
    return CreateTrainingRequest(image=ImageChunk(file_name=name, offset=offset, data=data))


def end(num_images: int) -> CreateTrainingRequest:
    return CreateTrainingRequest(end=training_pb2.UploadEnd(num_images=num_images))


def spec(token: str = "<cat>", **fields: Any) -> CreateTrainingRequest:
    return CreateTrainingRequest(spec=training_pb2.TrainingSpec(placeholder_token=token, **fields))


# From images to a concept


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


# What is refused


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


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "first message must be the spec"),
        ([chunk("a", png())], "first message must be the spec"),
        ([spec(), end(0)], "no image was sent"),
        ([spec(), chunk("a", png()), end(2)], "2 images were announced at the end, 1 have come"),
        ([spec(), chunk("a", png())], "the upload broke off"),
        ([spec(), spec()], "must be a chunk of an image or the end"),
        ([spec(), CreateTrainingRequest()], "must be a chunk of an image or the end"),
        ([spec(), chunk("a", b"")], "without data"),
        ([spec(), chunk("", png())], "file_name must have 1 to 255 characters, got 0"),
        ([spec(), chunk("x" * 256, png())], "file_name must have 1 to 255 characters, got 256"),
        ([spec(), chunk("a", b"not an image"), end(1)], "'a': it is not a PNG, JPEG or WebP file"),
        ([spec(), chunk("a", b"%!PS-Adobe-3.0 EPSF-3.0\n"), end(1)], "it is not a PNG"),
        ([spec(), chunk("a", png()[:20]), end(1)], "its beginning is damaged"),
        ([spec(), chunk("a", png(), 5)], "goes on at offset 5, but 0 bytes"),
        ([spec(), chunk("a", png()), chunk("a", png(), 7)], "goes on at offset 7"),
        ([spec(), chunk("a", png()), chunk("b", png(1)), chunk("a", png())], "two images are call"),
        ([spec(), *(chunk(str(i), png(i, 16)) for i in range(4))], "more than 3 images"),
        ([spec(), chunk("a", bytes(20_001))], "'a' is larger than 20000 bytes"),
        (
            [spec(), chunk("a", png(side=70)), chunk("b", png(side=75))],
            "upload is larger than 30000",
        ),
    ],
)
async def test_a_bad_upload_is_refused_and_leaves_nothing(
    served: LearningServer, requests: list[CreateTrainingRequest], message: str
) -> None:
    error = await refusal(served.upload(requests))
    assert error.code() == StatusCode.INVALID_ARGUMENT
    assert message in (error.details() or "")
    await nothing_is_left(served)


async def nothing_is_left(served: LearningServer) -> None:
    for _ in range(500):
        if not served.leftovers():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(served.leftovers())


async def test_a_picture_of_too_many_pixels_is_refused_undecoded(
    served: LearningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.training_uploads.MAX_IMAGE_PIXELS", 1599)
    error = await refusal(served.create())
    assert "it is 40 x 40, the limit is 1599 pixels" in (error.details() or "")


async def test_a_caller_that_goes_away_leaves_nothing(served: LearningServer) -> None:
    call = served.stub.CreateTraining()
    await call.write(spec())
    await call.write(chunk("a", png()[:100]))
    while not served.leftovers():
        await asyncio.sleep(0.01)
    call.cancel()
    await nothing_is_left(served)
    await served.create()  # its place is free again


async def test_a_caller_that_sends_nothing_is_dropped(start: Start) -> None:
    served = await start(stall_timeout_s=0.2)
    call = served.stub.CreateTraining()
    await call.write(spec())
    error = await refusal(call)
    assert error.code() == StatusCode.CANCELLED
    assert "nothing was sent for 0.2 s" in (error.details() or "")
    await nothing_is_left(served)


async def test_an_upload_that_takes_too_long_is_dropped(start: Start) -> None:
    served = await start(upload_timeout_s=0.2)
    call = served.stub.CreateTraining()
    await call.write(spec())
    error = await refusal(call)
    assert error.code() == StatusCode.DEADLINE_EXCEEDED
    assert "more than 0.2 s" in (error.details() or "")
    await nothing_is_left(served)


async def test_too_many_uploads_at_once_are_refused(served: LearningServer) -> None:
    calls = [served.stub.CreateTraining() for _ in range(2)]
    for call in calls:
        await call.write(spec())
    while len(served.leftovers()) < 4:  # a folder and its images/ for each
        await asyncio.sleep(0.01)
    error = await refusal(served.create())
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    assert "2 uploads are under way" in (error.details() or "")
    for call in calls:
        call.cancel()
    await nothing_is_left(served)


async def test_a_full_queue_is_told_with_a_time_to_come_back(start: Start) -> None:
    served = await start(max_queued_trainings=1)
    running = await served.create("<a>", initializer="hold")
    await served.progressed(running.training_id)
    await served.create("<b>")
    error = await refusal(served.create("<c>"))
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    assert "1 trainings are waiting" in (error.details() or "")
    assert details(error)["google.rpc.RetryInfo"].retry_delay.seconds == 60


async def test_a_full_disk_is_told_and_nothing_half_written_stays(served: LearningServer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # no file beyond 1000 bytes
    try:
        error = await refusal(served.create())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    assert "disk of the trainings is full" in (error.details() or "")
    await nothing_is_left(served)
    assert (await served.ended((await served.create()).training_id)).state == SUCCEEDED


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


async def test_an_unknown_id_is_not_found(served: LearningServer) -> None:
    for call in (
        served.get("0" * 32),
        served.watch("../x"),
        served.cancel(""),
        delete(served, "a"),
    ):
        error = await refusal(call)
        assert error.code() == StatusCode.NOT_FOUND
        assert details(error)["google.rpc.ResourceInfo"].resource_type == "training"


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


# Watching


async def test_all_watchers_see_the_end(served: LearningServer) -> None:
    training_id = (await served.create(initializer="hold")).training_id
    watchers = [asyncio.create_task(served.watch(training_id)) for _ in range(5)]
    await served.progressed(training_id)
    served.release(training_id)
    for responses in await asyncio.gather(*watchers):
        assert responses[-1].training.state == SUCCEEDED
    after = await served.watch(training_id)  # and who comes late sees the end at once
    assert [response.training.state for response in after] == [SUCCEEDED]


async def test_a_slow_watcher_gets_the_newest_state(served: LearningServer) -> None:
    training_id = (await served.create(initializer="floods")).training_id
    request = training_pb2.WatchTrainingRequest(training_id=training_id)
    slow = served.stub.WatchTraining(request, timeout=TIMEOUT_S)
    rest: list[Any] = [await slow.read()]
    assert (await served.ended(training_id)).state == SUCCEEDED  # it held nobody up
    while (response := await slow.read()) is not grpc.aio.EOF:
        rest.append(response)
    assert rest[-1].training.state == SUCCEEDED
    assert rest[-1].training.progress.step == FLOOD_STEPS
    # What fits into the connection's window was on its way; nearly all of 900 MB was skipped.
    assert sum(len(response.preview) for response in rest) < FLOOD_STEPS * PREVIEW_BYTES / 8


async def test_previews_come_once_each(served: LearningServer) -> None:
    responses = await served.watch((await served.create(initializer="floods")).training_id)
    steps = [r.training.progress.step for r in responses if r.HasField("preview")]
    assert steps and len(set(steps)) == len(steps)


async def test_a_waiting_training_is_told_its_place(served: LearningServer) -> None:
    first = await served.create("<a>", initializer="hold")
    await served.progressed(first.training_id)
    second, third = await served.create("<b>"), await served.create("<c>")
    assert (second.state, second.queue_position) == (QUEUED, 0)
    assert (third.state, third.queue_position) == (QUEUED, 1)
    served.release(first.training_id)
    places = [r.training.queue_position for r in await served.watch(third.training_id)]
    assert places[0] == 1 and 0 in places
    ends = [(await served.get(one.training_id)).end_time for one in (first, second, third)]
    assert [end.ToMicroseconds() for end in ends] == sorted(end.ToMicroseconds() for end in ends)


async def test_as_many_learn_at_once_as_allowed(start: Start) -> None:
    served = await start(max_training_jobs=2)
    made = [await served.create(token, initializer="hold") for token in ("<a>", "<b>", "<c>")]
    for training in made[:2]:
        await served.progressed(training.training_id)
    assert [(await served.get(t.training_id)).state for t in made] == [RUNNING, RUNNING, QUEUED]


# Cancelling and deleting


async def test_cancelling_a_waiting_training_ends_it(served: LearningServer) -> None:
    first = await served.create("<a>", initializer="hold")
    second = await served.create("<b>")
    assert (await served.cancel(second.training_id)).state == CANCELLED
    served.release(first.training_id)
    await served.ended(first.training_id)
    assert (await served.get(second.training_id)).state == CANCELLED
    third = await served.create("<b>")  # its name is free
    assert (await served.ended(third.training_id)).state == SUCCEEDED


async def test_cancelling_a_running_training_ends_its_process(served: LearningServer) -> None:
    training_id = (await served.create(initializer="hold")).training_id
    await served.progressed(training_id)
    assert (await served.cancel(training_id)).state in (CANCELLING, CANCELLED)
    ended = await served.ended(training_id)
    assert (ended.state, ended.error, ended.concept_id) == (CANCELLED, "", "")
    assert (await served.cancel(training_id)).state == CANCELLED  # once more is no error
    assert served.store.list(limit=1) == []


async def test_a_process_that_does_not_hear_is_killed(start: Start) -> None:
    served = await start(stop_grace_s=0.2)
    training_id = (await served.create(initializer="deaf")).training_id
    await served.progressed(training_id)
    await served.cancel(training_id)
    assert (await served.ended(training_id)).state == CANCELLED


async def delete(served: LearningServer, training_id: str) -> None:
    await served.stub.DeleteTraining(training_pb2.DeleteTrainingRequest(training_id=training_id))


async def test_only_what_has_ended_can_be_deleted(served: LearningServer) -> None:
    training_id = (await served.create(initializer="hold")).training_id
    error = await refusal(delete(served, training_id))
    assert error.code() == StatusCode.FAILED_PRECONDITION
    assert "cancel it" in (error.details() or "")
    await served.progressed(training_id)
    served.release(training_id)
    await served.ended(training_id)
    await delete(served, training_id)
    assert (await refusal(served.get(training_id))).code() == StatusCode.NOT_FOUND
    await nothing_is_left(served)
    assert served.store.get("<cat>")  # the concept stays


async def list_all(served: LearningServer, page_size: int = 0) -> list[training_pb2.Training]:
    found: list[training_pb2.Training] = []
    request = training_pb2.ListTrainingsRequest(page_size=page_size)
    while True:
        page = await served.stub.ListTrainings(request)
        found.extend(page.trainings)
        if not page.next_page_token:
            return found
        assert len(page.trainings) == page_size
        request.page_token = page.next_page_token


async def test_lists_are_paged_the_latest_first(served: LearningServer) -> None:
    made = [await served.create(f"<{name}>", initializer="hold") for name in "abcde"]
    expected = [training.training_id for training in reversed(made)]
    for page_size in (0, 1, 2, 5):
        assert [t.training_id for t in await list_all(served, page_size)] == expected


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"page_size": -1}, "page_size"), ({"page_size": 1001}, "page_size"),
     ({"page_token": "?"}, "page_token"), ({"page_token": "PGE-"}, "page_token")],
)  # fmt: skip
async def test_a_bad_page_is_refused(
    served: LearningServer, fields: dict[str, Any], field: str
) -> None:
    error = await refusal(served.stub.ListTrainings(training_pb2.ListTrainingsRequest(**fields)))
    assert (error.code(), field_of(error)) == (StatusCode.INVALID_ARGUMENT, field)


async def test_the_oldest_that_have_ended_are_forgotten(start: Start) -> None:
    served = await start(limits=TrainingLimits(max_kept_trainings=2))
    made: list[str] = []
    for name in "abcd":
        made.append((await served.create(f"<{name}>")).training_id)
        await served.ended(made[-1])
    while len(found := await list_all(served)) > 2:
        await asyncio.sleep(0.01)
    assert [training.training_id for training in found] == [made[3], made[2]]
    assert sorted(path.name for path in (served.folder / "jobs").iterdir()) == sorted(made[2:])


# Processes that end otherwise


async def test_a_crash_is_tried_again(served: LearningServer) -> None:
    ended = await served.ended((await served.create(initializer="killed once")).training_id)
    assert (ended.state, ended.error) == (SUCCEEDED, "")


@pytest.mark.parametrize(
    ("behaviour", "reason", "attempts"),
    [
        ("killed", f"{GIVEN_UP}the learning process ended unexpectedly, by SIGKILL", 3),
        ("babbles", f"{GIVEN_UP}the learning process ended unexpectedly, by SIGKILL", 3),
        ("ends without a result", f"{GIVEN_UP}the learning process ended unexpectedly", 3),
        ("refuses", "the loss is NaN; lower it", 1),
        ("wide", "learned, but not stored: concept '<cat>' has vectors of width 13", 1),
    ],
)  # fmt: skip
async def test_what_cannot_succeed_fails_with_its_reason(
    served: LearningServer, behaviour: str, reason: str, attempts: int
) -> None:
    training_id = (await served.create(initializer=behaviour)).training_id
    ended = await served.ended(training_id)
    assert ended.state == FAILED
    assert ended.error.startswith(reason)
    counted = (served.folder / "jobs" / training_id / "attempts").read_text()
    assert len(counted) == attempts
    after = await served.create("<dog>")  # the next one is not harmed
    assert (await served.ended(after.training_id)).state == SUCCEEDED


async def test_a_learned_concept_that_cannot_be_stored_can_be_fetched(
    served: LearningServer, tmp_path: Path
) -> None:
    training_id = (await served.create("<cat>", initializer="hold")).training_id
    await served.progressed(training_id)
    vectors = np.ones((1, DIM), np.float32)
    served.store.import_concept(Concept(placeholder_token="<cat>", learned_embeddings=vectors))
    served.release(training_id)
    ended = await served.ended(training_id)
    assert ended.state == FAILED and "is taken by a concept with other vectors" in ended.error
    request = training_pb2.GetTrainingRequest(training_id=training_id)
    path = tmp_path / "fetched.safetensors"
    path.write_bytes((await served.stub.GetTraining(request)).concept_file)
    assert read_concept(path).placeholder_token == "<cat>"


# Servers that end


async def test_a_stopped_server_goes_on_when_it_is_back(start: Start) -> None:
    first = await start()
    running = await first.create("<a>", initializer="hold")
    await first.progressed(running.training_id)
    waiting = await first.create("<b>")
    watcher = asyncio.create_task(first.watch(running.training_id))
    await asyncio.sleep(0)
    await first.server.stop()
    error = await refusal(watcher)
    assert error.code() == StatusCode.UNAVAILABLE
    second = await start()
    assert (await second.get(running.training_id)).state in (QUEUED, RUNNING)
    second.release(running.training_id)
    for training in (running, waiting):
        assert (await second.ended(training.training_id)).state == SUCCEEDED
    folder = second.folder / "jobs" / running.training_id
    assert len((folder / "attempts").read_text()) == 2
    assert TrainingFolder(folder).read_state().crashes == 0  # the end of a server is no crash


def store_by_hand(folder: Path, state: TrainingState, *, token: str) -> TrainingFolder:
    """What a server that was killed leaves: a training in this state."""
    store = TrainingStore(folder, SMALL)
    store.open()
    upload = store.begin_upload()
    upload.add("a.png", 0, png())
    upload.finish(1)
    record = TrainingRecord(
        training_id=upload.training_id,
        create_time=time.time(),
        spec=TrainingSpec(placeholder_token=token),
        images=upload.images,
    )
    stored = store.commit(upload, record)
    stored.folder.write_state(state)
    store.close()
    return stored.folder


async def test_what_a_killed_server_left_is_taken_up(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "trainings"
    running = store_by_hand(folder, TrainingState(status="running"), token="<a>")
    cancelling = store_by_hand(folder, TrainingState(status="cancelling"), token="<b>")
    queued = store_by_hand(folder, TrainingState(), token="<c>")
    (folder / "incoming" / "half").mkdir()
    (folder / "trash" / "gone").mkdir()
    (folder / "jobs" / "other").mkdir()
    broken = folder / "jobs" / ("f" * 32)
    broken.mkdir()
    (broken / "spec.json").write_text("{")
    served = await start()
    states = [(await served.ended(f.path.name)).state for f in (running, cancelling, queued)]
    assert states == [SUCCEEDED, CANCELLED, SUCCEEDED]
    assert broken.exists()  # not ours to throw away
    assert list((folder / "incoming").iterdir()) == list((folder / "trash").iterdir()) == []


async def test_a_result_that_was_not_stored_yet_is_stored_after_a_restart(
    start: Start, tmp_path: Path
) -> None:
    from tests.scripted_worker import finish

    left = store_by_hand(tmp_path / "trainings", TrainingState(status="running"), token="<a>")
    finish(left)
    served = await start()
    assert (await served.ended(left.path.name)).state == SUCCEEDED
    assert not (left.path / "attempts").exists()  # nothing was learned again
    assert served.store.get("<a>")


async def test_two_servers_cannot_share_a_folder_of_trainings(
    served: LearningServer, start: Start
) -> None:
    with pytest.raises(ConfigError, match="another server works on the trainings"):
        await start()


def test_records_survive_their_files() -> None:
    record = TrainingRecord(
        training_id="0" * 32,
        create_time=1.25,
        spec=TrainingSpec(placeholder_token="<é>", options={"learning_rate": 0.1, "steps": 3}),
        images=(UploadedImage(file_name="\x00/..", sha256="ab"),),
    )
    assert TrainingRecord.from_json(record.to_json()) == record
    fields = json.loads(record.to_json())
    with pytest.raises(ValueError, match="format"):
        TrainingRecord.from_json(json.dumps({**fields, "format": "oneword-training/9"}).encode())
    state = TrainingState(status="failed", error="x", crashes=2)
    assert TrainingState.from_json(state.to_json()) == state
    with pytest.raises(ValueError, match="unknown status 'asleep'"):
        TrainingState.from_json(state.to_json().replace(b"failed", b"asleep"))


# Servers that do not learn


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


@pytest.mark.parametrize("name", ["max_training_jobs", "max_queued_trainings", "max_crashes"])
def test_settings_out_of_range_are_refused_by_name(name: str) -> None:
    settings: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=name):
        TrainingConfig(**settings)


# The client


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
    monkeypatch.setattr("engine.training_client.CHUNK_BYTES", 4)
    requests = list(create_requests(training_pb2.TrainingSpec(), [("a", b"0123456789")]))
    assert requests[0].HasField("spec")
    assert requests[-1].end.num_images == 1
    chunks = [(r.image.file_name, r.image.offset, r.image.data) for r in requests[1:-1]]
    assert chunks == [("a", 0, b"0123"), ("a", 4, b"4567"), ("a", 8, b"89")]
