"""Uploads: from the messages of a caller to a training that waits for its turn."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress

from engine.errors import (
    Cancelled,
    ConceptExists,
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    UnknownConcept,
)
from engine.serving.runtime import Runtime
from engine.store.concept_store import ConceptStore
from engine.training.job import Job
from engine.training.spec import TrainingSpec, check_spec
from engine.training.supervisor import Supervisor
from engine.training.uploads import Upload
from engine.training.wire import spec_from_proto
from protos.oneword.v1 import training_pb2

_RETRY_UPLOAD_AFTER_S = 10.0
_REST_OF_UPLOAD_S = 1.0
Requests = AsyncIterator[training_pb2.CreateTrainingRequest]


class Intake:
    """Receives uploads, a bounded number at a time."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._uploads = 0
        self._creations: set[asyncio.Task[Job]] = set()  # asyncio itself holds no strong reference

    async def receive(self, requests: Requests, supervisor: Supervisor, tenant: str) -> Job:
        """The training of an upload; nothing stays of one that fails or breaks off."""
        with self._counted(supervisor.config.limits.max_uploads):
            upload, spec = await self._upload(requests, supervisor, tenant)
            # From here on the training comes to be, even if the caller goes away.
            creation = asyncio.create_task(supervisor.create(upload, spec, tenant))
            self._creations.add(creation)
            creation.add_done_callback(self._created)
            return await asyncio.shield(creation)

    @contextmanager
    def _counted(self, limit: int) -> Generator[None]:
        if self._uploads >= limit:
            raise QueueFull(
                f"{self._uploads} uploads are under way, the limit of this server; try again later",
                retry_after_s=_RETRY_UPLOAD_AFTER_S,
            )
        self._uploads += 1
        try:
            yield
        finally:
            self._uploads -= 1

    async def _upload(
        self, requests: Requests, supervisor: Supervisor, tenant: str
    ) -> tuple[Upload, TrainingSpec]:
        timeout_s = supervisor.config.upload_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                spec = await self._receive_spec(requests, supervisor, tenant)
                upload = await supervisor.begin_upload()
                try:
                    await self._receive_images(requests, upload)
                except BaseException:  # a caller that is gone is a CancelledError
                    self._runtime.pool.submit(upload.discard)
                    raise
                return upload, spec
        except TimeoutError:
            raise DeadlineExceeded(
                f"the upload took more than {timeout_s:g} s, the limit of this server; send "
                "smaller images"
            ) from None

    def _created(self, creation: asyncio.Task[Job]) -> None:
        self._creations.discard(creation)
        if not creation.cancelled():
            creation.exception()  # told to the caller, if it is still there

    async def _receive_spec(
        self, requests: Requests, supervisor: Supervisor, tenant: str
    ) -> TrainingSpec:
        request = await self._next(requests)
        if request is None or not request.HasField("spec"):
            raise InvalidRequest("the first message must be the spec", field="spec")
        spec = spec_from_proto(request.spec)
        check_spec(spec, supervisor.config.limits)
        supervisor.check_room(spec, tenant)
        if not spec.overwrite and not supervisor.knows(spec.request_id, tenant):
            token, store = spec.placeholder_token, self._runtime.store
            await self._runtime.in_pool(_check_free, store, token, tenant)
        return spec

    async def _receive_images(self, requests: Requests, upload: Upload) -> None:
        """Take the images up to the end, without which an upload has broken off.

        The end of the stream alone would not do: that of a call that was cancelled looks the same.
        """
        in_pool = self._runtime.in_pool
        while (request := await self._next(requests)) is not None:
            match part := request.WhichOneof("part"):
                case "image" | "mask":
                    chunk = request.image if part == "image" else request.mask
                    await in_pool(upload.add, part, chunk.file_name, chunk.offset, chunk.data)
                case "captions":
                    captions = request.captions
                    await in_pool(upload.add, part, captions.file_name, 0, captions.text.encode())
                case "end":
                    await in_pool(upload.finish, request.end.num_images)
                    return
                case _:
                    raise InvalidRequest(
                        "after the spec, each message must be a chunk of an image or mask, "
                        "captions or the end",
                        field="image",
                    )
        raise InvalidRequest("the upload broke off: it has no end; send `end` last", field="end")

    async def _next(self, requests: Requests) -> training_pb2.CreateTrainingRequest | None:
        """The next message of the caller; None at the end."""
        stall_timeout_s = self._runtime.stall_timeout_s
        try:
            async with asyncio.timeout(stall_timeout_s):
                return await anext(requests, None)
        except TimeoutError:
            raise Cancelled(
                f"nothing was sent for {stall_timeout_s:g} s; the upload was dropped"
            ) from None


@asynccontextmanager
async def read_to_the_end(requests: Requests) -> AsyncGenerator[None]:
    """Take what a caller still sends, for a moment, before it is told of an error.

    The client of grpc.aio reports INTERNAL, and not what it is told, when a call ends while it
    writes.
    """
    try:
        yield
    except Exception:
        with suppress(TimeoutError):
            async with asyncio.timeout(_REST_OF_UPLOAD_S):
                async for _ in requests:
                    pass
        raise


def _check_free(store: ConceptStore, placeholder_token: str, tenant: str) -> None:
    """Refuse a name that is taken before hours are spent on learning it."""
    try:
        stored = store.get(placeholder_token, tenant=tenant)
    except UnknownConcept:
        return
    raise ConceptExists(
        f"{placeholder_token!r} is taken by the concept {stored.concept_id[:12]}...; choose "
        "another placeholder token, or overwrite it"
    )
