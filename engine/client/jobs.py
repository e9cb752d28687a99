"""Jobs from a script, the part of both clients that nobody waits for: submit, watch, fetch."""

from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any, TypeAlias

from grpc import StatusCode

from engine.client.calls import PAGE_SIZE, Call, Page, Stubs, named_request
from engine.client.errors import ServerError, error_of_failure
from engine.client.generation import Collected
from engine.client.link import AsyncLink, Link
from protos.oneword.v1 import generation_pb2
from protos.oneword.v1.generation_pb2 import (
    GenerateRequest,
    GetJobResponse,
    ImageResult,
    Job,
    Summary,
    WatchJobRequest,
    WatchJobResponse,
)

JobEvent: TypeAlias = Job | ImageResult
ENDED = (
    generation_pb2.JOB_STATE_SUCCEEDED,
    generation_pb2.JOB_STATE_FAILED,
    generation_pb2.JOB_STATE_CANCELLED,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """A job that has succeeded: its images in the order of their seeds."""

    job: Job
    images: list[bytes]  # files in the format asked for
    summary: Summary


class WatchJobStream:
    """A job until it has ended, watched again wherever the server was stopped meanwhile."""

    patient = True

    def __init__(self, job_id: str, *, with_images: bool) -> None:
        self.ended = False
        self.gains = 0
        self._request = WatchJobRequest(job_id=job_id, with_images=with_images)
        self._last: Job | None = None
        self._images: set[int] = set()

    def method(self, stubs: Stubs) -> Any:
        return stubs.jobs.WatchJob

    def request(self) -> WatchJobRequest:
        return self._request

    def read(self, response: WatchJobResponse) -> Iterable[JobEvent]:
        if response.HasField("image"):
            if response.image.image_index in self._images:
                return ()
            self._images.add(response.image.image_index)
            self.gains += 1
            return (response.image,)
        if not response.HasField("job") or response.job == self._last:
            return ()
        self._last = response.job
        self.ended = response.job.state in ENDED
        self.gains += 1
        return (response.job,)

    def cut_short(self) -> ServerError | None:
        return watch_broke()


def watch_broke() -> ServerError:
    """A stream of states that ended before what it tells of has."""
    message = "the server ended the stream too early; watch again"
    return ServerError(StatusCode.UNAVAILABLE, message, transient=True)


class _Waiting:
    """The events of a job, becoming its result."""

    def __init__(self, job_id: str) -> None:
        self._job = Job(job_id=job_id)
        self._collected = Collected()

    def add(self, event: JobEvent) -> None:
        if isinstance(event, Job):
            self._job = event
        else:
            self._collected.add(event)

    def result(self, summary: Summary) -> JobResult:
        collected = self._collected.add(summary)
        assert collected is not None  # a summary is the end
        return JobResult(job=self._job, images=collected.images, summary=summary)

    def check(self) -> None:
        """Raise what the job has ended with, unless it has succeeded."""
        if self._job.state == generation_pb2.JOB_STATE_FAILED:
            raise error_of_failure(self._job.failure)
        if self._job.state != generation_pb2.JOB_STATE_SUCCEEDED:
            raise ServerError(StatusCode.CANCELLED, f"job {self._job.job_id} was cancelled")


def submit_job(request: GenerateRequest) -> Call[Job]:
    message = generation_pb2.SubmitJobRequest(request=request)
    return Call(
        method=lambda stubs: stubs.jobs.SubmitJob,
        request=lambda: message,
        read=lambda reply: reply.job,
    )


def get_job(job_id: str, *, with_images: bool) -> Call[GetJobResponse]:
    message = generation_pb2.GetJobRequest(job_id=job_id, with_images=with_images)
    return Call(
        method=lambda stubs: stubs.jobs.GetJob, request=lambda: message, read=lambda reply: reply
    )


def cancel_job(job_id: str) -> Call[Job]:
    message = generation_pb2.CancelJobRequest(job_id=job_id)
    return Call(
        method=lambda stubs: stubs.jobs.CancelJob,
        request=lambda: message,
        read=lambda reply: reply.job,
    )


def list_jobs(page_token: str) -> Call[Page[Job]]:
    message = generation_pb2.ListJobsRequest(page_size=PAGE_SIZE, page_token=page_token)
    return Call(
        method=lambda stubs: stubs.jobs.ListJobs,
        request=lambda: message,
        read=lambda reply: Page(reply.jobs, reply.next_page_token),
    )


def delete_job(job_id: str) -> Call[None]:
    message = generation_pb2.DeleteJobRequest(job_id=job_id)
    return Call(
        method=lambda stubs: stubs.jobs.DeleteJob,
        request=lambda: message,
        read=lambda _reply: None,
        removes=True,
    )


class JobsClient:
    """The jobs of one server, as `Client.jobs`. Every method raises `ServerError`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def submit(self, request: GenerateRequest | None = None, **fields: Any) -> Job:
        """Queue a request, or the fields of one. With the same `request_id`: the same job."""
        return self._link.call(submit_job(named_request(request, fields)))

    def get(self, job_id: str, *, with_images: bool = False) -> GetJobResponse:
        """Describe a job; with its images as far as they are done and fit into a message."""
        return self._link.call(get_job(job_id, with_images=with_images))

    def watch(
        self, job_id: str, *, with_images: bool = False, timeout_s: float | None = None
    ) -> Generator[JobEvent]:
        """A job now and whenever it has changed, and its images, each once, until it has ended.

        Goes on after a server was away for at most `RetryPolicy.max_outage_s`. Without `timeout_s`
        there is no deadline.
        """
        return self._link.stream(WatchJobStream(job_id, with_images=with_images), timeout_s)

    def wait(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        on_change: Callable[[Job], None] = lambda _job: None,
    ) -> JobResult:
        """Wait for a job as `watch` does; raises what it has failed with."""
        waiting = _Waiting(job_id)
        with closing(self.watch(job_id, with_images=True, timeout_s=timeout_s)) as events:
            for event in events:
                waiting.add(event)
                if isinstance(event, Job):
                    on_change(event)
        waiting.check()
        return waiting.result(self.get(job_id).summary)

    def cancel(self, job_id: str) -> Job:
        """Ask a job to stop."""
        return self._link.call(cancel_job(job_id))

    def list(self) -> Generator[Job]:
        """All jobs, the latest first, fetched page by page."""
        return self._link.pages(list_jobs)

    def delete(self, job_id: str) -> None:
        """Forget a job that has ended, and its images."""
        self._link.call(delete_job(job_id))


class AsyncJobsClient:
    """The same under asyncio, as `AsyncClient.jobs`."""

    def __init__(self, link: AsyncLink) -> None:
        self._link = link

    async def submit(self, request: GenerateRequest | None = None, **fields: Any) -> Job:
        return await self._link.call(submit_job(named_request(request, fields)))

    async def get(self, job_id: str, *, with_images: bool = False) -> GetJobResponse:
        return await self._link.call(get_job(job_id, with_images=with_images))

    def watch(
        self, job_id: str, *, with_images: bool = False, timeout_s: float | None = None
    ) -> AsyncGenerator[JobEvent]:
        """As `JobsClient.watch`; close it (`contextlib.aclosing`) where it is left early."""
        return self._link.stream(WatchJobStream(job_id, with_images=with_images), timeout_s)

    async def wait(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        on_change: Callable[[Job], None] = lambda _job: None,
    ) -> JobResult:
        waiting = _Waiting(job_id)
        async with aclosing(self.watch(job_id, with_images=True, timeout_s=timeout_s)) as events:
            async for event in events:
                waiting.add(event)
                if isinstance(event, Job):
                    on_change(event)
        waiting.check()
        return waiting.result((await self.get(job_id)).summary)

    async def cancel(self, job_id: str) -> Job:
        return await self._link.call(cancel_job(job_id))

    def list(self) -> AsyncGenerator[Job]:
        return self._link.pages(list_jobs)

    async def delete(self, job_id: str) -> None:
        await self._link.call(delete_job(job_id))
