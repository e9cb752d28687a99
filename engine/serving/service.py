"""The servicers: proto in, domain call, proto out.

No model call, tokenizing, picture coding or disk access runs on the event loop: a small pool of
threads does the host work, the batcher's worker owns the device.
"""

import asyncio
import importlib.metadata
import logging
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import grpc.aio
from google.protobuf.message import Message

from engine.errors import Cancelled
from engine.faults import log_fault
from engine.image_jobs.job import JobLimits
from engine.operations.calls import current_request_id
from engine.operations.load_wire import load_to_proto
from engine.operations.operations import Operations
from engine.prompt_syntax import MAX_PROMPT_CHARACTERS
from engine.requests import MAX_PRIORITY, MAX_REQUEST_ID_CHARACTERS
from engine.samplers import MAX_INFERENCE_STEPS
from engine.security.callers import current_caller
from engine.security.handlers import end_with, unless_gone
from engine.serving.batch_calls import MAX_BATCH_REQUESTS, Follow, answer_batch, check_batch
from engine.serving.generation import Generation, collect
from engine.serving.runtime import Runtime
from engine.serving.status import is_internal, status_of
from engine.training.config import TrainingConfig
from engine.training.wire import limits_to_proto
from protos.oneword.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    server_info_pb2,
    server_info_pb2_grpc,
)

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = Any  # what grpc.aio passes is a class of its own that does not derive from it


@asynccontextmanager
async def guarded(context: Context) -> AsyncGenerator[str]:
    """One call: gives it a request id, and turns what it raises into a status.

    `CancelledError` passes: swallowing it would leak the call's state in grpc.aio.
    """
    request_id = current_request_id()
    try:
        yield request_id
    except Exception as error:
        if is_internal(error):
            log_fault(logger, error, "request %s failed", request_id)
        status = status_of(error, request_id)
        await end_with(context, status)


async def write_in_time(context: Context, response: Message, stall_timeout_s: float) -> None:
    """Send a message of a stream; a caller that does not take it in time is dropped."""
    try:
        async with asyncio.timeout(stall_timeout_s):
            with unless_gone():
                await context.write(response)
    except TimeoutError:
        raise Cancelled(
            f"nothing was read for {stall_timeout_s:g} s; the request was dropped"
        ) from None


class ImageGenerationService(generation_pb2_grpc.ImageGenerationServiceServicer):
    """Images from prompts, for callers who wait."""

    def __init__(self, runtime: Runtime, generation: Generation) -> None:
        self._runtime = runtime
        self._generation = generation
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    # The stub's type knows only the iterator style; grpc.aio also takes a coroutine that writes,
    # whose `finally` runs at once when the call is cancelled.
    async def Generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> None:
        async with guarded(context) as request_id, self._following(context) as follow:
            async with aclosing(follow(request, request_id)) as responses:
                async for response in responses:
                    await write_in_time(context, response, self._runtime.stall_timeout_s)

    async def GenerateImages(
        self, request: generation_pb2.GenerateImagesRequest, context: Context
    ) -> generation_pb2.GenerateImagesResponse:
        async with (
            guarded(context) as request_id,
            self._following(context, follows_steps=False) as follow,
        ):
            answer = generation_pb2.GenerateImagesResponse()
            async with aclosing(follow(request.request, request_id)) as responses:
                async for response in responses:
                    collect(answer, response)
            return answer

    async def GenerateBatch(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: generation_pb2.GenerateBatchRequest, context: Context
    ) -> None:
        async with guarded(context) as request_id, self._following(context) as follow:
            check_batch(request)
            await answer_batch(
                request.requests,
                follow,
                lambda event: write_in_time(context, event, self._runtime.stall_timeout_s),
                server_id=request_id,
            )

    async def drain(self, grace_s: float) -> None:
        """Wait for the requests under way, at most `grace_s`; new ones are refused before here."""
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests were not done within %g s", self._active, grace_s)

    @property
    def active(self) -> int:
        """Requests under way."""
        return self._active

    @asynccontextmanager
    async def _following(
        self, context: Context, *, follows_steps: bool = True
    ) -> AsyncGenerator[Follow]:
        """A way to follow requests of this call, which counts as under way."""
        with self._counted():
            yield partial(
                self._generation.follow,
                tenant=current_caller().tenant,
                deadline=deadline_of(context),
                follows_steps=follows_steps,
            )

    @contextmanager
    def _counted(self) -> Generator[None]:
        self._active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()


def deadline_of(context: Context) -> float | None:
    """A `time.monotonic()` value."""
    # None without a deadline, whatever the type stub says.
    remaining_s = cast("float | None", context.time_remaining())
    return None if remaining_s is None else time.monotonic() + remaining_s


class ServerInfoService(server_info_pb2_grpc.ServerInfoServiceServicer):
    """What this server is and how busy it is."""

    def __init__(
        self,
        runtime: Runtime,
        generation: Generation,
        operations: Operations,
        *,
        max_message_bytes: int,
        training: TrainingConfig | None = None,
        jobs: JobLimits | None = None,
    ) -> None:
        """`training` is None where words are not learned, `jobs` where none are kept."""
        self._runtime = runtime
        self._memory = generation.executions.memory
        self._operations = operations
        self._max_message_bytes = max_message_bytes
        self._training = training
        self._jobs = jobs

    async def GetServerInfo(
        self, request: server_info_pb2.GetServerInfoRequest, context: Context
    ) -> server_info_pb2.GetServerInfoResponse:
        async with guarded(context):
            load = await self._runtime.in_pool(
                load_to_proto, self._operations.observation, self._runtime.batcher.load
            )
            return server_info_pb2.GetServerInfoResponse(
                model=self._model(),
                limits=self._limits(),
                load=load,
                serving=self._operations.health.serving,
                versions=self._versions(),
                training=None if self._training is None else limits_to_proto(self._training),
                jobs=None if self._jobs is None else job_limits_to_proto(self._jobs),
            )

    def _model(self) -> server_info_pb2.ModelInfo:
        manifest = self._runtime.pipeline.bundle.manifest
        return server_info_pb2.ModelInfo(
            name=manifest.model_name,
            precision=manifest.precision,
            prediction_type=manifest.prediction_type,
            embedding_fingerprint=manifest.text.embedding_fingerprint,
            embedding_dim=manifest.text.dim,
            samplers=sorted(self._runtime.pipeline.bundle.sampler_tables),
            default_size=manifest.latents.default_size,
            size_multiple=manifest.latents.size_multiple,
            max_tokens=manifest.text.max_tokens,
        )

    def _limits(self) -> server_info_pb2.RequestLimits:
        limits = self._runtime.pipeline.limits
        return server_info_pb2.RequestLimits(
            max_images_per_request=limits.max_images_per_request,
            max_side=limits.max_side,
            max_pixels=limits.max_pixels or 0,  # a pipeline has settled it
            max_inline_concept_bytes=limits.max_inline_concept_bytes,
            max_concepts_per_request=limits.max_concepts_per_request,
            max_prompt_characters=MAX_PROMPT_CHARACTERS,
            max_inference_steps=MAX_INFERENCE_STEPS,
            max_queued_images=self._runtime.batcher.config.max_queued_images,
            max_batch_requests=MAX_BATCH_REQUESTS,
            max_priority=MAX_PRIORITY,
            max_request_id_characters=MAX_REQUEST_ID_CHARACTERS,
            request_id_memory_s=self._memory.seconds,
            max_message_bytes=self._max_message_bytes,
        )

    def _versions(self) -> dict[str, str]:
        exported_with = self._runtime.pipeline.bundle.manifest.versions
        return {**exported_with, "oneword": importlib.metadata.version("oneword")}


def job_limits_to_proto(limits: JobLimits) -> server_info_pb2.JobLimits:
    return server_info_pb2.JobLimits(
        max_open_jobs=limits.max_open_jobs,
        keep_s=limits.keep_s,
        max_kept_bytes=limits.max_kept_bytes,
    )
