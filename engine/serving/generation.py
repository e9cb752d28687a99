"""From a request of the API to its events: planned in the pool, carried out by the batcher."""

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

from engine.batching.batcher import Finished, ImageDone, StepDone
from engine.concepts import MAX_FILE_BYTES
from engine.image_jobs.job import ImageJob
from engine.planner import Planner
from engine.requests import check_priority
from engine.serving import wire
from engine.serving.deployment import Served
from engine.serving.executions import Execution, Executions, Memory, Started, seed_of
from engine.serving.runtime import Runtime
from engine.serving.streams import EventStream
from protos.oneword.v1.generation_pb2 import (
    GenerateImagesResponse,
    GenerateRequest,
    GenerateResponse,
)


class Generation:
    """The requests of all callers, whichever call they came with."""

    def __init__(self, runtime: Runtime, memory: Memory | None = None) -> None:
        self._runtime = runtime
        self.executions = Executions(
            self._start, memory=memory, step_interval_s=runtime.progress_interval_s
        )

    async def follow(
        self,
        request: GenerateRequest,
        server_id: str,
        *,
        tenant: str,
        deadline: float | None,
        of_job: bool = False,
        follows_steps: bool = True,
    ) -> AsyncGenerator[GenerateResponse]:
        """The events of a request, to its end; leaving stops it, unless others follow it too.

        `server_id` is what the server calls the request, `deadline` a `time.monotonic()` value.
        """
        async with self.executions.reading(
            request,
            tenant=tenant,
            server_id=server_id,
            deadline=deadline,
            of_job=of_job,
            follows_steps=follows_steps,
        ) as reader:
            async for response in reader:
                yield response

    def follow_job(
        self, request: GenerateRequest, job: ImageJob
    ) -> AsyncGenerator[GenerateResponse]:
        """The events of what is left of a job."""
        unnamed = GenerateRequest()
        unnamed.CopyFrom(request)
        unnamed.ClearField("request_id")
        return self.follow(unnamed, job.job_id, tenant=job.tenant, deadline=None, of_job=True)

    async def pin(self, request: GenerateRequest, tenant: str) -> GenerateRequest:
        """Check a request as if it were carried out now, and write into it what it stands for."""
        planner = self._runtime.deployment.current.planner

        def check_and_write() -> GenerateRequest:
            replies = self._prepare(request, tenant, planner, False)
            return wire.pinned(request, replies.plan.request)

        return await self._runtime.in_pool(check_and_write)

    @asynccontextmanager
    async def _start(
        self, execution: Execution, request: GenerateRequest, events: EventStream
    ) -> AsyncGenerator[Started]:
        # Held to the end: what was planned for a model is drawn by it, whatever is deployed.
        with self._runtime.deployment.lease() as served:
            _refuse_early(served, execution, request)
            replies = await self._runtime.in_pool(
                self._prepare, request, execution.key.tenant, served.planner, execution.of_job
            )
            job = served.batcher.submit(
                replies.plan,
                events.put,
                deadline=execution.deadline,
                priority=request.priority,
                tenant=execution.key.tenant,
                may_reuse=request.HasField("seed"),
            )
            yield Started(
                cancel=job.cancel,
                set_deadline=partial(served.batcher.set_deadline, job),
                accepted=replies.accepted(execution.name, job.queue_position),
                reply=partial(self._reply, replies),
            )

    def _prepare(
        self, request: GenerateRequest, tenant: str, planner: Planner, trusted: bool
    ) -> wire.Replies:
        check_priority(request.priority)
        limits = planner.limits
        if trusted:  # a stored concept may be larger than one that is sent along
            limits = dataclasses.replace(limits, max_inline_concept_bytes=2 * MAX_FILE_BYTES)
        image_format = wire.image_format_from_proto(request.image_format)
        domain_request = wire.request_from_proto(
            request,
            store=self._runtime.store,
            limits=limits,
            tenant=tenant,
            packed_concepts=planner.packed_concepts,
            default_seed=seed_of(tenant, request.request_id) if request.request_id else None,
        )
        return wire.Replies(
            plan=planner.plan(domain_request),
            model_name=planner.bundle.manifest.model_name,
            image_format=image_format,
        )

    async def _reply(
        self, replies: wire.Replies, event: StepDone | ImageDone | Finished
    ) -> GenerateResponse:
        match event:
            case StepDone(preview=None):  # nothing to encode: not worth a change of threads
                return replies.progress(event)
            case StepDone():
                return await self._runtime.in_pool(replies.progress, event)
            case ImageDone():
                return await self._runtime.in_pool(replies.image, event)
            case Finished(timings=timings):
                return replies.summary(timings)


def _refuse_early(served: Served, execution: Execution, request: GenerateRequest) -> None:
    """Before any work goes into a request: raise if there is no room or no time for it.

    Here on the event loop, since it is quicker than to hand it to a thread.
    """
    if served.batcher.may_reuse and request.HasField("seed"):
        return  # its images may be there already
    multiple = served.planner.bundle.manifest.latents.size_multiple
    served.batcher.check_early(
        served.planner.outline(wire.outline_from_proto(request, multiple)),
        deadline=execution.deadline,
        priority=request.priority,
        tenant=execution.key.tenant,
    )


def collect(answer: GenerateImagesResponse, response: GenerateResponse) -> None:
    """Add one event to the answer that has all of them."""
    match response.WhichOneof("event"):
        case "accepted":
            answer.accepted.CopyFrom(response.accepted)
        case "image":
            answer.images.append(response.image)
            answer.images.sort(key=lambda image: image.image_index)
        case "summary":
            answer.summary.CopyFrom(response.summary)
        case _:
            pass
