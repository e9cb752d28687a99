"""Streams of images that break: what their caller gets, and what the server is asked for."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from typing import Any

import pytest
from google.protobuf.message import Message
from grpc import StatusCode

from engine.client import AsyncClient, Client, GenerationResult
from engine.client.errors import ServerError
from engine.client.retries import RetryPolicy
from engine.errors import InvalidRequest
from protos.oneword.v1 import generation_pb2
from protos.oneword.v1.generation_pb2 import (
    Accepted,
    GenerateBatchRequest,
    GenerateBatchResponse,
    GenerateRequest,
    GenerateResponse,
    ImageResult,
    Progress,
    Summary,
)
from tests.client_setup import (
    WAIT_S,
    Behaviour,
    FakeTime,
    ScriptedServer,
    answer,
    calling,
    come_back,
    draw,
    draw_until,
    fail,
    hang,
    picture,
)
from tests.test_client_retries import Serve
from tests.test_client_retries import kind as kind
from tests.test_client_retries import serve as serve
from tests.wire_cutter import WireCutter

UNAVAILABLE = fail(StatusCode.UNAVAILABLE)
# The events of an image: two steps, and itself.
AFTER_ONE_IMAGE = 1 + 3


@pytest.fixture
async def cutter(serve: Serve) -> AsyncIterator[tuple[ScriptedServer, WireCutter]]:
    server = serve(Generate=[draw_until(AFTER_ONE_IMAGE, hang), draw])
    wire = WireCutter(server.address)
    yield server, wire
    await asyncio.to_thread(wire.close)


def names(events: list[Any]) -> list[str]:
    return [type(event).__name__ for event in events]


ALL_EVENTS = ["Accepted", *["Progress", "Progress", "ImageResult"] * 3, "Summary"]


# One request


@pytest.mark.parametrize("num_events", range(11), ids=str)
async def test_a_stream_that_breaks_anywhere_tells_everything_once(
    kind: str, serve: Serve, num_events: int
) -> None:
    server = serve(Generate=[draw_until(num_events, UNAVAILABLE), draw])
    async with calling(kind, server.address, fake=FakeTime()) as caller:
        events = await caller.all(lambda client: client.stream(prompt="a cat", num_images=3))
    assert names(events) == ALL_EVENTS
    (summary,) = [event for event in events if isinstance(event, Summary)]
    pictures = [event.image for event in events if isinstance(event, ImageResult)]
    assert pictures == [picture("a cat", seed) for seed in summary.seeds]
    first, second = server.requests("Generate")
    assert first == second and first.request_id


async def test_a_connection_that_is_cut_is_one_that_breaks(
    kind: str, cutter: tuple[ScriptedServer, WireCutter]
) -> None:
    server, wire = cutter
    events: list[Any] = []

    def take(event: Any) -> None:
        events.append(event)
        if isinstance(event, ImageResult) and len(server.requests("Generate")) == 1:
            wire.cut()

    if kind == "asyncio":
        async with AsyncClient(wire.address) as client:
            async for event in client.stream(prompt="a cat", num_images=3):
                take(event)
    else:

        def run() -> None:
            with Client(wire.address) as client:
                for event in client.stream(prompt="a cat", num_images=3):
                    take(event)

        await asyncio.to_thread(run)
    assert names(events) == ALL_EVENTS
    assert len({request.request_id for request in server.requests("Generate")}) == 1


async def test_images_give_new_attempts(kind: str, serve: Serve) -> None:
    breaks = [draw_until(1 + 3 * count, UNAVAILABLE) for count in range(1, 4)]
    server = serve(Generate=[*breaks, draw])
    policy = RetryPolicy(max_attempts=2)
    async with calling(kind, server.address, fake=FakeTime(), retry=policy) as caller:
        result = await caller.call(lambda client: client.generate(prompt="a", num_images=3))
    assert len(result.images) == 3 and len(server.requests("Generate")) == 4
    server.seen.clear()
    server.script["Generate"] = [draw_until(AFTER_ONE_IMAGE, UNAVAILABLE)]
    async with calling(kind, server.address, fake=FakeTime(), retry=policy) as caller:
        with pytest.raises(ServerError) as caught:
            await caller.call(lambda client: client.generate(prompt="a", num_images=3))
    assert caught.value.attempts == len(server.requests("Generate")) == 2


async def test_images_of_two_requests_are_not_mixed(kind: str, serve: Serve) -> None:
    """A server that forgets the id begins another request: a random seed, another picture."""

    def forget(request: GenerateRequest, _context: Any) -> Iterator[Message]:
        other = GenerateRequest(prompt=request.prompt, request_id="other", num_images=3)
        yield from draw(other)

    server = serve(Generate=[draw_until(AFTER_ONE_IMAGE, UNAVAILABLE), forget])
    async with calling(kind, server.address, fake=FakeTime()) as caller:
        with pytest.raises(ServerError, match="with another seed") as caught:
            await caller.call(lambda client: client.generate(prompt="a cat", num_images=3))
    assert caught.value.code == StatusCode.ABORTED
    assert len(server.requests("Generate")) == 2


async def test_a_result_has_all_images(kind: str, serve: Serve) -> None:
    summary = GenerateResponse(summary=Summary(seeds=[1, 2]))
    for behaviour, message in (
        (answer(*list(draw(GenerateRequest()))[:-1], summary), "after 1 of 2 images"),
        (draw_until(4, lambda _request, _context: iter(())), "without a summary"),
    ):
        server = serve(Generate=[behaviour])
        async with calling(kind, server.address, fake=FakeTime()) as caller:
            with pytest.raises(ServerError, match=message) as caught:
                await caller.call(lambda client: client.generate(prompt="a"))
        assert caught.value.code == StatusCode.INTERNAL
        assert len(server.requests("Generate")) == 1


async def test_events_of_later_versions_are_left_out(kind: str, serve: Serve) -> None:
    known = list(draw(GenerateRequest(seed=1)))
    server = serve(Generate=[answer(GenerateResponse(), *known, GenerateResponse())])
    async with calling(kind, server.address) as caller:
        events = await caller.all(lambda client: client.stream(seed=1))
    assert names(events) == ["Accepted", "Progress", "Progress", "ImageResult", "Summary"]


def held(gone: threading.Event) -> Behaviour:
    """One image, then nothing; says when the caller has gone."""

    def behave(request: Any, context: Any) -> Iterator[Message]:
        context.add_callback(gone.set)
        yield from draw_until(AFTER_ONE_IMAGE, hang)(request, context)

    return behave


async def test_leaving_a_stream_cancels_it(kind: str, serve: Serve) -> None:
    gone = threading.Event()
    server = serve(Generate=[held(gone)])
    if kind == "asyncio":
        async with AsyncClient(server.address) as client:
            async with aclosing(client.stream(prompt="a", num_images=3)) as events:
                async for event in events:
                    if isinstance(event, Progress):
                        break
            assert await asyncio.to_thread(gone.wait, WAIT_S)
        return
    with Client(server.address) as client:
        with closing(client.stream(prompt="a", num_images=3)) as events:
            for event in events:
                if isinstance(event, Progress):
                    break
        assert await asyncio.to_thread(gone.wait, WAIT_S)


async def test_cancelling_a_task_cancels_its_call(serve: Serve) -> None:
    gone, began = threading.Event(), asyncio.Event()
    server = serve(Generate=[held(gone)])
    async with AsyncClient(server.address) as client:
        task = asyncio.create_task(
            client.generate(prompt="a", on_progress=lambda _progress: began.set(), num_images=2)
        )
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(gone.wait, WAIT_S)
    assert len(server.requests("Generate")) == 1


async def test_a_request_and_its_fields_are_one_too_many(kind: str, serve: Serve) -> None:
    server = serve(Generate=[draw])
    async with calling(kind, server.address) as caller:
        with pytest.raises(InvalidRequest, match="prompt besides"):
            await caller.call(lambda client: client.generate(GenerateRequest(), prompt="a"))
    assert not server.seen


# Many requests in one call


def batch(*failures: generation_pb2.Failure | None, cut_after: int | None = None) -> Behaviour:
    """Answers all items, turn by turn, as a server does; some fail, or the call after a while."""

    def events(request: GenerateBatchRequest) -> Iterator[GenerateBatchResponse]:
        streams: dict[int, Iterator[GenerateResponse]] = {}
        for index, item in enumerate(request.requests):
            if index < len(failures) and failures[index] is not None:
                yield GenerateBatchResponse(index=index, failure=failures[index])
            else:
                streams[index] = iter(list(draw(item)))
        while streams:
            for index, stream in list(streams.items()):
                event = next(stream, None)
                if event is None:
                    del streams[index]
                else:
                    yield GenerateBatchResponse(index=index, response=event)

    def behave(request: GenerateBatchRequest, context: Any) -> Iterator[GenerateBatchResponse]:
        told = list(events(request))
        yield from told[:cut_after]
        if cut_after is not None:
            context.abort(StatusCode.UNAVAILABLE, "connection reset")

    return behave


def failure(code: StatusCode, **fields: Any) -> generation_pb2.Failure:
    return generation_pb2.Failure(code=code.value[0], **fields)


REQUESTS = [GenerateRequest(prompt=prompt, num_images=2) for prompt in ("a", "b", "c")]


async def many(kind: str, server: ScriptedServer, **settings: Any) -> tuple[list[Any], list[int]]:
    """The outcomes, and the indices in the order in which they were told."""
    told: list[int] = []
    requests = settings.pop("requests", REQUESTS)
    async with calling(kind, server.address, **{"fake": FakeTime(), **settings}) as caller:
        outcomes = await caller.call(
            lambda client: client.generate_many(
                requests, on_result=lambda index, _outcome: told.append(index)
            )
        )
    return outcomes, told


def check_pictures(outcomes: list[Any], prompts: str = "abc") -> None:
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        assert isinstance(outcome, GenerationResult)
        assert outcome.images == [picture(prompt, seed) for seed in outcome.summary.seeds]
        assert len(outcome.images) == 2


@pytest.mark.parametrize("cut_after", [0, 1, 7, 12, 20, 23, 24], ids=str)
async def test_a_batch_goes_on_with_what_has_not_ended(
    kind: str, serve: Serve, cut_after: int
) -> None:
    """Each of the three items has 8 events; they come by turns."""
    server = serve(GenerateBatch=[batch(cut_after=cut_after), batch()])
    outcomes, told = await many(kind, server)
    check_pictures(outcomes)
    assert sorted(told) == [0, 1, 2], "each once"
    calls = server.requests("GenerateBatch")
    ended = max(0, cut_after - 21)
    assert [len(call.requests) for call in calls] == [3, 3 - ended][: 1 if ended == 3 else 2]
    if ended < 3:
        assert list(calls[1].requests) == list(calls[0].requests)[ended:]


async def test_the_failure_of_one_is_not_that_of_the_others(kind: str, serve: Serve) -> None:
    refused = failure(StatusCode.NOT_FOUND, message="no <b>", reason="UNKNOWN_CONCEPT")
    server = serve(GenerateBatch=[batch(None, refused)])
    outcomes, told = await many(kind, server)
    check_pictures([outcomes[0], outcomes[2]], "ac")
    assert isinstance(outcomes[1], ServerError)
    assert (outcomes[1].code, outcomes[1].reason) == (StatusCode.NOT_FOUND, "UNKNOWN_CONCEPT")
    assert str(outcomes[1]) == "no <b>" and sorted(told) == [0, 1, 2]
    assert len(server.requests("GenerateBatch")) == 1


async def test_items_that_may_succeed_later_are_asked_for_again(kind: str, serve: Serve) -> None:
    full = failure(StatusCode.RESOURCE_EXHAUSTED, message="full", retry_after_s=4.0)
    died = failure(StatusCode.UNAVAILABLE, message="the worker died")
    server, fake = serve(GenerateBatch=[batch(full, None, died), batch()]), FakeTime(chance=0.0)
    outcomes, _ = await many(kind, server, fake=fake)
    check_pictures(outcomes)
    first, second = server.requests("GenerateBatch")
    assert list(second.requests) == [first.requests[0], first.requests[2]]
    assert fake.slept == [4.0]


async def test_a_batch_that_cannot_go_on_keeps_what_is_done(kind: str, serve: Serve) -> None:
    refusal = fail(StatusCode.PERMISSION_DENIED, "not any more")
    server = serve(GenerateBatch=[batch(cut_after=22), refusal])
    outcomes, told = await many(kind, server)
    check_pictures(outcomes[:1], "a")
    assert [outcome.code for outcome in outcomes[1:]] == [StatusCode.PERMISSION_DENIED] * 2
    assert sorted(told) == [0, 1, 2]


async def test_many_requests_take_as_few_calls_as_they_fit_into(
    kind: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.client.generation.MAX_BATCH_REQUESTS", 2)
    server, fake = serve(GenerateBatch=[batch()]), FakeTime()
    outcomes, _ = await many(kind, server, fake=fake, requests=[*REQUESTS, *REQUESTS[:2]])
    check_pictures(outcomes, "abcab")
    assert [len(call.requests) for call in server.requests("GenerateBatch")] == [2, 2, 1]
    assert fake.slept == []
    monkeypatch.setattr("engine.client.generation.MAX_BATCH_BYTES", 1)
    server.seen.clear()
    check_pictures((await many(kind, server))[0])
    assert [len(call.requests) for call in server.requests("GenerateBatch")] == [1, 1, 1]
    assert await many(kind, server, requests=[]) == ([], [])


async def test_a_server_that_answers_what_was_not_asked_fails(kind: str, serve: Serve) -> None:
    strange = GenerateBatchResponse(index=7, response=GenerateResponse(accepted=Accepted()))
    server = serve(GenerateBatch=[answer(strange)])
    outcomes, _ = await many(kind, server)
    assert [outcome.code for outcome in outcomes] == [StatusCode.INTERNAL] * 3
    full = fail(StatusCode.RESOURCE_EXHAUSTED, "full", *come_back(1.0))
    server.script["GenerateBatch"] = [full, batch()]
    server.seen.clear()
    check_pictures((await many(kind, server))[0])
