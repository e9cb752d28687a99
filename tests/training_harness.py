"""A server that learns, for tests: its model, its images, and calls through a real socket."""

import asyncio
import dataclasses
import io
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from safetensors.numpy import save_file

from engine.client.training import create_requests
from engine.fingerprint import embedding_fingerprint
from engine.pipeline import Pipeline
from engine.serving.server import TRAINING_SERVICE, Server
from engine.serving.server_config import ServerConfig
from engine.sessions import Session
from engine.store.concept_store import ConceptStore
from engine.training.config import TrainingConfig
from engine.training.spec import TrainingLimits
from protos.oneword.v1 import training_pb2
from protos.oneword.v1.training_pb2 import CreateTrainingRequest, ImageChunk
from protos.oneword.v1.training_pb2_grpc import TrainingServiceStub
from tests.fakes import (
    FakeDenoiser,
    FakeTextEncoder,
    FakeVaeDecoder,
    FakeVaeEncoder,
    make_pipeline,
)

TIMEOUT_S = 120.0
SCRIPTED = [sys.executable, "-P", "-m", "tests.scripted_worker"]
QUEUED, RUNNING = training_pb2.TRAINING_STATE_QUEUED, training_pb2.TRAINING_STATE_RUNNING
CANCELLING = training_pb2.TRAINING_STATE_CANCELLING
SUCCEEDED, FAILED = training_pb2.TRAINING_STATE_SUCCEEDED, training_pb2.TRAINING_STATE_FAILED
CANCELLED = training_pb2.TRAINING_STATE_CANCELLED
ENDED = (SUCCEEDED, FAILED, CANCELLED)
SMALL = TrainingLimits(max_images=3, max_image_bytes=20_000, max_upload_bytes=30_000, max_uploads=2)

Start = Callable[..., Any]  # starts a learning server, which is stopped at the end of the test


def png(seed: int = 0, side: int = 40) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    return buffer.getvalue()


IMAGES = {"a.png": png(1), "b.png": png(2)}


def save_embeddings(model: Path, table: np.ndarray) -> Path:
    """A diffusers folder as far as the server looks into it; returns it."""
    (model / "text_encoder").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    name = "text_model.embeddings.token_embedding.weight"
    save_file({name: table}, model / "text_encoder" / "model.safetensors")
    return model


def pipeline_of(table: np.ndarray) -> Pipeline:
    """The pipeline of arithmetic for concepts of a model with these token embeddings."""
    denoiser = FakeDenoiser()
    fake = make_pipeline(denoiser)
    text = dataclasses.replace(
        fake.bundle.manifest.text,
        dim=table.shape[1],
        output_dim=table.shape[1],
        embedding_fingerprint=embedding_fingerprint(table),
    )
    bundle = dataclasses.replace(
        fake.bundle,
        manifest=dataclasses.replace(fake.bundle.manifest, text=text),
        token_embedding=table[: text.vocab_size],
    )
    sessions: dict[str, Session] = {
        "text_encoder": FakeTextEncoder(),
        "denoiser": denoiser,
        "vae_decoder": FakeVaeDecoder(),
        "vae_encoder": FakeVaeEncoder(),
    }
    return Pipeline(bundle, sessions, limits=fake.limits)


@dataclass(kw_only=True)
class LearningServer:
    """A server in this process that learns, and a stub that calls it."""

    server: Server
    store: ConceptStore
    address: str
    folder: Path  # of the trainings
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.stub = TrainingServiceStub(self.channel)

    @classmethod
    async def start(
        cls, pipeline: Pipeline, model: Path, folder: Path, **settings: Any
    ) -> "LearningServer":
        server_settings = {
            name: settings.pop(name) for name in ("stall_timeout_s",) if name in settings
        }
        settings = {"retry_delay_s": 0.01, "stop_grace_s": 30.0, **settings}
        config = ServerConfig(
            bundle=Path("none"),
            listen="127.0.0.1:0",
            training=TrainingConfig(training_model=model, training_dir=folder, **settings),
            **server_settings,
        )
        store = ConceptStore.temporary()
        server = Server(pipeline, store, config)
        try:
            address = await server.start()
        except BaseException:
            await server.stop()
            raise
        channel = grpc.aio.insecure_channel(address)
        return cls(server=server, store=store, address=address, folder=folder, channel=channel)

    async def stop(self) -> None:
        await self.channel.close()
        await self.server.stop()

    async def create(
        self,
        token: str = "<cat>",
        images: Mapping[str, bytes] | None = None,
        *,
        masks: Mapping[str, bytes] | None = None,
        captions: Mapping[str, str] | None = None,
        initializer: str = "",
        options: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> training_pb2.Training:
        spec = training_pb2.TrainingSpec(
            placeholder_token=token,
            options=training_pb2.LearnOptions(initializer_token=initializer, **(options or {})),
            **fields,
        )
        return await self.upload(
            create_requests(spec, IMAGES if images is None else images, masks or {}, captions or {})
        )

    async def upload(
        self, requests: Iterable[training_pb2.CreateTrainingRequest]
    ) -> training_pb2.Training:
        call = self.stub.CreateTraining(_slowly(iter(requests)), timeout=TIMEOUT_S)
        return (await call).training

    async def get(self, training_id: str) -> training_pb2.Training:
        request = training_pb2.GetTrainingRequest(training_id=training_id)
        return (await self.stub.GetTraining(request, timeout=TIMEOUT_S)).training

    async def cancel(self, training_id: str) -> training_pb2.Training:
        request = training_pb2.CancelTrainingRequest(training_id=training_id)
        return (await self.stub.CancelTraining(request, timeout=TIMEOUT_S)).training

    async def watch(self, training_id: str) -> list[training_pb2.WatchTrainingResponse]:
        """All that is sent until the training has ended."""
        request = training_pb2.WatchTrainingRequest(training_id=training_id)
        return [response async for response in self.stub.WatchTraining(request, timeout=TIMEOUT_S)]

    async def ended(self, training_id: str) -> training_pb2.Training:
        """The training when it has ended."""
        return (await self.watch(training_id))[-1].training

    async def progressed(self, training_id: str) -> training_pb2.Training:
        """The training when its process has reported a step."""
        request = training_pb2.WatchTrainingRequest(training_id=training_id)
        call = self.stub.WatchTraining(request, timeout=TIMEOUT_S)
        async for response in call:
            if response.training.progress.step or response.training.state in ENDED:
                call.cancel()
                return response.training
        raise AssertionError("the stream ended")

    async def health(self) -> int:
        """What the health service says of training."""
        stub: Any = health_pb2_grpc.HealthStub(self.channel)  # pyright: ignore[reportArgumentType]
        request = health_pb2.HealthCheckRequest(service=TRAINING_SERVICE)
        return (await stub.Check(request)).status

    def release(self, training_id: str) -> None:
        """Let a scripted process that holds go on."""
        (self.folder / "jobs" / training_id / "release").touch()

    def leftovers(self) -> list[str]:
        """What lies in the folder of the trainings, without its fixed parts."""
        fixed = {"lock", "incoming", "jobs", "trash"}
        # os.walk passes over what is removed while it looks.
        found = [
            os.path.relpath(os.path.join(parent, name), self.folder)
            for parent, folders, files in os.walk(self.folder)
            for name in (*folders, *files)
        ]
        return sorted(set(found) - fixed)


async def _slowly(
    requests: Iterator[training_pb2.CreateTrainingRequest],
) -> AsyncIterator[training_pb2.CreateTrainingRequest]:
    for request in requests:
        yield request
        await asyncio.sleep(0)


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def chunk(name: str, data: bytes, offset: int = 0) -> CreateTrainingRequest:
    return CreateTrainingRequest(image=ImageChunk(file_name=name, offset=offset, data=data))


def end(num_images: int) -> CreateTrainingRequest:
    return CreateTrainingRequest(end=training_pb2.UploadEnd(num_images=num_images))


def spec(token: str = "<cat>", **fields: Any) -> CreateTrainingRequest:
    return CreateTrainingRequest(spec=training_pb2.TrainingSpec(placeholder_token=token, **fields))


async def nothing_is_left(served: LearningServer) -> None:
    for _ in range(500):
        if not served.leftovers():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(served.leftovers())


async def delete(served: LearningServer, training_id: str) -> None:
    await served.stub.DeleteTraining(training_pb2.DeleteTrainingRequest(training_id=training_id))


async def list_all(served: LearningServer, page_size: int = 0) -> list[training_pb2.Training]:
    found: list[training_pb2.Training] = []
    request = training_pb2.ListTrainingsRequest(page_size=page_size)
    while True:
        page = await served.stub.ListTrainings(request)
        found.extend(page.trainings)
        if not page.next_page_token:
            return found
        assert len(page.trainings) == page_size
        request.page_token = page.next_page_token
