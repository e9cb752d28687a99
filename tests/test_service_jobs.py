"""Jobs over a real gRPC server and channel, also over the end of a server."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc import StatusCode

from engine.image_jobs.job import JobLimits
from protos.oneword.v1 import generation_pb2 as pb
from protos.oneword.v1 import server_info_pb2
from tests import service_harness
from tests.fakes import WAIT_S
from tests.service_harness import Harness, StartServer, code_of, field_of, images, make_concept

# Fixtures.
start_server = service_harness.start_server


@pytest.fixture
async def served(start_server: StartServer, tmp_path: Path) -> Harness:
    return await start_server(job_dir=tmp_path)


async def _submit(served: Harness, **fields: Any) -> pb.Job:
    given: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4, **fields}
    request = pb.GenerateRequest(**given)
    answer = await served.jobs.SubmitJob(pb.SubmitJobRequest(request=request), timeout=WAIT_S)
    return answer.job


async def _watch(served: Harness, job_id: str, **fields: Any) -> list[pb.WatchJobResponse]:
    call = served.jobs.WatchJob(pb.WatchJobRequest(job_id=job_id, **fields), timeout=WAIT_S)
    return [response async for response in call]


async def test_a_job_makes_the_images_of_the_request(served: Harness) -> None:
    job = await _submit(served, seed=3, num_images=3)
    told = await _watch(served, job.job_id, with_images=True)
    last = told[-1].job
    assert (last.state, last.num_images_done) == (pb.JOB_STATE_SUCCEEDED, 3)
    assert last.end_time.ToSeconds() <= last.expire_time.ToSeconds() - 86399
    sent = [response.image for response in told if response.HasField("image")]
    direct = images(await served.generate(prompt="a cat", seed=3, num_images=3))
    assert sent == direct
    answer = await served.jobs.GetJob(
        pb.GetJobRequest(job_id=job.job_id, with_images=True), timeout=WAIT_S
    )
    assert list(answer.images) == direct and list(answer.summary.seeds) == [3, 4, 5]
    assert answer.job.request.prompt == "a cat" and answer.job.request.seed == 3


async def test_a_job_outlives_its_server(start_server: StartServer, tmp_path: Path) -> None:
    first = await start_server(job_dir=tmp_path)
    first.denoiser.free_calls = 4
    first.denoiser.gate.clear()
    jobs = [await _submit(first, seed=7, num_images=2), await _submit(first, seed=9)]
    await asyncio.to_thread(first.denoiser.wait_for_calls, 5)
    first.denoiser.gate.set()
    await first.server.stop()
    second = await start_server(job_dir=tmp_path)
    for job, seeds in zip(jobs, ([7, 8], [9]), strict=True):
        told = await _watch(second, job.job_id, with_images=True)
        assert told[-1].job.state == pb.JOB_STATE_SUCCEEDED
        assert [response.image.seed for response in told if response.HasField("image")] == seeds


async def test_a_job_has_the_concepts_of_when_it_was_submitted(served: Harness) -> None:
    served.store.import_concept(make_concept())
    direct = images(await served.generate(prompt="a <cat-toy>", seed=1))
    served.denoiser.gate.clear()
    await _submit(served)  # keeps the device busy
    job = await _submit(served, prompt="a <cat-toy>", seed=1)
    served.store.delete("<cat-toy>")
    served.denoiser.gate.set()
    told = await _watch(served, job.job_id, with_images=True)
    assert [response.image.image for response in told if response.HasField("image")] == [
        direct[0].image
    ]


async def test_a_repeated_submission_is_the_same_job(served: Harness) -> None:
    job = await _submit(served, request_id="r")
    assert (await _submit(served, request_id="r")).job_id == job.job_id
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _submit(served, request_id="r", prompt="a dog")
    assert field_of(refused.value) == "request_id"


async def test_what_cannot_be_carried_out_is_refused_when_it_is_submitted(served: Harness) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _submit(served, width=7)
    assert refused.value.code() is StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _submit(served, prompt="<nobody>")
    assert refused.value.code() is StatusCode.NOT_FOUND
    listed = await served.jobs.ListJobs(pb.ListJobsRequest(), timeout=WAIT_S)
    assert not listed.jobs


async def test_a_failure_is_told_and_is_that_of_the_job_alone(served: Harness) -> None:
    served.denoiser.error = RuntimeError("secret")
    job = await _submit(served)
    last = (await _watch(served, job.job_id))[-1].job
    assert last.state == pb.JOB_STATE_FAILED and last.failure.reason == "INTERNAL"
    assert "secret" not in str(last)
    served.denoiser.error = None
    other = await _submit(served)
    assert (await _watch(served, other.job_id))[-1].job.state == pb.JOB_STATE_SUCCEEDED


async def test_jobs_are_cancelled_listed_and_deleted(served: Harness) -> None:
    served.denoiser.gate.clear()
    jobs = [await _submit(served, seed=seed) for seed in range(3)]
    await asyncio.to_thread(served.denoiser.wait_for_calls, 1)
    code = await code_of(
        served.jobs.DeleteJob(pb.DeleteJobRequest(job_id=jobs[0].job_id), timeout=WAIT_S)
    )
    assert code is StatusCode.FAILED_PRECONDITION
    for job in jobs:
        await served.jobs.CancelJob(pb.CancelJobRequest(job_id=job.job_id), timeout=WAIT_S)
    served.denoiser.gate.set()
    for job in jobs:
        told = await _watch(served, job.job_id)
        assert told[-1].job.state == pb.JOB_STATE_CANCELLED
    page = await served.jobs.ListJobs(pb.ListJobsRequest(page_size=2), timeout=WAIT_S)
    rest = await served.jobs.ListJobs(
        pb.ListJobsRequest(page_size=2, page_token=page.next_page_token), timeout=WAIT_S
    )
    assert [job.request.seed for job in (*page.jobs, *rest.jobs)] == [2, 1, 0]
    assert not rest.next_page_token
    await served.jobs.DeleteJob(pb.DeleteJobRequest(job_id=jobs[0].job_id), timeout=WAIT_S)
    gone = served.jobs.GetJob(pb.GetJobRequest(job_id=jobs[0].job_id), timeout=WAIT_S)
    assert await code_of(gone) is StatusCode.NOT_FOUND


async def test_images_too_large_for_a_message_are_watched_instead(
    start_server: StartServer, tmp_path: Path
) -> None:
    served = await start_server(job_dir=tmp_path, max_message_bytes=100_000)
    job = await _submit(served, num_images=8)
    told = await _watch(served, job.job_id, with_images=True)
    assert sum(response.HasField("image") for response in told) == 8
    call = served.jobs.GetJob(pb.GetJobRequest(job_id=job.job_id, with_images=True), timeout=WAIT_S)
    with pytest.raises(grpc.aio.AioRpcError, match="one by one with WatchJob"):
        await call


async def test_a_server_without_a_folder_says_so(start_server: StartServer) -> None:
    served = await start_server()
    with pytest.raises(grpc.aio.AioRpcError, match="start it with --job-dir") as refused:
        await _submit(served)
    assert refused.value.code() is StatusCode.FAILED_PRECONDITION


async def test_limits_are_published(start_server: StartServer, tmp_path: Path) -> None:
    served = await start_server(job_dir=tmp_path, jobs=JobLimits(max_open_jobs=2))
    info = await served.info.GetServerInfo(server_info_pb2.GetServerInfoRequest(), timeout=WAIT_S)
    assert (info.jobs.max_open_jobs, info.jobs.keep_s) == (2, 86400.0)
    served.denoiser.gate.clear()
    for _ in range(2):
        await _submit(served)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _submit(served)
    assert refused.value.code() is StatusCode.RESOURCE_EXHAUSTED
    served.denoiser.gate.set()
