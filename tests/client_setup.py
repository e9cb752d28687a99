"""A real gRPC server that does as a test tells it, call by call, and both clients to call it."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc import StatusCode
from grpc_status import rpc_status

from engine.client import AsyncClient, Client
from protos.oneword.v1 import (
    admin_pb2,
    concepts_pb2,
    generation_pb2,
    server_info_pb2,
    training_pb2,
)
from protos.oneword.v1.generation_pb2 import GenerateRequest, GenerateResponse, Job

WAIT_S = 20.0  # for what takes milliseconds, on a machine that has other things to do
Behaviour = Callable[[Any, grpc.ServicerContext], Iterable[Message]]
_FILES = (generation_pb2, concepts_pb2, server_info_pb2, training_pb2, admin_pb2)


@dataclass(frozen=True)
class Seen:
    """A call as it came in."""

    request: Any
    remaining_s: float | None
    authorization: str


@dataclass
class ScriptedServer:
    """What each method does, one behaviour a call; the last one goes for the rest."""

    script: dict[str, list[Behaviour]]
    address: str = "127.0.0.1:0"
    credentials: grpc.ServerCredentials | None = None
    seen: dict[str, list[Seen]] = field(default_factory=dict[str, list[Seen]])

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        pool = ThreadPoolExecutor(8)
        self._server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
        for file in _FILES:
            for service in file.DESCRIPTOR.services_by_name.values():
                handlers = {method.name: self._handler(method) for method in service.methods}
                generic = grpc.method_handlers_generic_handler(service.full_name, handlers)
                self._server.add_generic_rpc_handlers((generic,))
        host = self.address.rpartition(":")[0]
        port = (
            self._server.add_insecure_port(self.address)
            if self.credentials is None
            else self._server.add_secure_port(self.address, self.credentials)
        )
        self.address = f"{host}:{port}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def requests(self, method: str) -> list[Any]:
        return [seen.request for seen in self.seen.get(method, [])]

    def _handler(self, method: Any) -> Any:
        def behave(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            request = list(requests) if method.client_streaming else next(requests)
            sent = {key: str(value) for key, value in context.invocation_metadata()}
            call = Seen(request, context.time_remaining(), sent.get("authorization", ""))
            with self._lock:
                calls = self.seen.setdefault(method.name, [])
                calls.append(call)
                behaviours = self.script[method.name]
                behaviour = behaviours[min(len(calls), len(behaviours)) - 1]
            yield from behaviour(request, context)

        # On the wire a call with one message is a stream of one.
        return grpc.stream_stream_rpc_method_handler(
            behave,
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )


# What a method may do.


def answer(*responses: Message) -> Behaviour:
    return lambda _request, _context: responses


def fail(
    code: StatusCode,
    text: str = "told to",
    *details: Message,
    trailers: Sequence[tuple[str, str]] = (),
    after: Iterable[Message] = (),
) -> Behaviour:
    """Fail as a OneWord server does where there are details, else as a transport or a proxy."""

    def behave(_request: Any, context: grpc.ServicerContext) -> Iterator[Message]:
        yield from after
        metadata: list[Any] = [*trailers]
        if details:
            packed = [Packed() for _ in details]
            for box, detail in zip(packed, details, strict=True):
                box.Pack(detail)
            status = Status(code=code.value[0], message=text, details=packed)
            metadata += rpc_status.to_status(status).trailing_metadata or ()
        context.set_trailing_metadata(tuple(metadata))
        context.abort(code, text)

    return behave


def come_back(seconds: float) -> tuple[Message, Message]:
    """The details of QueueFull."""
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromNanoseconds(round(seconds * 1e9))
    return error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="oneword"), retry


def draw(request: GenerateRequest, _context: Any = None) -> Iterator[GenerateResponse]:
    """What a server answers: the seed follows from the id, and the images from the seed."""
    digest = hashlib.sha256(request.request_id.encode()).digest()
    seed = request.seed if request.HasField("seed") else int.from_bytes(digest[:4], "little")
    count = request.num_images or 1
    accepted = generation_pb2.Accepted(request_id=request.request_id, seed=seed)
    yield GenerateResponse(accepted=accepted)
    for index in range(count):
        for step in (1, 2):
            progress = generation_pb2.Progress(image_index=index, step=step, num_steps=2)
            yield GenerateResponse(progress=progress)
        image = generation_pb2.ImageResult(
            image_index=index, seed=seed + index, image=picture(request.prompt, seed + index)
        )
        yield GenerateResponse(image=image)
    seeds = range(seed, seed + count)
    yield GenerateResponse(summary=generation_pb2.Summary(seeds=seeds, sampler="ddim"))


def picture(prompt: str, seed: int) -> bytes:
    return f"{prompt} {seed}".encode()


def draw_until(num_events: int, end: Behaviour) -> Behaviour:
    """Some events of a request, then something else."""

    def behave(request: Any, context: grpc.ServicerContext) -> Iterator[Message]:
        for _, event in zip(range(num_events), draw(request), strict=False):
            yield event
        yield from end(request, context)

    return behave


def hang(_request: Any, context: grpc.ServicerContext) -> Iterator[Message]:
    """Say nothing more until the caller has gone."""
    gone = threading.Event()
    if context.add_callback(gone.set):
        assert gone.wait(WAIT_S)
    return iter(())


def job(state: Any, num_images_done: int = 0, **fields: Any) -> Job:
    return Job(job_id="j", state=state, num_images_done=num_images_done, **fields)


# Both clients.


@dataclass
class FakeTime:
    """A clock that only sleeping moves."""

    now: float = 1000.0
    chance: float = 1.0  # the longest that full jitter allows
    slept: list[float] = field(default_factory=list[float])

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    async def async_sleep(self, seconds: float) -> None:
        self.sleep(seconds)


@dataclass
class Caller:
    """One of the clients, called the same way as the other."""

    client: Any

    async def call(self, use: Callable[[Any], Any]) -> Any:
        if isinstance(self.client, AsyncClient):
            return await use(self.client)
        return await asyncio.to_thread(use, self.client)

    async def all(self, use: Callable[[Any], Any]) -> list[Any]:
        """What an iterator of either kind gives."""
        if isinstance(self.client, AsyncClient):
            return [item async for item in use(self.client)]
        return await asyncio.to_thread(lambda: list(use(self.client)))


@asynccontextmanager
async def calling(
    kind: str, address: str, *, fake: FakeTime | None = None, **settings: Any
) -> AsyncGenerator[Caller]:
    if kind == "asyncio":
        if fake is not None:
            settings |= {"clock": fake.clock, "sleep": fake.async_sleep}
            settings |= {"chance": lambda: fake.chance}
        async with AsyncClient(address, **settings) as client:
            yield Caller(client)
        return
    if fake is not None:
        settings |= {"clock": fake.clock, "sleep": fake.sleep, "chance": lambda: fake.chance}
    with Client(address, **settings) as client:
        yield Caller(client)
