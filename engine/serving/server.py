"""The server: a model, a batcher and a concept store behind gRPC."""

import asyncio
import logging
import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.batching.batcher import Batcher, Model
from engine.batching.step_costs import CostTable
from engine.bundle import Manifest
from engine.errors import ConfigError, ShuttingDown, StoreError
from engine.image_jobs.runner import ImageJobRunner
from engine.image_jobs.service import ImageJobService
from engine.image_jobs.store import ImageJobStore
from engine.operations.observed_batcher import ObservedBatcher
from engine.operations.operations import HEALTH_SERVICE, Operations
from engine.pipeline import Pipeline
from engine.planner import Planner
from engine.security.authentication import Authentication
from engine.security.config import SecurityConfig, is_exposed
from engine.security.credential_source import CredentialSource
from engine.security.tls import Certificates
from engine.serving.admin_service import AdminService
from engine.serving.bundle_folder import BundleFolder
from engine.serving.concept_service import ConceptService
from engine.serving.deployment import Deployment
from engine.serving.generation import Generation
from engine.serving.model_opening import (
    check_words_fit,
    in_daemon_thread,
    manifest_to_deploy,
    model_opener,
)
from engine.serving.runtime import Runtime
from engine.serving.server_config import ServerConfig
from engine.serving.service import ImageGenerationService, ServerInfoService
from engine.store.concept_store import ConceptStore
from engine.training.child import worker_command
from engine.training.model import TrainableModel
from engine.training.service import TrainingService, publish
from engine.training.store import TrainingStore
from engine.training.supervisor import Supervisor
from protos.oneword.v1 import (
    admin_pb2,
    admin_pb2_grpc,
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
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)
COLLECT_EVERY_S = 3600.0  # what was deleted from the concept store longer ago than its grace
# Time for the last statuses to leave, and the end of health watchers, which never end themselves.
_FLUSH_S = 1.0
# A connection is checked when it is made: made anew, it is checked against what counts by then.
_TLS_OPTIONS = (("grpc.max_connection_age_ms", 3_600_000),)
_FLOODING_CONNECTIONS = 8  # that may do their worst without harm to others
_MANY_RPCS = 1 << 24  # whatever is configured: the numbers above them must fit into 31 bits

logger = logging.getLogger(__name__)


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
        security = config.security
        # Before anything is owned: files that cannot be used must leave nothing behind.
        self._tls = (
            certificates.server_credentials()
            if (certificates := Certificates.of(security))
            else None
        )
        self._credentials = CredentialSource(security.credentials) if security.credentials else None
        # The last that can fail, and the first that is owned.
        job_store = ImageJobStore(config.job_dir, config.jobs) if config.job_dir else None
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
            progress_interval_s=config.progress_interval_s,
        )
        self._generation = Generation(self._runtime)
        self.generation = ImageGenerationService(self._runtime, self._generation)
        self._jobs = job_store and ImageJobRunner(job_store, self._generation.follow_job)
        self.training = _training_service(self._runtime, config)
        self._admin = AdminService(
            self._runtime,
            BundleFolder(config.bundle_dir, security.trusted_keys),
            deploy=self.deploy,
            check=self._check_words,
            exposed=is_exposed(config.listen, security),
        )
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
        self._admin.stop()
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
        """Put another bundle in service while requests run (engine/serving/deployment.py).

        Raises `DeploymentFailed`, also for a bundle that has no use for the words learned here.
        """
        if self._config.training.training_model is not None:
            trusted_keys = self._config.security.trusted_keys
            self._check_words(await asyncio.to_thread(manifest_to_deploy, bundle, trusted_keys))
        await in_daemon_thread(self.deployment.deploy, bundle)

    def _check_words(self, new: Manifest) -> None:
        if self._config.training.training_model is not None:
            check_words_fit(new, self._runtime.pipeline.bundle.manifest)

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
                *_flood_options(self._config.max_concurrent_rpcs),
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
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self._admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self.operations.health, server)
        if self._config.reflection:
            names = (*SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server


def _flood_options(max_concurrent_rpcs: int) -> tuple[tuple[str, int], ...]:
    """Bounds of gRPC's own queue, in front of all else.

    It holds the calls that nobody has looked at yet, those that were given up again too, and drops
    calls of anybody with a bare CANCELLED when it overflows. So that a connection cannot fill it, a
    connection has a bounded part of it: what is beyond is refused to that connection alone.
    """
    streams = 2 * min(max_concurrent_rpcs, _MANY_RPCS)
    pending = _FLOODING_CONNECTIONS * streams
    return (
        ("grpc.max_concurrent_streams", streams),
        ("grpc.server.max_pending_requests", pending),  # some are dropped from here on, and
        ("grpc.server.max_pending_requests_hard_limit", 2 * pending),  # all from here on
    )


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
        publish=partial(publish, runtime=runtime),
    )
    return TrainingService(runtime, supervisor, model)


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
