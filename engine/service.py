"""The servicers: proto in, domain call, proto out.

No model call, tokenizing, picture coding or disk access runs on the event loop: a small pool of
threads does the host work, the batcher's worker owns the device.
"""

import asyncio
import importlib.metadata
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import grpc.aio
from google.protobuf.message import Message

from engine import wire
from engine.batcher import Batcher, Failed, Finished, ImageDone, StepDone
from engine.deployment import Deployment, Served
from engine.errors import Cancelled, ShuttingDown
from engine.planner import Planner
from engine.prompt_syntax import MAX_PROMPT_CHARACTERS
from engine.samplers import MAX_INFERENCE_STEPS
from engine.status import is_internal, status_of
from engine.store import ConceptStore
from engine.streams import EventStream
from engine.training_config import TrainingConfig
from engine.training_wire import limits_to_proto
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
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What the servicers share."""

    deployment: Deployment
    store: ConceptStore
    pool: Executor  # for host work
    stall_timeout_s: float = 60.0  # a caller that reads nothing for so long is dropped

    @property
    def pipeline(self) -> Planner:
        """The planning half of the model in service; to plan a request for it, take a lease."""
        return self.deployment.current.planner

    @property
    def batcher(self) -> Batcher:
        """Of the model in service; to submit a request to it, take a lease."""
        return self.deployment.current.batcher

    async def in_pool(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, lambda: function(*args, **kwargs))


@asynccontextmanager
async def guarded(context: Context) -> AsyncGenerator[str]:
    """One call: gives it a request id, and turns what it raises into a status.

    `CancelledError` passes: swallowing it would leak the call's state in grpc.aio.
    """
    request_id = uuid.uuid4().hex
    try:
        yield request_id
    except Exception as error:
        if is_internal(error):
            logger.exception("request %s failed", request_id)
        status = status_of(error, request_id)
        await context.abort(status.code, status.details or "", status.trailing_metadata or ())


async def write_in_time(context: Context, response: Message, stall_timeout_s: float) -> None:
    """Send a message of a stream; a caller that does not take it in time is dropped."""
    try:
        async with asyncio.timeout(stall_timeout_s):
            await context.write(response)
    except TimeoutError:
        raise Cancelled(
            f"nothing was read for {stall_timeout_s:g} s; the request was dropped"
        ) from None


class ImageGenerationService(generation_pb2_grpc.ImageGenerationServiceServicer):
    """Images from prompts, streamed."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._draining = False
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    # The stub's type knows only the iterator style; grpc.aio also takes a coroutine that writes,
    # whose `finally` runs at once when the call is cancelled.
    async def Generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> None:
        async with guarded(context) as request_id:
            with self._counted(), self._runtime.deployment.lease() as served:
                await self._generate(request, context, request_id, served)

    async def drain(self, grace_s: float) -> None:
        """Take no new requests and wait for those under way, at most `grace_s`."""
        self._draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests were not done within %g s", self._active, grace_s)

    @property
    def active(self) -> int:
        """Requests under way."""
        return self._active

    @contextmanager
    def _counted(self) -> Generator[None]:
        if self._draining:
            raise ShuttingDown("the server is shutting down; send the request to another one")
        self._active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def _generate(
        self,
        request: generation_pb2.GenerateRequest,
        context: Context,
        request_id: str,
        served: Served,
    ) -> None:
        deadline = _deadline(context)
        replies = await self._runtime.in_pool(self._prepare, request, served.planner)
        events = EventStream(asyncio.get_running_loop())
        job = served.batcher.submit(replies.plan, events.put, deadline=deadline)
        try:
            accepted = replies.accepted(request_id, job.queue_position)
            await write_in_time(context, accepted, self._runtime.stall_timeout_s)
            await self._forward(events, replies, context)
        finally:
            job.cancel()

    def _prepare(self, request: generation_pb2.GenerateRequest, planner: Planner) -> wire.Replies:
        image_format = wire.image_format_from_proto(request.image_format)
        domain_request = wire.request_from_proto(
            request, store=self._runtime.store, limits=planner.limits
        )
        return wire.Replies(
            plan=planner.plan(domain_request),
            model_name=planner.bundle.manifest.model_name,
            image_format=image_format,
        )

    async def _forward(self, events: EventStream, replies: wire.Replies, context: Context) -> None:
        while True:
            event = await events.get()
            if isinstance(event, Failed):
                raise event.error
            reply = await self._reply(replies, event)
            await write_in_time(context, reply, self._runtime.stall_timeout_s)
            if isinstance(event, Finished):
                return

    async def _reply(
        self, replies: wire.Replies, event: StepDone | ImageDone | Finished
    ) -> generation_pb2.GenerateResponse:
        match event:
            case StepDone(preview=None):  # nothing to encode: not worth a change of threads
                return replies.progress(event)
            case StepDone():
                return await self._runtime.in_pool(replies.progress, event)
            case ImageDone():
                return await self._runtime.in_pool(replies.image, event)
            case Finished(timings=timings):
                return replies.summary(timings)


def _deadline(context: Context) -> float | None:
    # None without a deadline, whatever the type stub says.
    remaining_s = cast("float | None", context.time_remaining())
    return None if remaining_s is None else time.monotonic() + remaining_s


class ServerInfoService(server_info_pb2_grpc.ServerInfoServiceServicer):
    """What this server is and how busy it is."""

    def __init__(self, runtime: Runtime, training: TrainingConfig | None = None) -> None:
        """`training` is None where words are not learned."""
        self._runtime = runtime
        self._training = training

    async def GetServerInfo(
        self, request: server_info_pb2.GetServerInfoRequest, context: Context
    ) -> server_info_pb2.GetServerInfoResponse:
        async with guarded(context):
            in_flight, queued = self._runtime.batcher.load
            return server_info_pb2.GetServerInfoResponse(
                model=self._model(),
                limits=self._limits(),
                load=server_info_pb2.Load(images_in_flight=in_flight, images_queued=queued),
                versions=self._versions(),
                training=None if self._training is None else limits_to_proto(self._training),
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
        )

    def _versions(self) -> dict[str, str]:
        exported_with = self._runtime.pipeline.bundle.manifest.versions
        return {**exported_with, "oneword": importlib.metadata.version("oneword")}
