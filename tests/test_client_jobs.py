"""Jobs and trainings from a client: watched through restarts, waited for, repeated without harm."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc import StatusCode

from engine.client import Client, JobResult
from engine.client.errors import ServerError
from engine.client.retries import RetryPolicy
from protos.oneword.v1 import generation_pb2, training_pb2
from protos.oneword.v1.generation_pb2 import (
    GetJobResponse,
    ImageResult,
    Job,
    SubmitJobResponse,
    Summary,
    WatchJobResponse,
)
from protos.oneword.v1.training_pb2 import (
    CreateTrainingResponse,
    Training,
    WatchTrainingResponse,
)
from tests.client_setup import FakeTime, ScriptedServer, answer, calling, fail, hang, job
from tests.test_client_retries import Serve
from tests.test_client_retries import kind as kind
from tests.test_client_retries import serve as serve

QUEUED, RUNNING = generation_pb2.JOB_STATE_QUEUED, generation_pb2.JOB_STATE_RUNNING
SUCCEEDED, FAILED = generation_pb2.JOB_STATE_SUCCEEDED, generation_pb2.JOB_STATE_FAILED
CANCELLED = generation_pb2.JOB_STATE_CANCELLED
SHUTTING_DOWN = fail(
    StatusCode.UNAVAILABLE,
    "shutting down",
    error_details_pb2.ErrorInfo(reason="SHUTTING_DOWN", domain="oneword"),
)
SUMMARY = Summary(seeds=[7, 8], sampler="ddim")
DESCRIBED = GetJobResponse(job=job(SUCCEEDED, 2), summary=SUMMARY)


def told(*events: Job | int) -> list[WatchJobResponse]:
    """States, and images by their index."""
    return [
        WatchJobResponse(job=event)
        if isinstance(event, Job)
        else WatchJobResponse(image=ImageResult(image_index=event, image=b"image %d" % event))
        for event in events
    ]


BEFORE = told(job(QUEUED), job(RUNNING), 0, job(RUNNING, 1))
AFTER = told(0, job(RUNNING, 1), 1, job(SUCCEEDED, 2))


# Watching


async def test_a_job_is_watched_again_where_the_server_was_restarted(
    kind: str, serve: Serve
) -> None:
    server = serve(
        WatchJob=[
            fail(StatusCode.UNAVAILABLE, after=BEFORE),
            answer(*BEFORE),  # ended too early, as if all were well
            SHUTTING_DOWN,
            answer(*AFTER),
        ],
        GetJob=[answer(DESCRIBED)],
    )
    changes: list[Job] = []
    async with calling(kind, server.address, fake=FakeTime()) as caller:
        result = await caller.call(lambda client: client.jobs.wait("j", on_change=changes.append))
    assert isinstance(result, JobResult)
    assert result.images == [b"image 0", b"image 1"]
    assert result.summary == SUMMARY and result.job.state == SUCCEEDED
    assert [(change.state, change.num_images_done) for change in changes] == [
        (QUEUED, 0),
        (RUNNING, 0),
        (RUNNING, 1),
        # Told again by the server that was restarted: it is news that it goes on from there.
        (QUEUED, 0),
        (RUNNING, 0),
        (RUNNING, 1),
        (SUCCEEDED, 2),
    ]
    assert [(r.job_id, r.with_images) for r in server.requests("WatchJob")] == [("j", True)] * 4


async def test_images_of_a_job_come_once(kind: str, serve: Serve) -> None:
    server = serve(WatchJob=[fail(StatusCode.UNAVAILABLE, after=BEFORE), answer(*AFTER)])
    async with calling(kind, server.address, fake=FakeTime()) as caller:
        events = await caller.all(lambda client: client.jobs.watch("j", with_images=True))
    assert [event.image_index for event in events if isinstance(event, ImageResult)] == [0, 1]
    states = [event for event in events if isinstance(event, Job)]
    assert states == [job(QUEUED), job(RUNNING), job(RUNNING, 1), job(SUCCEEDED, 2)]


async def test_waiting_survives_a_server_that_is_really_gone(kind: str) -> None:
    """The process behind the port is another one, and for a moment there is none."""
    first = ScriptedServer({"WatchJob": [lambda request, context: hang_after(context)]})
    second: list[ScriptedServer] = []

    def restart(change: Job) -> None:
        if change.num_images_done == 1 and not second:
            first.stop()
            script = {"WatchJob": [answer(*AFTER)], "GetJob": [answer(DESCRIBED)]}
            second.append(ScriptedServer(script, address=first.address))

    # Real time: gRPC itself waits before it connects again.
    policy = RetryPolicy(initial_backoff_s=0.05, max_backoff_s=0.2)
    try:
        async with calling(kind, first.address, retry=policy) as caller:
            result = await caller.call(lambda client: client.jobs.wait("j", on_change=restart))
    finally:
        for server in second:
            server.stop()
    assert result.images == [b"image 0", b"image 1"]


def hang_after(context: Any) -> Iterator[Message]:
    yield from BEFORE
    yield from hang(None, context)


async def test_a_server_that_stays_away_is_given_up(kind: str, serve: Serve) -> None:
    server, fake = serve(WatchJob=[fail(StatusCode.UNAVAILABLE)]), FakeTime()
    policy = RetryPolicy(max_outage_s=30.0, max_attempts=2)
    async with calling(kind, server.address, fake=fake, retry=policy) as caller:
        with pytest.raises(ServerError, match="try again"):
            await caller.call(lambda client: client.jobs.wait("j"))
    assert 30.0 < sum(fake.slept) <= 40.0


async def test_waiting_has_its_own_deadline(kind: str, serve: Serve) -> None:
    server = serve(WatchJob=[lambda request, context: hang_after(context)])
    async with calling(kind, server.address, fake=FakeTime(), timeout_s=0.01) as caller:
        with pytest.raises(ServerError, match=r"within 0\.5 s") as caught:
            await caller.call(lambda client: client.jobs.wait("j", timeout_s=0.5))
    assert caught.value.code == StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("last", "code", "message"),
    [
        (
            job(
                FAILED,
                failure=generation_pb2.Failure(code=9, message="it is NaN", reason="NUMERICAL"),
            ),
            StatusCode.FAILED_PRECONDITION,
            "it is NaN",
        ),
        (job(CANCELLED), StatusCode.CANCELLED, "job j was cancelled"),
    ],
    ids=["failed", "cancelled"],
)
async def test_waiting_raises_what_the_job_has_failed_with(
    kind: str, serve: Serve, last: Job, code: StatusCode, message: str
) -> None:
    server = serve(WatchJob=[answer(*told(job(RUNNING), last))])
    async with calling(kind, server.address) as caller:
        with pytest.raises(ServerError, match=message) as caught:
            await caller.call(lambda client: client.jobs.wait("j"))
    assert caught.value.code == code


async def test_a_job_that_is_not_there_is_not_waited_for(kind: str, serve: Serve) -> None:
    server = serve(WatchJob=[fail(StatusCode.NOT_FOUND, "unknown job")])
    async with calling(kind, server.address, fake=FakeTime()) as caller:
        with pytest.raises(ServerError, match="unknown job"):
            await caller.call(lambda client: client.jobs.wait("j"))
    assert len(server.requests("WatchJob")) == 1


# The other calls


async def test_a_job_is_submitted_under_one_id(kind: str, serve: Serve) -> None:
    submitted = answer(SubmitJobResponse(job=job(QUEUED)))
    server = serve(SubmitJob=[fail(StatusCode.UNAVAILABLE), submitted])
    async with calling(kind, server.address, fake=FakeTime()) as caller:
        made = await caller.call(lambda client: client.jobs.submit(prompt="a cat", priority=3))
    assert made == job(QUEUED)
    first, second = server.requests("SubmitJob")
    assert first == second and len(first.request.request_id) == 32
    assert (first.request.prompt, first.request.priority) == ("a cat", 3)


async def test_jobs_are_listed_page_by_page(kind: str, serve: Serve) -> None:
    jobs = [Job(job_id=str(index)) for index in range(5)]

    def page(request: Any, _context: Any) -> Iterator[Message]:
        first = int(request.page_token or 0)
        more = str(first + 2) if first + 2 < len(jobs) else ""
        yield generation_pb2.ListJobsResponse(jobs=jobs[first : first + 2], next_page_token=more)

    server = serve(ListJobs=[fail(StatusCode.UNAVAILABLE), page])
    async with calling(kind, server.address, fake=FakeTime()) as caller:
        assert await caller.all(lambda client: client.jobs.list()) == jobs
    assert [r.page_token for r in server.requests("ListJobs")] == ["", "", "2", "4"]


async def test_a_job_is_described_cancelled_and_deleted(kind: str, serve: Serve) -> None:
    server = serve(
        GetJob=[answer(DESCRIBED)],
        CancelJob=[answer(generation_pb2.CancelJobResponse(job=job(CANCELLED)))],
        DeleteJob=[fail(StatusCode.UNAVAILABLE), fail(StatusCode.NOT_FOUND)],
    )
    async with calling(kind, server.address, fake=FakeTime()) as caller:
        assert await caller.call(lambda client: client.jobs.get("j", with_images=True)) == DESCRIBED
        assert await caller.call(lambda client: client.jobs.cancel("j")) == job(CANCELLED)
        await caller.call(lambda client: client.jobs.delete("j"))
    assert server.requests("GetJob")[0].with_images
    assert [request.job_id for request in server.requests("DeleteJob")] == ["j", "j"]


# Trainings


async def test_an_upload_that_breaks_is_sent_again_whole(kind: str, serve: Serve) -> None:
    created = CreateTrainingResponse(training=Training(training_id="t"))
    server = serve(CreateTraining=[fail(StatusCode.UNAVAILABLE), answer(created)])
    async with calling(kind, server.address, fake=FakeTime()) as caller:
        training = await caller.call(
            lambda client: client.training.create("<cat>", {"a.png": b"abc"}, steps=3)
        )
    assert training.training_id == "t"
    first, second = server.requests("CreateTraining")
    assert first == second and len(first) == 3 and first[-1].end.num_images == 1
    assert first[0].spec.request_id and first[0].spec.options.steps == 3


async def test_a_training_is_watched_again(kind: str, serve: Serve) -> None:
    states = [
        WatchTrainingResponse(training=Training(training_id="t", state=state))
        for state in (
            training_pb2.TRAINING_STATE_QUEUED,
            training_pb2.TRAINING_STATE_RUNNING,
            training_pb2.TRAINING_STATE_SUCCEEDED,
        )
    ]
    broken = fail(StatusCode.UNAVAILABLE, after=states[:2])
    server = serve(WatchTraining=[broken, SHUTTING_DOWN, answer(*states[1:])])
    async with calling(kind, server.address, fake=FakeTime()) as caller:
        assert await caller.all(lambda client: client.training.watch("t")) == states


async def test_threads_share_a_client(serve: Serve) -> None:
    submitted = answer(SubmitJobResponse(job=job(QUEUED)))
    server = serve(SubmitJob=[*[fail(StatusCode.UNAVAILABLE)] * 5, submitted])
    fake = FakeTime()
    policy = RetryPolicy(max_attempts=10)
    with Client(server.address, clock=fake.clock, sleep=fake.sleep, retry=policy) as client:
        submits = [asyncio.to_thread(client.jobs.submit, prompt=str(n)) for n in range(8)]
        assert await asyncio.gather(*submits) == [job(QUEUED)] * 8
    calls = [call.request for call in server.requests("SubmitJob")]
    assert len(calls) == 13, "eight that succeed, and five that do not"
    assert len({request.request_id for request in calls}) == 8
    assert all(
        len({r.prompt for r in calls if r.request_id == request.request_id}) == 1
        for request in calls
    )
