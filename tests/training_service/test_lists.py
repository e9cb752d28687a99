"""Cancelling, deleting, listing and forgetting trainings."""

import asyncio
from typing import Any

import pytest
from grpc import StatusCode

from engine.training.spec import TrainingLimits
from protos.oneword.v1 import training_pb2
from tests.test_service import details, field_of
from tests.training_harness import (
    CANCELLED,
    CANCELLING,
    SUCCEEDED,
    LearningServer,
    Start,
    delete,
    list_all,
    nothing_is_left,
    refusal,
)


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
