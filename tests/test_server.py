"""The server as a process: where it listens, how it says it is well, how it stops; the client."""

import asyncio
import io
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from engine.client import Client, ServerError
from engine.concepts import Concept, concept_to_bytes
from engine.errors import ConfigError
from engine.pipeline import Pipeline
from engine.serving.serve import serve
from engine.serving.server import SERVICES, TRAINING_SERVICE, Server
from engine.serving.server_config import ServerConfig
from engine.store.concept_store import ConceptStore
from protos.oneword.v1.generation_pb2 import GenerateRequest, Progress
from protos.oneword.v1.generation_pb2_grpc import ImageGenerationServiceStub
from tests.fakes import DIM, WAIT_S, FakeDenoiser, make_pipeline

ROOT = Path(__file__).resolve().parent.parent
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def make_config(**settings: Any) -> ServerConfig:
    fields: dict[str, Any] = {"bundle": Path("none"), "listen": "127.0.0.1:0", **settings}
    return ServerConfig(**fields)


def health_stub(channel: Any) -> Any:
    """A stub whose type the stub package does not know."""
    return health_pb2_grpc.HealthStub(channel)


def make_server(denoiser: FakeDenoiser, **settings: Any) -> Server:
    return Server(make_pipeline(denoiser), ConceptStore.temporary(), make_config(**settings))


@pytest.fixture
def denoiser() -> Iterator[FakeDenoiser]:
    denoiser = FakeDenoiser()
    yield denoiser
    denoiser.gate.set()


@pytest.fixture
async def address(denoiser: FakeDenoiser) -> AsyncIterator[str]:
    server = make_server(denoiser)
    yield await server.start()
    denoiser.gate.set()
    await server.stop()


def make_concept(token: str, value: float = 0.5) -> Concept:
    return Concept(placeholder_token=token, learned_embeddings=np.full((1, DIM), value, np.float32))


# Where it listens


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "localhost:0", "[::1]:50051", "unix:/tmp/x"])
def test_this_machine_alone_needs_no_permission(listen: str) -> None:
    assert make_config(listen=listen).listen == listen


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", ":50051", "192.168.0.1:1", "box:1"])
def test_the_network_needs_an_explicit_permission(listen: str) -> None:
    with pytest.raises(ConfigError, match="without TLS or authentication"):
        make_config(listen=listen)
    assert make_config(listen=listen, insecure=True).listen == listen


@pytest.mark.parametrize("listen", ["", "localhost", "localhost:", "localhost:-1", "[::1]:65536"])
def test_an_address_without_a_port_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="must be host:port"):
        make_config(listen=listen, insecure=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_message_bytes", 0), ("host_threads", 0), ("grace_s", -1.0), ("stall_timeout_s", np.nan)],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        make_config(**{name: value})


async def test_a_port_in_use_is_a_clear_error(address: str) -> None:
    second = make_server(FakeDenoiser(), listen=address)
    with pytest.raises(ConfigError, match=f"cannot listen on {address}: the address is in use"):
        await second.start()
    await second.stop()


async def test_a_unix_socket_serves(denoiser: FakeDenoiser, tmp_path: Path) -> None:
    server = make_server(denoiser, listen=f"unix:{tmp_path / 'socket'}")
    address = await server.start()
    with Client(address) as client:
        info = await asyncio.to_thread(client.server_info)
    assert info.model.name == "fake"
    await server.stop()


# How it says what it is


async def test_health_is_known_for_the_whole_and_for_each_service(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_stub(channel)
        for name in ("", *SERVICES):
            response = await health.Check(health_pb2.HealthCheckRequest(service=name))
            learns = name != TRAINING_SERVICE  # this server has no model to learn on
            assert response.status == (SERVING if learns else NOT_SERVING), name
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() == StatusCode.NOT_FOUND


async def reflect(address: str, request: reflection_pb2.ServerReflectionRequest) -> Any:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # pyright: ignore[reportArgumentType]
        return await stub.ServerReflectionInfo(iter([request])).read()


async def test_reflection_describes_every_service(address: str) -> None:
    listed = await reflect(address, reflection_pb2.ServerReflectionRequest(list_services=""))
    assert {service.name for service in listed.list_services_response.service} == {
        "oneword.v1.ImageGenerationService",
        "oneword.v1.ImageJobService",
        "oneword.v1.ConceptService",
        "oneword.v1.ServerInfoService",
        "oneword.v1.TrainingService",
        "oneword.v1.AdminService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    for name in SERVICES:
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
        found = (await reflect(address, request)).file_descriptor_response
        content, *_imports = found.file_descriptor_proto
        assert FileDescriptorProto.FromString(content).package == "oneword.v1"


async def test_reflection_can_be_left_out(denoiser: FakeDenoiser) -> None:
    server = make_server(denoiser, reflection=False)
    address = await server.start()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reflect(address, reflection_pb2.ServerReflectionRequest(list_services=""))
    assert caught.value.code() == StatusCode.UNIMPLEMENTED
    await server.stop()


# How it stops


async def start_request(
    channel: grpc.aio.Channel, denoiser: FakeDenoiser
) -> "asyncio.Task[list[Any]]":
    """A request whose first denoiser call is held at the gate."""
    denoiser.gate.clear()
    stub = ImageGenerationServiceStub(channel)
    call = stub.Generate(GenerateRequest(prompt="a cat", num_inference_steps=3), timeout=WAIT_S)

    async def read_all() -> list[Any]:
        return [response async for response in call]

    task = asyncio.create_task(read_all())
    await asyncio.to_thread(denoiser.wait_for_calls, 1)
    return task


async def test_draining_finishes_what_runs_and_refuses_what_comes(denoiser: FakeDenoiser) -> None:
    server = make_server(denoiser)
    address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_stub(channel)
        # A watcher never ends by itself and must not hold the server up.
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0]))
        assert (await watch.read()).status == SERVING
        running = await start_request(channel, denoiser)
        stopping = asyncio.create_task(server.stop(grace_s=WAIT_S))
        assert (await watch.read()).status == NOT_SERVING
        response = await health.Check(health_pb2.HealthCheckRequest())
        assert response.status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ImageGenerationServiceStub(channel).Generate(GenerateRequest()).read()
        assert caught.value.code() == StatusCode.UNAVAILABLE
        assert "shutting down" in (caught.value.details() or "")
        assert not stopping.done()
        denoiser.gate.set()
        assert (await running)[-1].HasField("summary")
        await asyncio.wait_for(stopping, WAIT_S / 2)


async def test_what_is_not_done_within_the_grace_is_told_so(denoiser: FakeDenoiser) -> None:
    server = make_server(denoiser)
    address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        running = await start_request(channel, denoiser)
        stopping = asyncio.create_task(server.stop(grace_s=0.05))
        await asyncio.sleep(0.1)
        denoiser.gate.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running
        assert caught.value.code() == StatusCode.UNAVAILABLE
        assert "shut down" in (caught.value.details() or "")
        await stopping
    assert denoiser.num_calls == 1


async def test_serve_runs_until_it_is_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def open_fake(bundle: Path, **_settings: Any) -> Pipeline:
        opened.append(bundle)
        return make_pipeline(FakeDenoiser())

    monkeypatch.setattr(Pipeline, "open", open_fake)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    addresses: asyncio.Queue[str] = asyncio.Queue()
    serving = asyncio.create_task(
        serve(make_config(bundle=Path("b"), model_process=False), addresses.put_nowait)
    )
    with Client(await addresses.get()) as client:
        assert (await asyncio.to_thread(client.server_info)).model.name == "fake"
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(serving, WAIT_S)
    assert opened == [Path("b")]
    for number, handler in before.items():
        signal.signal(number, handler)


_SERVE_HELD = """
import asyncio
import sys
from pathlib import Path
from engine.pipeline import Pipeline
from engine.serving.serve import serve
from engine.serving.server_config import ServerConfig
from tests.fakes import FakeDenoiser, make_pipeline

def hold_and_tell(address):
    denoiser.gate.clear()
    print(address, flush=True)

denoiser = FakeDenoiser()
Pipeline.open = lambda *_arguments, **_settings: make_pipeline(denoiser)
config = ServerConfig(
    bundle=Path("none"), listen="127.0.0.1:0", grace_s=60.0, model_process=False
)
asyncio.run(serve(config, hold_and_tell))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _SERVE_HELD],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        address = process.stdout.readline().strip()
        with grpc.insecure_channel(address) as channel:
            call = ImageGenerationServiceStub(channel).Generate(GenerateRequest(), timeout=WAIT_S)
            assert next(call).HasField("accepted")
            health = health_stub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
            assert next(watch).status == SERVING
            process.send_signal(number)
            assert next(watch).status == NOT_SERVING
            assert process.poll() is None  # it waits for the request
            process.send_signal(number)
            assert process.wait(WAIT_S) == -number


# The client


async def in_thread(function: Any, *arguments: Any, **settings: Any) -> Any:
    return await asyncio.to_thread(function, *arguments, **settings)


async def test_the_client_generates_in_the_order_of_the_seeds(address: str) -> None:
    seen: list[Progress] = []
    with Client(address, timeout_s=WAIT_S) as client:
        result = await in_thread(
            client.generate,
            prompt="a cat",
            num_images=3,
            num_inference_steps=2,
            seed=5,
            on_progress=seen.append,
        )
        one = await in_thread(
            client.generate, GenerateRequest(prompt="a cat", num_inference_steps=2, seed=6)
        )
    assert list(result.summary.seeds) == [5, 6, 7]
    assert len(result.images) == 3 and len(result.request_id) == 32
    assert len(seen) == 6
    assert _pixels(one.images[0]) == _pixels(result.images[1])


def _pixels(content: bytes) -> bytes:
    return Image.open(io.BytesIO(content)).tobytes()


async def test_the_client_keeps_concepts(address: str) -> None:
    with Client(address) as client:
        for token in ("<a>", "<b>", "<c>"):
            content = concept_to_bytes(make_concept(token))
            assert (await in_thread(client.import_concept, content)).changed
        listed = await in_thread(lambda: list(client.list()))
        described = await in_thread(client.get, "<b>")
        exported = await in_thread(client.export, "<b>", "diffusers")
        await in_thread(client.delete, "<b>")
        rest = await in_thread(lambda: list(client.list()))
        renamed = await in_thread(client.import_concept, exported, placeholder_token="<d>")
    assert [concept.placeholder_token for concept in listed] == ["<a>", "<b>", "<c>"]
    assert described == listed[1]
    assert [concept.placeholder_token for concept in rest] == ["<a>", "<c>"]
    assert renamed.concept.concept_id == make_concept("<d>").concept_id


async def test_the_client_says_what_the_server_refused(address: str) -> None:
    with Client(address) as client, pytest.raises(ServerError, match="unknown concept") as caught:
        await in_thread(client.generate, prompt="a <cat-toi>")
    assert caught.value.code == StatusCode.NOT_FOUND


async def test_the_client_names_its_timeout(address: str, denoiser: FakeDenoiser) -> None:
    denoiser.gate.clear()
    with Client(address, timeout_s=0.1) as client, pytest.raises(ServerError) as caught:
        await in_thread(client.generate, prompt="a cat")
    assert caught.value.code == StatusCode.DEADLINE_EXCEEDED
    assert "no answer within 0.1 s" in str(caught.value)


def test_the_client_says_how_to_start_a_server() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(ServerError) as caught:
        client.server_info()
    assert str(caught.value) == "no server at 127.0.0.1:1; start one with `oneword serve`"
    assert caught.value.code == StatusCode.UNAVAILABLE


def test_the_client_knows_a_server_of_another_kind() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}") as client, pytest.raises(ServerError, match="not a OneWord"):
        client.server_info()
    server.stop(None).wait()


async def test_a_client_that_fails_in_its_own_code_leaves_the_server_free() -> None:
    denoiser = FakeDenoiser()
    denoiser.gate.clear()
    denoiser.free_calls = 1  # one step is reported, the next one is held
    server = make_server(denoiser)
    address = await server.start()

    def fail(_progress: Progress) -> None:
        raise KeyboardInterrupt

    def generate() -> None:
        with Client(address) as client, pytest.raises(KeyboardInterrupt):
            client.generate(prompt="a cat", num_inference_steps=100, on_progress=fail)

    await in_thread(generate)
    for _ in range(500):
        if server.generation.active == 0:
            break
        await asyncio.sleep(0.01)
    assert server.generation.active == 0
    denoiser.gate.set()
    await server.stop()
    assert denoiser.num_calls <= 2, "the call under way, and none after it"
