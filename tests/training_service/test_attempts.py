"""Learning processes that end otherwise than well, and servers that end before them."""

import asyncio
import json
import time
from pathlib import Path

import numpy as np
import pytest
from grpc import StatusCode

from engine.concepts import Concept, read_concept
from engine.errors import ConfigError, StorageFull
from engine.training.folder import TrainingFolder, TrainingRecord, TrainingState, UploadedImage
from engine.training.spec import TrainingSpec
from engine.training.store import TrainingStore
from protos.oneword.v1 import training_pb2
from tests.fakes import DIM
from tests.training_harness import (
    CANCELLED,
    FAILED,
    QUEUED,
    RUNNING,
    SMALL,
    SUCCEEDED,
    LearningServer,
    Start,
    png,
    refusal,
)

GIVEN_UP = "given up after 3 attempts: "


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
    assert counted == "123"[:attempts]  # each was on disk before its process began
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
    folder = TrainingFolder(first.folder / "jobs" / running.training_id)
    assert folder.read_state().attempts == 0  # the end of a server is no fault of a training
    error = await refusal(watcher)
    assert error.code() == StatusCode.UNAVAILABLE
    second = await start()
    assert (await second.get(running.training_id)).state in (QUEUED, RUNNING)
    second.release(running.training_id)
    for training in (running, waiting):
        assert (await second.ended(training.training_id)).state == SUCCEEDED
    assert len((folder.path / "attempts").read_text()) == 2


def store_by_hand(folder: Path, state: TrainingState, *, token: str) -> TrainingFolder:
    """What a server that was killed leaves: a training in this state."""
    store = TrainingStore(folder, SMALL)
    store.open()
    upload = store.begin_upload()
    upload.add("image", "a.png", 0, png())
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


async def test_a_training_that_brings_the_server_down_is_not_tried_for_ever(
    start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "trainings"
    killers = [
        store_by_hand(folder, TrainingState(status="running", attempts=n), token=f"<{n}>")
        for n in (2, 3)
    ]
    served = await start()
    last_try, given_up = [await served.ended(killer.path.name) for killer in killers]
    assert last_try.state == SUCCEEDED
    assert (killers[0].path / "attempts").read_text() == "3"
    assert given_up.state == FAILED
    assert given_up.error.startswith(f"{GIVEN_UP}the server died during the last of them")
    assert not (killers[1].path / "attempts").exists()  # no process was started


async def test_an_attempt_that_cannot_be_counted_is_not_made(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await start()

    def full(_folder: TrainingFolder, _state: TrainingState) -> None:
        raise StorageFull("the disk of the trainings is full")

    created = await served.create(initializer="hold")
    await served.progressed(created.training_id)
    waiting = await served.create("<b>")
    monkeypatch.setattr(TrainingFolder, "write_state", full)
    served.release(created.training_id)
    ended = await served.ended(waiting.training_id)
    assert ended.error == f"{GIVEN_UP}the disk of the trainings is full"
    assert not (served.folder / "jobs" / waiting.training_id / "attempts").exists()


def test_states_of_an_earlier_version_are_read() -> None:
    state = TrainingState(attempts=2)
    earlier = state.to_json().replace(b'"attempts"', b'"crashes"')
    assert TrainingState.from_json(earlier) == state


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
        spec=TrainingSpec(
            placeholder_token="<é>",
            options={"learning_rate": 0.1, "steps": 3, "initializer_candidates": ("a", "b c")},
        ),
        images=(UploadedImage(file_name="\x00/..", sha256="ab", mask_sha256="cd"),),
    )
    assert TrainingRecord.from_json(record.to_json()) == record
    fields = json.loads(record.to_json())
    with pytest.raises(ValueError, match="format"):
        TrainingRecord.from_json(json.dumps({**fields, "format": "oneword-training/9"}).encode())
    state = TrainingState(status="failed", error="x", attempts=2)
    assert TrainingState.from_json(state.to_json()) == state
    with pytest.raises(ValueError, match="unknown status 'asleep'"):
        TrainingState.from_json(state.to_json().replace(b"failed", b"asleep"))
