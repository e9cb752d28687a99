"""Watching a training, and its place among others."""

import asyncio
from typing import Any

import grpc.aio
from grpc import StatusCode

from protos.oneword.v1 import training_pb2
from tests.scripted_worker import FLOOD_STEPS, PREVIEW_BYTES
from tests.test_service import details
from tests.training_harness import (
    QUEUED,
    RUNNING,
    SUCCEEDED,
    TIMEOUT_S,
    LearningServer,
    Start,
    refusal,
)


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


async def test_a_full_queue_is_told_with_a_time_to_come_back(start: Start) -> None:
    served = await start(max_queued_trainings=1)
    running = await served.create("<a>", initializer="hold")
    await served.progressed(running.training_id)
    await served.create("<b>")
    error = await refusal(served.create("<c>"))
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    assert "1 trainings are waiting" in (error.details() or "")
    assert details(error)["google.rpc.RetryInfo"].retry_delay.seconds == 60
