"""The server: a model, a batcher and a concept store behind gRPC, from start to drained stop."""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.authentication import Authentication
from engine.batcher import Batcher, BatcherConfig, Model
from engine.bundle import Manifest, read_manifest
from engine.bundle_signatures import check_bundle
from engine.concept_service import ConceptService
from engine.credential_source import CredentialSource
from engine.credentials import read_credentials
from engine.deployment import Deployment, OpenModel, close_model, measured
from engine.endpoint import DEFAULT_ADDRESS, MAX_MESSAGE_BYTES
from engine.errors import ConfigError, DeploymentFailed, EngineError, ShuttingDown, StoreError
from engine.generation import Generation
from engine.image_job_runner import ImageJobRunner
from engine.image_job_service import ImageJobService
from engine.image_jobs import ImageJobStore, JobLimits
from engine.observed_batcher import ObservedBatcher
from engine.operations import HEALTH_SERVICE, Operations
from engine.operations_config import OperationsConfig
from engine.pipeline import Pipeline
from engine.planner import Planner
from engine.remote_model import open_remote
from engine.requests import Limits
from engine.runtime import Runtime
from engine.security_config import SecurityConfig, check_listen
from engine.service import ImageGenerationService, ServerInfoService
from engine.step_costs import CostTable
from engine.store import ConceptStore, StoreConfig
from engine.tls import Certificates
from engine.training_child import worker_command
from engine.training_config import TrainingConfig
from engine.training_model import TrainableModel
from engine.training_service import TrainingService, publish
from engine.training_store import TrainingStore
from engine.training_supervisor import Supervisor
from engine.worker_supervisor import WorkerConfig
from protos.oneword.v1 import (
    concepts_pb2,
    concepts_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_info_pb2,
    server_info_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

TRAINING_SERVICE = training_pb2.DESCRIPTOR.services_by_name["TrainingService"].full_name
GENERATION_SERVICE = generation_pb2.DESCRIPTOR.services_by_name["ImageGenerationService"].full_name
SERVICES = (
    GENERATION_SERVICE,
    generation_pb2.DESCRIPTOR.services_by_name["ImageJobService"].full_name,
    concepts_pb2.DESCRIPTOR.services_by_name["ConceptService"].full_name,
    server_info_pb2.DESCRIPTOR.services_by_name["ServerInfoService"].full_name,
    TRAINING_SERVICE,
)
COLLECT_EVERY_S = 3600.0  # what was deleted from the concept store longer ago than its grace
# Time for the last statuses to leave, and the end of health watchers, which never end themselves.
_FLUSH_S = 1.0
# A connection is checked when it is made: made anew, it is checked against what counts by then.
_TLS_OPTIONS = (("grpc.max_connection_age_ms", 3_600_000),)

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything that `oneword serve` can be told."""

    bundle: Path  # folder by build_engines.py
    listen: str = DEFAULT_ADDRESS  # host:port, port 0 for a free one; or unix:PATH
    insecure: bool = False  # listen beyond this machine, without TLS or authentication
    security: SecurityConfig = field(default_factory=SecurityConfig)
    concept_dir: Path | None = None  # None: concepts are forgotten when the server stops
    job_dir: Path | None = None  # None: no jobs are kept
    jobs: JobLimits = field(default_factory=JobLimits)
    concept_index: str = ""  # postgresql://... in place of SQLite in concept_dir
    concept_files: str = ""  # a folder or the URL of a file system, in place of concept_dir
    execution_provider: str = "CPUExecutionProvider"  # of ONNX Runtime; there is no fall-back
    model_process: bool = True  # the graphs in a process of their own, which may die and come back
    worker: WorkerConfig = field(default_factory=WorkerConfig)  # of that process
    batcher: BatcherConfig = field(default_factory=BatcherConfig)
    limits: Limits = field(default_factory=Limits)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    operations: OperationsConfig = field(default_factory=OperationsConfig)
    max_message_bytes: int = MAX_MESSAGE_BYTES  # each way
    max_concurrent_rpcs: int = 256  # more are refused
    host_threads: int = 2  # for tokenizing and picture coding
    grace_s: float = 30.0  # for requests under way when the server is told to stop
    stall_timeout_s: float = 60.0  # a caller that reads nothing for so long is dropped
    reflection: bool = True  # describe the services to whoever asks

    def __post_init__(self) -> None:
        check_listen(self.listen, self.security, insecure=self.insecure)
        if self.training.training_model is not None and self.training_dir is None:
            raise ConfigError(
                "a server that learns must keep what it learned; give it a concept_dir, or a "
                "training_dir if its concepts are not to be kept"
            )
        for name in ("max_message_bytes", "max_concurrent_rpcs", "host_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("grace_s", "stall_timeout_s"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def training_dir(self) -> Path | None:
        """Where trainings are kept: beside the stored concepts, unless told otherwise."""
        if self.training.training_dir is not None or self.concept_dir is None:
            return self.training.training_dir
        return self.concept_dir.with_name(f"{self.concept_dir.name}-training")


class Server:
    """A model behind a port. Owns it, the batcher and the store: `stop` closes all."""

    def __init__(
        self,
        planner: Planner,
        store: ConceptStore,
        config: ServerConfig,
        *,
        model: Model | None = None,
        costs: CostTable | None = None,
    ) -> None:
        """`model` draws what `planner` plans; a pipeline does both.

        `costs` of its calls on this device; without them the batcher learns them.
        """
        if model is None:
            assert isinstance(planner, Pipeline)
            model = planner
        self._config = config
        # First: a folder that cannot be used must leave nothing behind.
        job_store = ImageJobStore(config.job_dir, config.jobs) if config.job_dir else None
        security = config.security
        # Before anything is owned: files that cannot be used must leave nothing behind.
        self._tls = (
            certificates.server_credentials()
            if (certificates := Certificates.of(security))
            else None
        )
        self._credentials = CredentialSource(security.credentials) if security.credentials else None
        self._following: asyncio.Task[None] | None = None
        self._pool = ThreadPoolExecutor(config.host_threads, thread_name_prefix="host")
        self.operations = Operations(config.operations, SERVICES, load=lambda: self.batcher.load)
        self.deployment = Deployment(
            planner,
            model,
            config.batcher,
            open_model=model_opener(config),
            costs=costs,
            make_batcher=partial(ObservedBatcher, observation=self.operations.observation),
        )
        self._runtime = Runtime(
            deployment=self.deployment,
            store=store,
            pool=self._pool,
            stall_timeout_s=config.stall_timeout_s,
        )
        self._generation = Generation(self._runtime)
        self.generation = ImageGenerationService(self._runtime, self._generation)
        self._jobs = job_store and ImageJobRunner(job_store, self._generation.follow_job)
        self.training = _training_service(self._runtime, config)
        self._collecting: asyncio.Task[None] | None = None
        self._authentication = _authentication(self._credentials, security)
        self._server = self._make_server()

    @property
    def batcher(self) -> Batcher:
        """Of the bundle in service."""
        return self._runtime.batcher

    async def start(self) -> str:
        """Listen and serve; returns the address with the port that was bound."""
        port = self._bind()
        await self.operations.start()
        if self._jobs is not None:
            await self._jobs.start()
        if self._credentials is not None and self._authentication is not None:
            self._following = asyncio.create_task(
                self._credentials.follow(self._authentication.recheck), name="credentials"
            )
        learns = await self.training.start()
        for name in ("", *SERVICES):
            self.operations.health.set_serving(name, learns or name != TRAINING_SERVICE)
        self.deployment.watch(self._model_serves)
        await self._server.start()
        self._collecting = asyncio.create_task(_collect_for_ever(self._runtime.store))
        if self._config.listen.startswith("unix:"):
            return self._config.listen
        return f"{self._config.listen.rpartition(':')[0]}:{port}"

    async def stop(self, grace_s: float = 0.0) -> None:
        """Say NOT_SERVING, let requests under way finish within `grace_s`, fail the rest."""
        self.deployment.watch(None)
        self.operations.drain()
        if self._jobs is not None:
            await self._jobs.stop()
        if self._collecting is not None:
            self._collecting.cancel()
        await asyncio.gather(self._drain(grace_s), self.training.stop())
        await asyncio.to_thread(self.deployment.close)
        if self._following is not None:
            self._following.cancel()
        await self._server.stop(_FLUSH_S)
        await self.operations.stop()
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)
        self._runtime.store.close()
        if self._jobs is not None:
            self._jobs.store.close()

    async def deploy(self, bundle: Path) -> None:
        """Put another bundle in service while requests run (engine/deployment.py).

        Raises `DeploymentFailed`, also for a bundle that has no use for the words learned here.
        """
        training, manifest = self._config.training, self._runtime.pipeline.bundle.manifest
        if training.training_model is not None:
            new = (await asyncio.to_thread(_read_manifest, bundle)).text.embedding_fingerprint
            if new != manifest.text.embedding_fingerprint:
                raise DeploymentFailed(
                    f"this server learns words for {manifest.model_name}, with token embeddings "
                    f"{manifest.text.embedding_fingerprint[:12]}..., the new bundle has "
                    f"{new[:12]}...; start another server for it"
                )
        await _in_daemon_thread(self.deployment.deploy, bundle)

    def _model_serves(self, serving: bool, _reason: str) -> None:
        """Health follows the model's process: a dead one is NOT_SERVING until it is back."""
        for name in ("", GENERATION_SERVICE):
            self.operations.health.set_serving(name, serving)
        self.operations.metrics.model_serves(serving)

    def _bind(self) -> int:
        """Take the address; returns its port."""
        listen = self._config.listen
        try:
            with _private_files(listen.startswith("unix:")):
                if self._tls is not None:
                    return self._server.add_secure_port(listen, self._tls)
                return self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {listen}: the address is in use or is not one of this machine; "
                "stop the other server, or choose another port (0: any free one)"
            ) from error

    async def _drain(self, grace_s: float) -> None:
        """Wait for the requests under way; those that are not done are told so within `grace_s`,
        also where a call of the model hangs."""
        flush_s = min(_FLUSH_S, grace_s / 4)
        await self.generation.drain(grace_s - flush_s)
        self.operations.observation.abandon(
            ShuttingDown("the server shut down before the images were done")
        )
        await self.generation.drain(flush_s)

    def _make_server(self) -> grpc.aio.Server:
        limit = self._config.max_message_bytes
        server = grpc.aio.server(
            interceptors=self.operations.interceptors(
                *([self._authentication] if self._authentication else [])
            ),
            maximum_concurrent_rpcs=self._config.max_concurrent_rpcs,
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", 0),  # a second server on a port must fail, not share it
                ("grpc.keepalive_time_ms", 60_000),  # a caller that vanished frees its slot
                ("grpc.keepalive_timeout_ms", 20_000),
                *(_TLS_OPTIONS if self._tls is not None else ()),
            ],
        )
        generation_pb2_grpc.add_ImageGenerationServiceServicer_to_server(self.generation, server)
        concepts_pb2_grpc.add_ConceptServiceServicer_to_server(
            ConceptService(self._runtime), server
        )
        server_info_pb2_grpc.add_ServerInfoServiceServicer_to_server(
            ServerInfoService(
                self._runtime,
                self._generation,
                self.operations,
                max_message_bytes=limit,
                training=self.training.config,
                jobs=self._jobs and self._jobs.store.limits,
            ),
            server,
        )
        generation_pb2_grpc.add_ImageJobServiceServicer_to_server(
            ImageJobService(
                self._jobs,
                self._generation.pin,
                max_message_bytes=limit,
                stall_timeout_s=self._config.stall_timeout_s,
            ),
            server,
        )
        training_pb2_grpc.add_TrainingServiceServicer_to_server(self.training, server)
        health_pb2_grpc.add_HealthServicer_to_server(self.operations.health, server)
        if self._config.reflection:
            names = (*SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server


def _authentication(
    source: CredentialSource | None, security: SecurityConfig
) -> Authentication | None:
    """None where everybody who reaches the server may do everything."""
    if source is None:
        return None
    return Authentication(
        source,
        certificates=security.tls_client_ca is not None,
        open_methods=security.open_methods,
    )


@contextmanager
def _private_files(private: bool) -> Generator[None]:
    """Files made meanwhile are for this user alone, from their first moment on.

    Those of other threads too: a umask is the whole process's.
    """
    before = os.umask(0o177) if private else None
    try:
        yield
    finally:
        if before is not None:
            os.umask(before)


def _training_service(runtime: Runtime, config: ServerConfig) -> TrainingService:
    """Trainings in a folder beside the stored concepts; refusals only, where no model is given."""
    training, folder = config.training, config.training_dir
    if training.training_model is None or folder is None:
        return TrainingService(runtime)
    model = TrainableModel(training.training_model, runtime.pipeline.bundle.manifest)
    supervisor = Supervisor(
        TrainingStore(folder, training.limits),
        training,
        command=worker_command(
            training.training_model,
            device=training.training_device,
            checkpoint_every_s=training.checkpoint_every_s,
        ),
        publish=partial(publish, pipeline=runtime.pipeline, store=runtime.store),
    )
    return TrainingService(runtime, supervisor, model)


async def serve(
    config: ServerConfig, on_ready: Callable[[str], None] = lambda _address: None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the process at once.

    `on_ready` is told the address once the server listens.
    """
    await asyncio.to_thread(_check_files, config)
    planner, model = await _in_daemon_thread(model_opener(config), config.bundle)
    try:
        costs = await asyncio.to_thread(measured, planner, model, config.batcher)
        store = await asyncio.to_thread(_open_store, config)
        server = Server(planner, store, config, model=model, costs=costs)
    except BaseException:
        close_model(model)
        raise
    told_to_stop = asyncio.Event()
    try:
        address = await server.start()
        _on_signals(told_to_stop.set)
        logger.info("serving %s on %s", planner.bundle.manifest.model_name, address)
        if config.insecure:
            logger.warning("insecure: whoever reaches %s may not be asked who it is", address)
        on_ready(address)
        await told_to_stop.wait()
        logger.info("stopping; requests under way have %g s", config.grace_s)
    finally:
        await server.stop(config.grace_s)


def model_opener(config: ServerConfig) -> OpenModel:
    """How bundles are opened: the first one, and those that are deployed later."""
    settings: dict[str, Any] = {
        "execution_provider": config.execution_provider,
        "limits": config.limits,
    }
    if config.model_process:
        opens: OpenModel = partial(open_remote, config=config.worker, **settings)
    else:
        opens = partial(_open_here, **settings)

    def open_trusted(bundle: Path) -> tuple[Planner, Model]:
        if config.security.trusted_keys:
            check_bundle(bundle, config.security.trusted_keys)
        return opens(bundle)

    return open_trusted


async def _in_daemon_thread(function: Callable[[Path], T], bundle: Path) -> T:
    """Unlike one of a pool's, this thread does not hold up a process that is told to end."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(function(bundle))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="opening a bundle", daemon=True).start()
    return await asyncio.wrap_future(result)


def _open_here(bundle: Path, **settings: Any) -> tuple[Planner, Model]:
    pipeline = Pipeline.open(bundle, **settings)
    return pipeline, pipeline


def _read_manifest(bundle: Path) -> Manifest:
    try:
        return read_manifest(bundle)
    except EngineError as error:
        raise DeploymentFailed(str(error)) from error


def _open_store(config: ServerConfig) -> ConceptStore:
    if config.concept_dir is None and not config.concept_index and not config.concept_files:
        return ConceptStore.temporary()
    return ConceptStore(
        StoreConfig(
            folder=config.concept_dir, index=config.concept_index, files=config.concept_files
        )
    )


async def _collect_for_ever(store: ConceptStore) -> None:
    """Remove what was deleted long enough ago; a store that fails is tried again the next time."""
    while True:
        await asyncio.sleep(COLLECT_EVERY_S)
        try:
            collected = await asyncio.to_thread(store.collect)
        except StoreError as error:
            logger.warning("stored concepts were not collected: %s", error)
            continue
        if collected.num_versions or collected.num_files:
            logger.info(
                "removed %d deleted versions of concepts and %d files",
                collected.num_versions,
                collected.num_files,
            )


def _check_files(config: ServerConfig) -> None:
    """Refuse what cannot be used before time goes into loading a model."""
    security = config.security
    if certificates := Certificates.of(security):
        certificates.read()
    if security.credentials is not None:
        read_credentials(security.credentials)


def _on_signals(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()

    def first_signal() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)  # Python's own SIGINT handler waits for threads
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, first_signal)
