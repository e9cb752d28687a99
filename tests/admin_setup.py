"""A server with a folder of bundles: their manifests are real, what is loaded is arithmetic."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from engine.batching.model import Model
from engine.bundle import FORMAT_VERSION, MANIFEST, read_manifest
from engine.pipeline import Pipeline
from engine.planner import Planner
from engine.security.bundle_signatures import check_bundle
from engine.serving.server import Server
from engine.serving.server_config import ServerConfig
from engine.sessions import Session
from engine.store.concept_store import ConceptStore
from protos.oneword.v1 import admin_pb2
from protos.oneword.v1.admin_pb2_grpc import AdminServiceStub
from protos.oneword.v1.generation_pb2 import GenerateRequest
from protos.oneword.v1.generation_pb2_grpc import ImageGenerationServiceStub
from tests.fakes import (
    WAIT_S,
    FakeDenoiser,
    FakeTextEncoder,
    FakeVaeDecoder,
    FakeVaeEncoder,
    make_pipeline,
)

StartAdmin = Callable[..., Any]


def make_bundle(folder: Path, build_key: str = "", **text: Any) -> Path:
    """A folder with the manifest of a bundle, and nothing else; returns it."""
    manifest = make_pipeline(FakeDenoiser()).bundle.manifest
    folder.mkdir(parents=True, exist_ok=True)
    manifest = dataclasses.replace(
        manifest,
        format_version=FORMAT_VERSION,
        model_name=folder.name,
        build_key=build_key or f"key of {folder.name}",
        text=dataclasses.replace(manifest.text, **text),
        files={},
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


def pipeline_of(folder: Path) -> Pipeline:
    """A pipeline of arithmetic that calls itself what the manifest says."""
    denoiser = FakeDenoiser()
    fake = make_pipeline(denoiser)
    sessions: dict[str, Session] = {
        "text_encoder": FakeTextEncoder(),
        "denoiser": denoiser,
        "vae_decoder": FakeVaeDecoder(),
        "vae_encoder": FakeVaeEncoder(),
    }
    bundle = dataclasses.replace(fake.bundle, path=folder, manifest=read_manifest(folder))
    return Pipeline(bundle, sessions, limits=fake.limits)


@dataclass
class Loading:
    """How bundles are loaded: as fast as a test lets them."""

    trusted_keys: tuple[Path, ...] = ()
    begun: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)
    loaded: list[str] = field(default_factory=list[str])
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.gate.set()

    def __call__(self, folder: Path) -> tuple[Planner, Model]:
        self.begun.set()
        assert self.gate.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        if self.trusted_keys:
            check_bundle(folder, self.trusted_keys)
        pipeline = pipeline_of(folder)
        self.loaded.append(folder.name)
        return pipeline, pipeline

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, WAIT_S)


@dataclass(kw_only=True)
class Administered:
    """A server in this process, its folder of bundles, and stubs that call it."""

    server: Server
    address: str
    folder: Path
    loading: Loading
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.admin = AdminServiceStub(self.channel)
        self.generation = ImageGenerationServiceStub(self.channel)

    async def bundles(self, **fields: Any) -> list[admin_pb2.Bundle]:
        reply = await self.admin.ListBundles(admin_pb2.ListBundlesRequest(**fields))
        return list(reply.bundles)

    def deploy(self, name: str, timeout: float = WAIT_S) -> Any:
        request = admin_pb2.DeployBundleRequest(bundle_name=name)
        return self.admin.DeployBundle(request, timeout=timeout)

    async def deployment(self) -> admin_pb2.Deployment:
        reply = await self.admin.GetDeployment(admin_pb2.GetDeploymentRequest())
        return reply.deployment

    async def drawn_by(self) -> str:
        """The model that draws a request."""
        call = self.generation.Generate(
            GenerateRequest(prompt="a cat", num_inference_steps=2), timeout=WAIT_S
        )
        return [response async for response in call][-1].summary.model_name

    async def retired(self) -> None:
        assert await asyncio.to_thread(self.server.deployment.wait_retired, WAIT_S)


@pytest.fixture
async def start_admin(tmp_path: Path) -> AsyncIterator[StartAdmin]:
    """Starts servers with the bundles `first`, in service, and `second`; stops them at the end."""
    started: list[Administered] = []

    async def start(**settings: Any) -> Administered:
        folder = tmp_path / "bundles"
        for name in ("first", "second"):
            make_bundle(folder / name)
        settings = {"bundle_dir": folder, "listen": "127.0.0.1:0", **settings}
        config = ServerConfig(bundle=folder / "first", **settings)
        server = Server(pipeline_of(config.bundle), ConceptStore.temporary(), config)
        loading = Loading(config.security.trusted_keys)
        server.deployment._open_model = loading
        address = await server.start()
        administered = Administered(
            server=server,
            address=address,
            folder=folder,
            loading=loading,
            channel=grpc.aio.insecure_channel(address.replace("0.0.0.0", "127.0.0.1")),
        )
        started.append(administered)
        return administered

    yield start
    for administered in started:
        administered.loading.gate.set()
        await administered.channel.close()
        await administered.server.stop()


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value
