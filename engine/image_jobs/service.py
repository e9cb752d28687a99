"""The servicer of the jobs: proto in, a call of the store or the runner, proto out."""

import asyncio
from collections.abc import Awaitable, Callable

from engine.errors import InvalidRequest, JobsUnavailable, ShuttingDown
from engine.image_jobs.job import ImageJob
from engine.image_jobs.runner import ImageJobRunner
from engine.requests import check_request_id
from engine.security.callers import current_caller
from engine.serving.executions import digest_of
from engine.serving.paging import checked_page_size, time_and_name, token_after
from engine.serving.service import Context, guarded, write_in_time
from engine.serving.wire import timestamp_to_proto
from protos.oneword.v1 import generation_pb2 as pb
from protos.oneword.v1 import generation_pb2_grpc

# What a message may hold beside the images.
_ROOM_BYTES = 64 << 10
_STATES: dict[str, pb.JobState.ValueType] = {
    "queued": pb.JOB_STATE_QUEUED,
    "running": pb.JOB_STATE_RUNNING,
    "cancelling": pb.JOB_STATE_CANCELLING,
    "succeeded": pb.JOB_STATE_SUCCEEDED,
    "failed": pb.JOB_STATE_FAILED,
    "cancelled": pb.JOB_STATE_CANCELLED,
}


class ImageJobService(generation_pb2_grpc.ImageJobServiceServicer):
    """Submit, watch, describe, list, cancel and delete jobs."""

    def __init__(
        self,
        runner: ImageJobRunner | None,
        pin: Callable[[pb.GenerateRequest, str], Awaitable[pb.GenerateRequest]],
        *,
        max_message_bytes: int,
        stall_timeout_s: float,
    ) -> None:
        """`pin` checks a request and writes its concepts and defaults into it.

        Without a runner every call says how to start a server that keeps jobs.
        """
        self._maybe_runner = runner
        self._pin = pin
        self._max_message_bytes = max_message_bytes
        self._stall_timeout_s = stall_timeout_s

    async def SubmitJob(
        self, request: pb.SubmitJobRequest, context: Context
    ) -> pb.SubmitJobResponse:
        async with guarded(context):
            runner, tenant, asked = self._runner(), current_caller().tenant, request.request
            check_request_id(asked.request_id)
            body = digest_of(asked)
            job = await asyncio.to_thread(
                runner.store.find_request, asked.request_id, body, tenant=tenant
            )
            if job is None:
                pinned = await self._pin(asked, tenant)
                job = await asyncio.to_thread(
                    runner.store.submit,
                    tenant=tenant,
                    request_id=asked.request_id,
                    body=body,
                    shown=_without_files(asked, pinned.seed).SerializeToString(),
                    pinned=pinned.SerializeToString(),
                    priority=asked.priority,
                )
                runner.wake()
            return pb.SubmitJobResponse(job=self._describe(job))

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        async with guarded(context):
            store = self._runner().store
            tenant = current_caller().tenant
            job = await asyncio.to_thread(store.get, request.job_id, tenant=tenant)
            response = pb.GetJobResponse(job=self._describe(job))
            if job.summary is not None:
                response.summary.ParseFromString(job.summary)
            if request.with_images:
                kept = await asyncio.to_thread(store.images, job.job_id)
                self._check_fits(sum(map(len, kept.values())))
                response.images.extend(map(pb.ImageResult.FromString, kept.values()))
            return response

    # The type stub knows only the iterator style; see ImageGenerationService.Generate.
    async def WatchJob(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: pb.WatchJobRequest, context: Context
    ) -> None:
        async with guarded(context):
            await self._watch(request, current_caller().tenant, context)

    async def CancelJob(
        self, request: pb.CancelJobRequest, context: Context
    ) -> pb.CancelJobResponse:
        async with guarded(context):
            tenant = current_caller().tenant
            job = await self._runner().cancel(request.job_id, tenant=tenant)
            return pb.CancelJobResponse(job=self._describe(job))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        async with guarded(context):
            page_size = checked_page_size(request.page_size)
            found = await asyncio.to_thread(
                self._runner().store.list,
                tenant=current_caller().tenant,
                limit=page_size + 1,
                before=time_and_name(request.page_token),
            )
            page = found[:page_size]
            more = len(found) > page_size
            return pb.ListJobsResponse(
                jobs=[self._describe(job) for job in page],
                next_page_token=token_after(page[-1].create_time, page[-1].job_id) if more else "",
            )

    async def DeleteJob(
        self, request: pb.DeleteJobRequest, context: Context
    ) -> pb.DeleteJobResponse:
        async with guarded(context):
            tenant = current_caller().tenant
            await asyncio.to_thread(self._runner().store.delete, request.job_id, tenant=tenant)
            return pb.DeleteJobResponse()

    def _runner(self) -> ImageJobRunner:
        if self._maybe_runner is None:
            raise JobsUnavailable(
                "this server keeps no jobs; start it with --job-dir, or use "
                "ImageGenerationService.Generate"
            )
        return self._maybe_runner

    async def _watch(self, request: pb.WatchJobRequest, tenant: str, context: Context) -> None:
        """Send the newest state whenever there is one, before it the images that have come."""
        runner = self._runner()
        sent: set[int] = set()
        while True:
            changed = runner.changed(request.job_id)
            job = await asyncio.to_thread(runner.store.get, request.job_id, tenant=tenant)
            if request.with_images:
                await self._send_new_images(job, sent, context)
            described = pb.WatchJobResponse(job=self._describe(job))
            await write_in_time(context, described, self._stall_timeout_s)
            if job.has_ended:
                return
            if runner.stopping:
                raise ShuttingDown(
                    "the server is shutting down; the job goes on when it is back, watch it again "
                    "then"
                )
            await changed.wait()

    async def _send_new_images(self, job: ImageJob, sent: set[int], context: Context) -> None:
        store = self._runner().store
        if (await asyncio.to_thread(store.indices, job.job_id)) <= sent:
            return
        kept = await asyncio.to_thread(store.images, job.job_id)
        for index in sorted(kept.keys() - sent):
            image = pb.WatchJobResponse(image=pb.ImageResult.FromString(kept[index]))
            await write_in_time(context, image, self._stall_timeout_s)
            sent.add(index)

    def _check_fits(self, num_bytes: int) -> None:
        if num_bytes > self._max_message_bytes - _ROOM_BYTES:
            raise InvalidRequest(
                f"the images of this job have {num_bytes} bytes, a message at most "
                f"{self._max_message_bytes}; get them one by one with WatchJob",
                field="with_images",
            )

    def _describe(self, job: ImageJob) -> pb.Job:
        runner = self._runner()
        done, total = runner.progress(job.job_id)
        ended = None if job.end_time is None else timestamp_to_proto(job.end_time)
        keep_s = runner.store.limits.keep_s
        expires = None if job.end_time is None else timestamp_to_proto(job.end_time + keep_s)
        return pb.Job(
            job_id=job.job_id,
            state=_STATES[job.status],
            request=pb.GenerateRequest.FromString(job.shown),
            create_time=timestamp_to_proto(job.create_time),
            start_time=None if job.start_time is None else timestamp_to_proto(job.start_time),
            end_time=ended,
            num_images_done=job.num_images_done,
            failure=None if job.failure is None else pb.Failure.FromString(job.failure),
            expire_time=expires,
            steps_done=done,
            num_steps=total,
        )


def _without_files(asked: pb.GenerateRequest, seed: int) -> pb.GenerateRequest:
    shown = pb.GenerateRequest()
    shown.CopyFrom(asked)
    shown.seed = seed
    shown.ClearField("init_image")
    for reference in shown.concepts:
        if reference.HasField("inline"):
            reference.inline.ClearField("content")
    return shown
