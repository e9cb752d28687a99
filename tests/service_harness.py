"""A server over a real gRPC socket, on a model that is arithmetic, and how to call it."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc import StatusCode
from PIL import Image

from engine.concepts import Concept, concept_to_bytes
from engine.requests import GenerationRequest, Limits
from engine.serving.server import Server
from engine.serving.server_config import ServerConfig
from engine.store.concept_store import ConceptStore
from protos.oneword.v1 import concepts_pb2, generation_pb2
from protos.oneword.v1.concepts_pb2_grpc import ConceptServiceStub
from protos.oneword.v1.generation_pb2 import GenerateRequest, GenerateResponse
from protos.oneword.v1.generation_pb2_grpc import (
    ImageGenerationServiceStub,
    ImageJobServiceStub,
)
from protos.oneword.v1.server_info_pb2_grpc import ServerInfoServiceStub
from tests.fakes import DIM, WAIT_S, FakeDenoiser, make_pipeline

DEFAULTS = GenerationRequest(prompt="")
SMALL_LIMITS = Limits(max_concepts_per_request=4)


@dataclass(kw_only=True)
class Harness:
    """A server in this process, and stubs that call it through a socket."""

    server: Server
    denoiser: FakeDenoiser
    store: ConceptStore
    address: str
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.generation = ImageGenerationServiceStub(self.channel)
        self.jobs = ImageJobServiceStub(self.channel)
        self.concepts = ConceptServiceStub(self.channel)
        self.info = ServerInfoServiceStub(self.channel)

    async def generate(self, *, timeout: float = WAIT_S, **fields: Any) -> list[GenerateResponse]:
        fields = {"num_inference_steps": 4, **fields}
        call = self.generation.Generate(GenerateRequest(**fields), timeout=timeout)
        return [response async for response in call]

    async def refusal(self, **fields: Any) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.generate(**fields)
        return caught.value

    async def is_idle(self) -> bool:
        for _ in range(200):
            if self.server.batcher.load == (0, 0) and self.server.generation.active == 0:
                return True
            await asyncio.sleep(0.01)
        return False


StartServer = Callable[..., Any]


@pytest.fixture
async def start_server() -> AsyncIterator[StartServer]:
    harnesses: list[Harness] = []

    async def start(**settings: Any) -> Harness:
        limits = settings.pop("limits", SMALL_LIMITS)
        settings = {"progress_interval_s": 0.0, **settings}  # each step of a fast model is told
        config = ServerConfig(bundle=Path("none"), listen="127.0.0.1:0", **settings)
        denoiser, store = FakeDenoiser(), ConceptStore.temporary()
        server = Server(make_pipeline(denoiser, limits=limits), store, config)
        address = await server.start()
        options = [("grpc.max_receive_message_length", config.max_message_bytes)]
        channel = grpc.aio.insecure_channel(address, options=options)
        harness = Harness(
            server=server, denoiser=denoiser, store=store, address=address, channel=channel
        )
        harnesses.append(harness)
        return harness

    yield start
    for harness in harnesses:
        harness.denoiser.gate.set()
        await harness.channel.close()
        await harness.server.stop()


@pytest.fixture
async def served(start_server: StartServer) -> Harness:
    return await start_server()


def make_concept(token: str = "<cat-toy>", value: float = 0.5, **fields: Any) -> Concept:
    fields = {"learned_embeddings": np.full((2, DIM), value, np.float32), **fields}
    return Concept(placeholder_token=token, **fields)


def inline(content: bytes, token: str = "") -> generation_pb2.ConceptReference:
    concept = generation_pb2.InlineConcept(safetensors=content, placeholder_token=token)
    return generation_pb2.ConceptReference(inline=concept)


def bare(token: str, values: list[float], **fields: Any) -> generation_pb2.ConceptReference:
    vectors = generation_pb2.LearnedEmbeddings(values=values, **fields)
    concept = generation_pb2.InlineConcept(placeholder_token=token, learned_embeddings=vectors)
    return generation_pb2.ConceptReference(inline=concept)


async def first_response(call: Any) -> GenerateResponse:
    response = await call.read()
    assert isinstance(response, GenerateResponse)
    return response


def kinds(responses: list[GenerateResponse]) -> list[str]:
    return [response.WhichOneof("event") or "" for response in responses]


def images(responses: list[GenerateResponse]) -> list[generation_pb2.ImageResult]:
    found = [response.image for response in responses if response.HasField("image")]
    return sorted(found, key=lambda image: image.image_index)


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The details of a refusal by the name of their type."""
    metadata = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            status = Status.FromString(value)
            assert (status.code, status.message) == (error.code().value[0], error.details())
            return {
                any_.TypeName(): getattr(
                    error_details_pb2, any_.TypeName().split(".")[-1]
                ).FromString(any_.value)
                for any_ in status.details
            }
    raise AssertionError("no details")


def field_of(error: grpc.aio.AioRpcError) -> str:
    """The field that a refusal of the request names."""
    (violation,) = details(error)["google.rpc.BadRequest"].field_violations
    return violation.field


SOUND = concept_to_bytes(make_concept())


async def import_file(served: Harness, content: bytes, **fields: Any) -> Any:
    request = concepts_pb2.ImportConceptRequest(content=content, **fields)
    return await served.concepts.ImportConcept(request, timeout=WAIT_S)


async def code_of(call: Any) -> StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


def fingerprint_of(served: Harness) -> str:
    return served.server._runtime.pipeline.bundle.manifest.text.embedding_fingerprint
