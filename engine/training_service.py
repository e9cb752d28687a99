"""The servicer of the trainings: proto in, a call of the supervisor, proto out."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from engine.concepts import check_fits, concept_from_bytes, read_concept_file
from engine.errors import (
    Cancelled,
    ConceptExists,
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    ShuttingDown,
    TrainingUnavailable,
    UnknownConcept,
)
from engine.paging import checked_page_size, key_of, page_token
from engine.pipeline import Pipeline
from engine.service import Context, Runtime, guarded, write_in_time
from engine.store import ConceptStore
from engine.training_folder import TrainingFolder, storage_errors
from engine.training_model import TrainableModel
from engine.training_spec import TrainingSpec, check_spec
from engine.training_supervisor import Job, Supervisor
from engine.training_uploads import Upload
from engine.training_wire import spec_from_proto, training_to_proto
from protos.oneword.v1 import training_pb2, training_pb2_grpc

logger = logging.getLogger(__name__)

_RETRY_UPLOAD_AFTER_S = 10.0
_REST_OF_UPLOAD_S = 1.0
Requests = AsyncIterator[training_pb2.CreateTrainingRequest]


class TrainingService(training_pb2_grpc.TrainingServiceServicer):
    """Create, watch, describe, list, cancel and delete trainings."""

    def __init__(
        self,
        runtime: Runtime,
        supervisor: Supervisor | None = None,
        model: TrainableModel | None = None,
    ) -> None:
        """Without a supervisor every call says how to start a server that learns."""
        self._runtime = runtime
        self._supervisor = supervisor
        self._model = model
        self._uploads = 0
        self._creations: set[asyncio.Task[Job]] = set()  # asyncio itself holds no strong reference

    async def start(self) -> bool:
        """Take up the trainings of earlier; returns whether words can be learned here."""
        if self._supervisor is None:
            return False
        await self._supervisor.load()
        try:
            await self._check_model()
        except TrainingUnavailable as error:
            logger.warning("%s", error)
            return False
        self._supervisor.launch()
        return True

    async def stop(self) -> None:
        """Let what learns save and end; it goes on when a server is back."""
        if self._supervisor is not None:
            await self._supervisor.stop()

    # The type stub knows only the blocking style.
    async def CreateTraining(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request_iterator: Requests, context: Context
    ) -> training_pb2.CreateTrainingResponse:
        async with guarded(context), _read_to_the_end(request_iterator):
            supervisor = self._learner()
            await self._check_model()
            with self._counted_upload(supervisor):
                job = await self._receive(request_iterator, supervisor)
            return training_pb2.CreateTrainingResponse(training=self._describe(job))

    async def GetTraining(
        self, request: training_pb2.GetTrainingRequest, context: Context
    ) -> training_pb2.GetTrainingResponse:
        async with guarded(context):
            job = self._learner().get(request.training_id)
            return training_pb2.GetTrainingResponse(
                training=self._describe(job),
                concept_file=await self._result(job),
            )

    # The type stub knows only the iterator style; see ImageGenerationService.Generate.
    async def WatchTraining(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: training_pb2.WatchTrainingRequest, context: Context
    ) -> None:
        async with guarded(context):
            supervisor = self._learner()
            await self._watch(supervisor, supervisor.get(request.training_id), context)

    async def CancelTraining(
        self, request: training_pb2.CancelTrainingRequest, context: Context
    ) -> training_pb2.CancelTrainingResponse:
        async with guarded(context):
            job = await self._learner().cancel(request.training_id)
            return training_pb2.CancelTrainingResponse(training=self._describe(job))

    async def ListTrainings(
        self, request: training_pb2.ListTrainingsRequest, context: Context
    ) -> training_pb2.ListTrainingsResponse:
        async with guarded(context):
            page_size = checked_page_size(request.page_size)
            before = _list_key(key_of(request.page_token))
            jobs = sorted(self._learner().jobs, key=_key, reverse=True)
            found = [job for job in jobs if before is None or _key(job) < before]
            page = found[:page_size]
            return training_pb2.ListTrainingsResponse(
                trainings=[self._describe(job) for job in page],
                next_page_token=_list_token(page[-1]) if len(found) > page_size else "",
            )

    async def DeleteTraining(
        self, request: training_pb2.DeleteTrainingRequest, context: Context
    ) -> training_pb2.DeleteTrainingResponse:
        async with guarded(context):
            await self._learner().delete(request.training_id)
            return training_pb2.DeleteTrainingResponse()

    def _learner(self) -> Supervisor:
        if self._supervisor is None:
            raise TrainingUnavailable(
                "this server does not learn words; start it with --training-model DIFFUSERS_DIR, "
                "the model that its bundle was built from"
            )
        return self._supervisor

    async def _check_model(self) -> None:
        if self._model is not None:
            await asyncio.to_thread(self._model.check)

    def _describe(self, job: Job) -> training_pb2.Training:
        return training_to_proto(job, self._learner().queue_position(job))

    async def _result(self, job: Job) -> bytes:
        if not job.state.has_ended:
            return b""
        return await asyncio.to_thread(_read_if_there, job.folder.concept)

    @contextmanager
    def _counted_upload(self, supervisor: Supervisor) -> Generator[None]:
        limit = supervisor.config.limits.max_uploads
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

    async def _receive(self, requests: Requests, supervisor: Supervisor) -> Job:
        """The training of an upload; nothing stays of one that fails or breaks off."""
        timeout_s = supervisor.config.upload_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                spec = await self._receive_spec(requests, supervisor)
                upload = await supervisor.begin_upload()
                try:
                    await self._receive_images(requests, upload)
                except BaseException:  # a caller that is gone is a CancelledError
                    self._runtime.pool.submit(upload.discard)
                    raise
        except TimeoutError:
            raise DeadlineExceeded(
                f"the upload took more than {timeout_s:g} s, the limit of this server; send "
                "smaller images"
            ) from None
        # From here on the training comes to be, even if the caller goes away.
        creation = asyncio.create_task(supervisor.create(upload, spec))
        self._creations.add(creation)
        creation.add_done_callback(self._created)
        return await asyncio.shield(creation)

    def _created(self, creation: asyncio.Task[Job]) -> None:
        self._creations.discard(creation)
        if not creation.cancelled():
            creation.exception()  # told to the caller, if it is still there

    async def _receive_spec(self, requests: Requests, supervisor: Supervisor) -> TrainingSpec:
        request = await self._next(requests)
        if request is None or not request.HasField("spec"):
            raise InvalidRequest("the first message must be the spec", field="spec")
        spec = spec_from_proto(request.spec)
        check_spec(spec, supervisor.config.limits)
        supervisor.check_room(spec)
        if not spec.overwrite and not supervisor.knows(spec.request_id):
            await self._runtime.in_pool(_check_free, self._runtime.store, spec.placeholder_token)
        return spec

    async def _receive_images(self, requests: Requests, upload: Upload) -> None:
        """Take the images up to the end, without which an upload has broken off.

        The end of the stream alone would not do: that of a call that was cancelled looks the same.
        """
        while (request := await self._next(requests)) is not None:
            match request.WhichOneof("part"):
                case "image":
                    chunk = request.image
                    await self._runtime.in_pool(
                        upload.add, chunk.file_name, chunk.offset, chunk.data
                    )
                case "end":
                    await self._runtime.in_pool(upload.finish, request.end.num_images)
                    return
                case _:
                    raise InvalidRequest(
                        "after the spec, each message must be a chunk of an image or the end",
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

    async def _watch(self, supervisor: Supervisor, job: Job, context: Context) -> None:
        """Send the newest state whenever there is one; what came while one was sent is skipped."""
        preview_step = 0
        while True:
            changed, state = job.changed, job.state
            response = training_pb2.WatchTrainingResponse(training=self._describe(job))
            if state.progress and state.progress.preview_step not in (0, preview_step):
                preview_step = state.progress.preview_step
                response.preview = await asyncio.to_thread(_read_if_there, job.folder.preview)
            await write_in_time(context, response, self._runtime.stall_timeout_s)
            if state.has_ended:
                return
            if supervisor.stopping:
                raise ShuttingDown(
                    "the server is shutting down; the training goes on when it is back, watch it "
                    "again then"
                )
            await changed.wait()


@asynccontextmanager
async def _read_to_the_end(requests: Requests) -> AsyncGenerator[None]:
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


def publish(
    folder: TrainingFolder, spec: TrainingSpec, pipeline: Pipeline, store: ConceptStore
) -> str:
    """Store the concept of a training as an import would; returns its id."""
    content = read_concept_file(folder.concept)
    concept = concept_from_bytes(content, source="the learned concept")
    manifest = pipeline.bundle.manifest
    check_fits(concept, manifest.text, text_2=manifest.text_2, model_name=manifest.model_name)
    stored, _ = store.import_concept(concept, overwrite=spec.overwrite)
    return stored.concept_id


def _check_free(store: ConceptStore, placeholder_token: str) -> None:
    """Refuse a name that is taken before hours are spent on learning it."""
    try:
        stored = store.get(placeholder_token)
    except UnknownConcept:
        return
    raise ConceptExists(
        f"{placeholder_token!r} is taken by the concept {stored.concept_id[:12]}...; choose "
        "another placeholder token, or overwrite it"
    )


def _read_if_there(path: Path) -> bytes:
    with storage_errors(), suppress(FileNotFoundError):  # or the training was deleted meanwhile
        return path.read_bytes()
    return b""


def _key(job: Job) -> tuple[float, str]:
    return job.record.create_time, job.training_id


def _list_token(last: Job) -> str:
    create_time, training_id = _key(last)
    return page_token(f"{create_time!r} {training_id}")


def _list_key(key: str) -> tuple[float, str] | None:
    if not key:
        return None
    create_time, _, training_id = key.partition(" ")
    try:
        return float(create_time), training_id
    except ValueError as error:
        raise InvalidRequest(
            "page_token is not one of ListTrainings; pass next_page_token on as it is",
            field="page_token",
        ) from error
