"""The servicer of the trainings: proto in, a call of the supervisor, proto out."""

import asyncio
import logging
from contextlib import suppress
from pathlib import Path

from engine.concepts import check_fits, concept_from_bytes, read_concept_file
from engine.errors import ShuttingDown, TrainingUnavailable
from engine.security.callers import current_caller
from engine.serving.paging import checked_page_size, time_and_name, token_after
from engine.serving.runtime import Runtime
from engine.serving.service import Context, guarded, write_in_time
from engine.training.config import TrainingConfig
from engine.training.folder import TrainingFolder, TrainingRecord, storage_errors
from engine.training.intake import Intake, Requests, read_to_the_end
from engine.training.job import Job
from engine.training.model import TrainableModel
from engine.training.supervisor import Supervisor
from engine.training.wire import training_to_proto
from protos.oneword.v1 import training_pb2, training_pb2_grpc

logger = logging.getLogger(__name__)


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
        self._intake = Intake(runtime)

    @property
    def config(self) -> TrainingConfig | None:
        """What this server is told about learning; None where it does not learn."""
        return self._supervisor.config if self._supervisor is not None else None

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
        async with guarded(context), read_to_the_end(request_iterator):
            supervisor, tenant = self._learner(), current_caller().tenant
            await self._check_model()
            job = await self._intake.receive(request_iterator, supervisor, tenant)
            return training_pb2.CreateTrainingResponse(training=self._describe(job))

    async def GetTraining(
        self, request: training_pb2.GetTrainingRequest, context: Context
    ) -> training_pb2.GetTrainingResponse:
        async with guarded(context):
            job = self._learner().get(request.training_id, current_caller().tenant)
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
            job = supervisor.get(request.training_id, current_caller().tenant)
            await self._watch(supervisor, job, context)

    async def CancelTraining(
        self, request: training_pb2.CancelTrainingRequest, context: Context
    ) -> training_pb2.CancelTrainingResponse:
        async with guarded(context):
            job = await self._learner().cancel(request.training_id, current_caller().tenant)
            return training_pb2.CancelTrainingResponse(training=self._describe(job))

    async def ListTrainings(
        self, request: training_pb2.ListTrainingsRequest, context: Context
    ) -> training_pb2.ListTrainingsResponse:
        async with guarded(context):
            page_size = checked_page_size(request.page_size)
            before = time_and_name(request.page_token)
            jobs = sorted(self._learner().jobs_of(current_caller().tenant), key=_key, reverse=True)
            found = [job for job in jobs if before is None or _key(job) < before]
            page = found[:page_size]
            return training_pb2.ListTrainingsResponse(
                trainings=[self._describe(job) for job in page],
                next_page_token=token_after(*_key(page[-1])) if len(found) > page_size else "",
            )

    async def DeleteTraining(
        self, request: training_pb2.DeleteTrainingRequest, context: Context
    ) -> training_pb2.DeleteTrainingResponse:
        async with guarded(context):
            await self._learner().delete(request.training_id, current_caller().tenant)
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

    async def _watch(self, supervisor: Supervisor, job: Job, context: Context) -> None:
        """Send the newest state whenever there is one; what came while one was sent is skipped."""
        preview_step = 0
        while True:
            changed, state = job.changed, job.state
            response = training_pb2.WatchTrainingResponse(training=self._describe(job))
            if state.progress and state.progress.preview_step not in (0, preview_step):
                preview_step = response.preview_step = state.progress.preview_step
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


def publish(folder: TrainingFolder, record: TrainingRecord, runtime: Runtime) -> str:
    """Store the concept of a training as an import of its tenant would; returns its id.

    It must fit the bundle that is in service by now, which may be another one than it began with.
    """
    content = read_concept_file(folder.concept)
    concept = concept_from_bytes(content, source="the learned concept")
    manifest = runtime.pipeline.bundle.manifest
    check_fits(concept, manifest.text, text_2=manifest.text_2, model_name=manifest.model_name)
    stored, _ = runtime.store.import_concept(
        concept, overwrite=record.spec.overwrite, tenant=record.tenant
    )
    return stored.concept_id


def _read_if_there(path: Path) -> bytes:
    with storage_errors(), suppress(FileNotFoundError):  # or the training was deleted meanwhile
        return path.read_bytes()
    return b""


def _key(job: Job) -> tuple[float, str]:
    return job.record.create_time, job.training_id
