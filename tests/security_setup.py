"""A server with authentication over a real socket, its callers and its certificates."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
import trustme
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from engine.client.training import create_requests
from engine.concepts import concept_to_bytes
from engine.security.config import SecurityConfig
from engine.security.credential_edits import create_token
from engine.serving.server import Server
from engine.serving.server_config import ServerConfig
from engine.store.concept_store import ConceptStore
from engine.training.config import TrainingConfig
from protos.oneword.v1 import (
    admin_pb2,
    concepts_pb2,
    generation_pb2,
    server_info_pb2,
    training_pb2,
)
from tests.fakes import WAIT_S, FakeDenoiser, make_pipeline
from tests.service_harness import make_concept
from tests.training_harness import IMAGES, SCRIPTED, save_embeddings

ALL = ("generate", "concepts", "train", "admin")
Metadata = Sequence[tuple[str, str]]
StartSecured = Callable[..., Any]


@dataclass(kw_only=True)
class Secured:
    """A server in this process that asks who calls."""

    server: Server
    denoiser: FakeDenoiser
    store: ConceptStore
    address: str
    credentials: Path
    channels: list[grpc.aio.Channel] = field(default_factory=list[grpc.aio.Channel])

    def token(self, tenant: str = "acme", scopes: Sequence[str] = ALL, **settings: Any) -> str:
        """A new token; it counts once the server has read the file again."""
        settings = {"name": "ci", **settings}
        new = create_token(self.credentials, tenant=tenant, scopes=scopes, **settings)
        return new.token

    async def learn_of(self, _token: str = "") -> None:
        """Have the server read its file now, as it would within a second."""
        source = self.server._credentials
        assert source is not None and self.server._authentication is not None
        if (changed := source._read_if_changed()) is not None:
            source.current = changed
            self.server._authentication.recheck()

    async def known(self, tenant: str = "acme", scopes: Sequence[str] = ALL) -> "Caller":
        token = self.token(tenant, scopes)
        await self.learn_of()
        return self.caller(token)

    def caller(self, token: str | None = None, credentials: Any = None) -> "Caller":
        channel = (
            grpc.aio.secure_channel(self.address, credentials)
            if credentials is not None
            else grpc.aio.insecure_channel(self.address)
        )
        self.channels.append(channel)
        metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        return Caller(channel, metadata)


@dataclass
class Caller:
    """Calls methods by their path, as anybody on the network could."""

    channel: grpc.aio.Channel
    metadata: Metadata = ()

    async def call(
        self, method: str, *requests: Message, reply: Any = None, timeout: float = WAIT_S
    ) -> list[Any]:
        """All replies to a call; raises `AioRpcError`."""
        call = self.start(method, *requests, reply=reply, timeout=timeout)
        return [response async for response in call]

    def start(
        self, method: str, *requests: Message, reply: Any = None, timeout: float = WAIT_S
    ) -> Any:
        async def send() -> AsyncIterator[Message]:
            for request in requests:
                yield request

        multi = self.channel.stream_stream(
            method,
            request_serializer=_serialized,
            response_deserializer=(reply or _reply_type(method)).FromString,
        )
        return multi(send(), metadata=self.metadata, timeout=timeout)

    async def refusal(self, method: str, *requests: Message) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(method, *(requests or sound_requests(method)))
        return caught.value


def _serialized(message: Any) -> bytes:
    return message.SerializeToString()


def _reply_type(method: str) -> Any:
    if method not in _METHODS:
        return health_pb2.HealthCheckResponse
    return _METHODS[method][1]


def _image(prompt: str = "a cat") -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(prompt=prompt, num_inference_steps=2)


_C, _G, _T = concepts_pb2, generation_pb2, training_pb2
_NO_ID = "0" * 32
# Every method: a request that is sound but for what it names, and the type of the reply.
_METHODS: dict[str, tuple[tuple[Message, ...], Any]] = {
    "/oneword.v1.ImageGenerationService/Generate": ((_image(),), generation_pb2.GenerateResponse),
    "/oneword.v1.ImageGenerationService/GenerateImages": (
        (_G.GenerateImagesRequest(request=_image()),),
        _G.GenerateImagesResponse,
    ),
    "/oneword.v1.ImageGenerationService/GenerateBatch": (
        (_G.GenerateBatchRequest(requests=[_image()]),),
        _G.GenerateBatchResponse,
    ),
    "/oneword.v1.ImageJobService/SubmitJob": (
        (_G.SubmitJobRequest(request=_image()),),
        _G.SubmitJobResponse,
    ),
    "/oneword.v1.ImageJobService/GetJob": (
        (_G.GetJobRequest(job_id=_NO_ID),),
        _G.GetJobResponse,
    ),
    "/oneword.v1.ImageJobService/WatchJob": (
        (_G.WatchJobRequest(job_id=_NO_ID),),
        _G.WatchJobResponse,
    ),
    "/oneword.v1.ImageJobService/CancelJob": (
        (_G.CancelJobRequest(job_id=_NO_ID),),
        _G.CancelJobResponse,
    ),
    "/oneword.v1.ImageJobService/DeleteJob": (
        (_G.DeleteJobRequest(job_id=_NO_ID),),
        _G.DeleteJobResponse,
    ),
    "/oneword.v1.ImageJobService/ListJobs": ((_G.ListJobsRequest(),), _G.ListJobsResponse),
    "/oneword.v1.ConceptService/ImportConcept": (
        (_C.ImportConceptRequest(content=concept_to_bytes(make_concept())),),
        _C.ImportConceptResponse,
    ),
    "/oneword.v1.ConceptService/GetConcept": (
        (_C.GetConceptRequest(placeholder_token="<cat-toy>"),),
        _C.GetConceptResponse,
    ),
    "/oneword.v1.ConceptService/ListConcepts": (
        (_C.ListConceptsRequest(),),
        _C.ListConceptsResponse,
    ),
    "/oneword.v1.ConceptService/DeleteConcept": (
        (_C.DeleteConceptRequest(placeholder_token="<cat-toy>"),),
        _C.DeleteConceptResponse,
    ),
    "/oneword.v1.ConceptService/UndeleteConcept": (
        (_C.UndeleteConceptRequest(placeholder_token="<cat-toy>"),),
        _C.UndeleteConceptResponse,
    ),
    "/oneword.v1.ConceptService/ListConceptVersions": (
        (_C.ListConceptVersionsRequest(placeholder_token="<cat-toy>"),),
        _C.ListConceptVersionsResponse,
    ),
    "/oneword.v1.ConceptService/SetConceptAlias": (
        (_C.SetConceptAliasRequest(placeholder_token="<cat-toy>", alias="stable"),),
        _C.SetConceptAliasResponse,
    ),
    "/oneword.v1.ConceptService/DeleteConceptAlias": (
        (_C.DeleteConceptAliasRequest(placeholder_token="<cat-toy>", alias="stable"),),
        _C.DeleteConceptAliasResponse,
    ),
    "/oneword.v1.ConceptService/ExportConcept": (
        (_C.ExportConceptRequest(placeholder_token="<cat-toy>"),),
        _C.ExportConceptResponse,
    ),
    "/oneword.v1.TrainingService/CreateTraining": (
        tuple(create_requests(_T.TrainingSpec(placeholder_token="<cat>"), IMAGES, {}, {})),
        _T.CreateTrainingResponse,
    ),
    "/oneword.v1.TrainingService/GetTraining": (
        (_T.GetTrainingRequest(training_id=_NO_ID),),
        _T.GetTrainingResponse,
    ),
    "/oneword.v1.TrainingService/WatchTraining": (
        (_T.WatchTrainingRequest(training_id=_NO_ID),),
        _T.WatchTrainingResponse,
    ),
    "/oneword.v1.TrainingService/CancelTraining": (
        (_T.CancelTrainingRequest(training_id=_NO_ID),),
        _T.CancelTrainingResponse,
    ),
    "/oneword.v1.TrainingService/ListTrainings": (
        (_T.ListTrainingsRequest(),),
        _T.ListTrainingsResponse,
    ),
    "/oneword.v1.TrainingService/DeleteTraining": (
        (_T.DeleteTrainingRequest(training_id=_NO_ID),),
        _T.DeleteTrainingResponse,
    ),
    "/oneword.v1.AdminService/ListBundles": (
        (admin_pb2.ListBundlesRequest(),),
        admin_pb2.ListBundlesResponse,
    ),
    "/oneword.v1.AdminService/DeployBundle": (
        (admin_pb2.DeployBundleRequest(bundle_name="other"),),
        admin_pb2.DeployBundleResponse,
    ),
    "/oneword.v1.AdminService/GetDeployment": (
        (admin_pb2.GetDeploymentRequest(),),
        admin_pb2.GetDeploymentResponse,
    ),
    "/oneword.v1.ServerInfoService/GetServerInfo": (
        (server_info_pb2.GetServerInfoRequest(),),
        server_info_pb2.GetServerInfoResponse,
    ),
    "/grpc.health.v1.Health/Check": (
        (health_pb2.HealthCheckRequest(),),
        health_pb2.HealthCheckResponse,
    ),
    "/grpc.health.v1.Health/Watch": (
        (health_pb2.HealthCheckRequest(),),
        health_pb2.HealthCheckResponse,
    ),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": (
        (reflection_pb2.ServerReflectionRequest(list_services=""),),
        reflection_pb2.ServerReflectionResponse,
    ),
}
METHODS = tuple(_METHODS)


def sound_requests(method: str) -> tuple[Message, ...]:
    return _METHODS[method][0] if method in _METHODS else (_image(),)


@pytest.fixture
async def start_secured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[StartSecured]:
    """Starts servers that learn, with a credentials file; they are stopped at the end."""
    monkeypatch.setattr(
        "engine.serving.server.worker_command", lambda *_words, **_settings: SCRIPTED
    )
    started: list[Secured] = []

    async def start(listen: str = "127.0.0.1:0", **security: Any) -> Secured:
        denoiser, store = FakeDenoiser(), ConceptStore.temporary()
        pipeline = make_pipeline(denoiser)
        folder = tmp_path / str(len(started))
        model = save_embeddings(folder / "model", np.asarray(pipeline.bundle.token_embedding))
        credentials = security.pop("credentials", None) or folder / "credentials.toml"
        if not credentials.exists():
            create_token(credentials, tenant="nobody", name="unused", scopes=["admin"])
        config = ServerConfig(
            bundle=Path("none"),
            listen=listen,
            security=SecurityConfig(credentials=credentials, **security),
            job_dir=folder / "jobs",
            training=TrainingConfig(training_model=model, training_dir=folder / "trainings"),
        )
        server = Server(pipeline, store, config)
        secured = Secured(
            server=server,
            denoiser=denoiser,
            store=store,
            address=await server.start(),
            credentials=credentials,
        )
        started.append(secured)
        return secured

    yield start
    for secured in started:
        secured.denoiser.gate.set()
        for channel in secured.channels:
            await channel.close()
        await secured.server.stop()


@pytest.fixture
async def secured(start_secured: StartSecured) -> Secured:
    return await start_secured()


@dataclass(frozen=True)
class Pems:
    """Certificates as files."""

    cert: Path
    key: Path
    ca: Path

    @classmethod
    def write(cls, folder: Path, authority: trustme.CA, certificate: trustme.LeafCert) -> "Pems":
        folder.mkdir(parents=True, exist_ok=True)
        cert, key, ca = folder / "cert.pem", folder / "key.pem", folder / "ca.pem"
        cert.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        key.touch(0o600)
        key.write_bytes(certificate.private_key_pem.bytes())
        ca.write_bytes(authority.cert_pem.bytes())
        return cls(cert, key, ca)


def channel_credentials(
    authority: trustme.CA, certificate: trustme.LeafCert | None = None
) -> grpc.ChannelCredentials:
    """What a client needs to trust a server of this authority, and to show a certificate."""
    if certificate is None:
        return grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    return grpc.ssl_channel_credentials(
        authority.cert_pem.bytes(), certificate.private_key_pem.bytes(), chain
    )
