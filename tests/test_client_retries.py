"""When a client repeats a call: its policy alone, and against a server that fails."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from google.rpc import error_details_pb2
from grpc import StatusCode

from engine.client.errors import Hints, ServerError
from engine.client.retries import Attempts, RetryPolicy, ServerRecord
from engine.errors import ConfigError
from protos.oneword.v1 import concepts_pb2, server_info_pb2
from protos.oneword.v1.generation_pb2 import GenerateRequest
from tests.client_setup import (
    Behaviour,
    FakeTime,
    ScriptedServer,
    answer,
    calling,
    come_back,
    draw,
    fail,
    hang,
)

UNAVAILABLE = fail(StatusCode.UNAVAILABLE)
INFO = answer(server_info_pb2.GetServerInfoResponse())
Serve = Callable[..., ScriptedServer]


@pytest.fixture(params=["blocking", "asyncio"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    servers: list[ScriptedServer] = []

    def start(**script: list[Behaviour]) -> ScriptedServer:
        servers.append(ScriptedServer(script))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def broken(code: StatusCode = StatusCode.UNAVAILABLE, **hints: Any) -> ServerError:
    return ServerError(code, "broken", hints=Hints(**hints), transient=True, fate="unknown")


def attempts_of(policy: RetryPolicy, fake: FakeTime, record: Any = None, **settings: Any) -> Any:
    settings = {"timeout_s": None, "patient": False, **settings}
    record = record or ServerRecord(policy)
    return Attempts(record, clock=fake.clock, random=lambda: fake.chance, **settings)


# The policy


def test_backoff_doubles_to_a_cap_and_jitter_takes_any_part_of_it() -> None:
    policy = RetryPolicy(initial_backoff_s=0.5, max_backoff_s=3.0)
    assert [policy.backoff_s(n, 1.0) for n in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert [policy.backoff_s(3, chance) for chance in (0.0, 0.25, 0.5)] == [0.0, 0.5, 1.0]
    assert policy.backoff_s(10**9, 1.0) == 3.0


@pytest.mark.parametrize(
    "settings",
    [
        {"max_attempts": 0},
        {"initial_backoff_s": 0.0},
        {"max_backoff_s": float("nan")},
        {"budget_ratio": -1.0},
    ],
    ids=str,
)
def test_a_policy_that_cannot_be_followed_is_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=name):
        RetryPolicy(**settings)


def test_a_server_that_fails_too_often_is_left_alone_until_it_succeeds() -> None:
    """gRFC A6: no retries with half of the tokens or less."""
    policy = RetryPolicy(max_attempts=100, budget=6.0, budget_ratio=0.5)
    record, fake = ServerRecord(policy), FakeTime()
    record.succeeded()
    attempts = attempts_of(policy, fake, record)
    attempts.failed(broken())  # 5 tokens are left
    attempts.failed(broken())  # 4
    with pytest.raises(ServerError):
        attempts.failed(broken())  # 3: half
    for _ in range(3):  # 4.5 tokens: one failure is forgiven again
        record.succeeded()
    attempts_of(policy, fake, record).failed(broken(retry_after_s=1.0))  # takes no token
    with pytest.raises(ServerError):
        later = attempts_of(policy, fake, record)
        later.failed(broken())
        later.failed(broken())


def test_a_patient_call_outlasts_an_absence_and_no_more() -> None:
    policy = RetryPolicy(max_attempts=2, max_backoff_s=8.0, max_outage_s=60.0, budget=4.0)
    fake = FakeTime()
    record = ServerRecord(policy)
    record.succeeded()
    attempts = attempts_of(policy, fake, record, patient=True)
    with pytest.raises(ServerError):
        while True:
            fake.sleep(attempts.failed(broken()))
    assert 60.0 < sum(fake.slept) <= 68.0
    assert fake.slept[:2] == [0.2, 8.0], "an empty budget makes it wait for longer, not give up"
    attempts = attempts_of(policy, fake, record, patient=True)
    for gains in range(100):  # an answer in between begins a new absence
        fake.sleep(attempts.failed(broken()))
        fake.sleep(30.0)
        attempts.answered(gains)


def test_what_was_gained_gives_new_attempts() -> None:
    policy = RetryPolicy(max_attempts=2, budget=1000.0)
    record = ServerRecord(policy)
    record.succeeded()
    attempts = attempts_of(policy, FakeTime(), record)
    for gains in range(1, 10):
        attempts.answered(gains)
        attempts.failed(broken())
    attempts.answered(9)  # the same once more
    with pytest.raises(ServerError):
        attempts.failed(broken())


# Against a server


async def test_a_call_is_repeated_until_it_succeeds(kind: str, serve: Serve) -> None:
    server, fake = serve(GetServerInfo=[UNAVAILABLE, UNAVAILABLE, INFO]), FakeTime()
    async with calling(kind, server.address, fake=fake) as caller:
        await caller.call(lambda client: client.server_info())
    assert len(server.requests("GetServerInfo")) == 3
    assert fake.slept == [0.2, 0.4]


async def test_a_call_is_not_repeated_for_ever(kind: str, serve: Serve) -> None:
    server, fake = serve(GetServerInfo=[UNAVAILABLE]), FakeTime(chance=0.5)
    policy = RetryPolicy(max_attempts=4)
    async with calling(kind, server.address, fake=fake, retry=policy) as caller:
        with pytest.raises(ServerError, match="try again") as caught:
            await caller.call(lambda client: client.server_info())
    assert (caught.value.attempts, len(server.requests("GetServerInfo"))) == (4, 4)
    assert fake.slept == [0.1, 0.2, 0.4]


async def test_the_budget_is_that_of_the_client(kind: str, serve: Serve) -> None:
    server, fake = serve(GetServerInfo=[UNAVAILABLE]), FakeTime()
    policy = RetryPolicy(max_attempts=3, budget=10.0)
    async with calling(kind, server.address, fake=fake, retry=policy) as caller:
        counts: list[int] = []
        for _ in range(4):
            with pytest.raises(ServerError) as caught:
                await caller.call(lambda client: client.server_info())
            counts.append(caught.value.attempts)
    assert counts == [3, 2, 1, 1], "the tokens are 7, 5, 4, 3 afterwards"


@pytest.mark.parametrize(
    "code",
    [
        StatusCode.INVALID_ARGUMENT,
        StatusCode.NOT_FOUND,
        StatusCode.ALREADY_EXISTS,
        StatusCode.FAILED_PRECONDITION,
        StatusCode.PERMISSION_DENIED,
        StatusCode.UNAUTHENTICATED,
        StatusCode.DEADLINE_EXCEEDED,
        StatusCode.INTERNAL,
        StatusCode.UNKNOWN,
        StatusCode.DATA_LOSS,
        StatusCode.UNIMPLEMENTED,
        StatusCode.CANCELLED,
    ],
    ids=str,
)
async def test_what_would_fail_again_is_not_repeated(
    kind: str, serve: Serve, code: StatusCode
) -> None:
    server, fake = serve(Generate=[fail(code)]), FakeTime()
    async with calling(kind, server.address, fake=fake) as caller:
        with pytest.raises(ServerError) as caught:
            await caller.call(lambda client: client.generate(prompt="a cat"))
    assert caught.value.code == code
    assert (len(server.requests("Generate")), fake.slept) == (1, [])


@pytest.mark.parametrize(
    ("behaviour", "num_calls"),
    [
        (fail(StatusCode.ABORTED), 2),
        (fail(StatusCode.INTERNAL, "Received RST_STREAM with error code 2"), 2),
        (fail(StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!"), 2),
        (fail(StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 8)"), 1),
        # A full disk says nothing of when it will have room.
        (
            fail(
                StatusCode.RESOURCE_EXHAUSTED,
                "full",
                error_details_pb2.ErrorInfo(reason="STORAGE_FULL"),
            ),
            1,
        ),
        (fail(StatusCode.UNAVAILABLE, trailers=[("grpc-retry-pushback-ms", "-1")]), 1),
        (fail(StatusCode.UNAVAILABLE, trailers=[("grpc-retry-pushback-ms", "soon")]), 1),
        (fail(StatusCode.RESOURCE_EXHAUSTED, "full", *come_back(3600.0)), 1),
        (
            fail(
                StatusCode.INTERNAL,
                "RST_STREAM",
                error_details_pb2.RequestInfo(request_id="r"),
            ),
            1,
        ),
    ],
    ids=[
        "aborted",
        "reset",
        "too-many-calls",
        "too-large",
        "disk-full",
        "forbidden",
        "pushback-of-nothing",
        "in-an-hour",
        "a-bug-of-the-server",
    ],
)
async def test_what_may_succeed_later_is_repeated(
    kind: str, serve: Serve, behaviour: Behaviour, num_calls: int
) -> None:
    server = serve(GetServerInfo=[behaviour, INFO])
    async with calling(kind, server.address, fake=FakeTime()) as caller:
        if num_calls == 1:
            with pytest.raises(ServerError):
                await caller.call(lambda client: client.server_info())
        else:
            await caller.call(lambda client: client.server_info())
    assert len(server.requests("GetServerInfo")) == num_calls


@pytest.mark.parametrize(
    "full",
    [
        fail(StatusCode.RESOURCE_EXHAUSTED, "full", *come_back(2.5)),
        fail(StatusCode.RESOURCE_EXHAUSTED, "full", trailers=[("grpc-retry-pushback-ms", "2500")]),
    ],
    ids=["RetryInfo", "pushback"],
)
async def test_a_client_comes_back_when_it_was_told_to_and_not_before(
    kind: str, serve: Serve, full: Behaviour
) -> None:
    server = serve(Generate=[full, full, draw])
    for chance, expected in ((0.0, [2.5, 2.5]), (1.0, [2.7, 2.9])):
        server.seen.clear()
        fake = FakeTime(chance=chance)
        async with calling(kind, server.address, fake=fake) as caller:
            await caller.call(lambda client: client.generate(prompt="a cat"))
        assert fake.slept == pytest.approx(expected)  # the sum of two decimals
        ids = {request.request_id for request in server.requests("Generate")}
        assert len(server.requests("Generate")) == 3 and len(ids) == 1


async def test_a_server_that_says_when_takes_no_tokens(kind: str, serve: Serve) -> None:
    full = fail(StatusCode.RESOURCE_EXHAUSTED, "full", *come_back(1.0))
    server = serve(GetServerInfo=[*[full] * 30, INFO])
    policy = RetryPolicy(max_attempts=31, budget=2.0)
    async with calling(kind, server.address, fake=FakeTime(), retry=policy) as caller:
        await caller.call(lambda client: client.server_info())
    assert len(server.requests("GetServerInfo")) == 31


# Deadlines


async def test_all_attempts_share_one_deadline(kind: str, serve: Serve) -> None:
    server, fake = serve(GetServerInfo=[UNAVAILABLE]), FakeTime()
    policy = RetryPolicy(max_attempts=100, initial_backoff_s=80.0, max_backoff_s=100.0)
    async with calling(kind, server.address, fake=fake, timeout_s=200.0, retry=policy) as caller:
        with pytest.raises(ServerError) as caught:
            await caller.call(lambda client: client.server_info())
    # After 80 s and 100 s 20 are left: the next attempt would begin after the end.
    assert fake.slept == [80.0, 100.0]
    assert caught.value.code == StatusCode.UNAVAILABLE, "what failed, not that time ran out"
    remaining = [seen.remaining_s for seen in server.seen["GetServerInfo"]]
    assert len(remaining) == 3
    for told, most in zip(remaining, (200.0, 120.0, 20.0), strict=True):
        # gRPC rounds up on the wire, by at most one part in 100; the call itself takes a moment.
        assert told is not None and most - 15.0 < told <= most * 1.01


async def test_a_sleep_that_took_too_long_begins_no_attempt(kind: str, serve: Serve) -> None:
    server = serve(GetServerInfo=[UNAVAILABLE])

    class Oversleeping(FakeTime):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds + 100.0)

    fake = Oversleeping()
    async with calling(kind, server.address, fake=fake, timeout_s=20.0) as caller:
        with pytest.raises(ServerError) as caught:
            await caller.call(lambda client: client.server_info())
    assert caught.value.code == StatusCode.UNAVAILABLE
    assert len(server.requests("GetServerInfo")) == 1


async def test_a_deadline_that_passes_is_the_end(kind: str, serve: Serve) -> None:
    server = serve(Generate=[hang])
    async with calling(kind, server.address, fake=FakeTime(), timeout_s=30.0) as caller:
        with pytest.raises(ServerError, match=r"no answer within 0\.2 s") as caught:
            await caller.call(lambda client: client.generate(prompt="a cat", timeout_s=0.2))
    assert caught.value.code == StatusCode.DEADLINE_EXCEEDED
    assert len(server.requests("Generate")) == 1


# What errors tell


async def test_an_error_tells_what_the_server_told(kind: str, serve: Serve) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="width", description="odd")
    refusal = fail(
        StatusCode.INVALID_ARGUMENT,
        "width must be even",
        error_details_pb2.ErrorInfo(reason="INVALID_REQUEST", domain="oneword"),
        error_details_pb2.BadRequest(field_violations=[violation]),
        error_details_pb2.RequestInfo(request_id="abc"),
    )
    server = serve(Generate=[refusal])
    async with calling(kind, server.address) as caller:
        with pytest.raises(ServerError, match="width must be even") as caught:
            await caller.call(lambda client: client.generate(prompt="a cat"))
    error = caught.value
    assert (error.code, error.reason) == (StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert [(v.field, v.description) for v in error.field_violations] == [("width", "odd")]
    assert (error.request_id, error.retry_after_s, error.transient) == ("abc", None, False)


async def test_details_that_are_none_do_no_harm(kind: str, serve: Serve) -> None:
    def behave(_request: Any, context: Any) -> Any:
        context.set_trailing_metadata([("grpc-status-details-bin", b"\xff\xff\xff")])
        context.abort(StatusCode.NOT_FOUND, "not here")
        yield

    server = serve(GetConcept=[behave])
    async with calling(kind, server.address) as caller:
        with pytest.raises(ServerError, match="not here") as caught:
            await caller.call(lambda client: client.get("<cat>"))
    assert (caught.value.code, caught.value.reason) == (StatusCode.NOT_FOUND, "")


# Ids, and calls that remove something


async def test_a_request_keeps_its_id_and_is_left_as_it_was(kind: str, serve: Serve) -> None:
    server = serve(Generate=[UNAVAILABLE, draw])
    request = GenerateRequest(prompt="a cat")
    async with calling(kind, server.address, fake=FakeTime()) as caller:
        await caller.call(lambda client: client.generate(request))
        await caller.call(lambda client: client.generate(request))
        await caller.call(lambda client: client.generate(prompt="a cat", request_id="mine"))
    assert request == GenerateRequest(prompt="a cat")
    ids = [sent.request_id for sent in server.requests("Generate")]
    assert ids[0] == ids[1] != ids[2] and ids[3] == "mine"
    assert all(len(made) == 32 for made in ids[:3])


@pytest.mark.parametrize(
    ("first", "is_error"),
    [
        (fail(StatusCode.UNAVAILABLE, "connection reset"), False),
        # The server itself has refused it: nothing was removed.
        (
            fail(
                StatusCode.UNAVAILABLE,
                "shutting down",
                error_details_pb2.ErrorInfo(reason="SHUTTING_DOWN"),
            ),
            True,
        ),
        (answer(concepts_pb2.DeleteConceptResponse()), False),
    ],
    ids=["lost", "refused", "answered"],
)
async def test_what_is_gone_after_a_lost_answer_was_deleted(
    kind: str, serve: Serve, first: Behaviour, is_error: bool
) -> None:
    server = serve(DeleteConcept=[first, fail(StatusCode.NOT_FOUND, "no such concept")])
    async with calling(kind, server.address, fake=FakeTime()) as caller:
        if is_error:
            with pytest.raises(ServerError, match="no such concept"):
                await caller.call(lambda client: client.delete("<cat>"))
        else:
            await caller.call(lambda client: client.delete("<cat>"))


@pytest.mark.parametrize(("reason", "attempts"), [("STALE_ETAG", 1), ("", 5)])
async def test_an_etag_of_before_does_not_become_right_by_waiting(
    kind: str, serve: Serve, reason: str, attempts: int
) -> None:
    info = error_details_pb2.ErrorInfo(reason=reason)
    server = serve(DeleteConceptAlias=[fail(StatusCode.ABORTED, "no", info)])
    async with calling(kind, server.address, fake=FakeTime()) as caller:
        with pytest.raises(ServerError) as caught:
            await caller.call(lambda client: client.delete_alias("<cat>", "stable", etag="e"))
    assert (caught.value.code, caught.value.attempts) == (StatusCode.ABORTED, attempts)
    assert server.requests("DeleteConceptAlias")[0].etag == "e"


# Nobody there


async def test_where_nobody_ever_was_is_not_waited_for_unless_told(kind: str) -> None:
    fake = FakeTime()
    async with calling(kind, "127.0.0.1:1", fake=fake) as caller:
        with pytest.raises(ServerError, match="no server at 127.0.0.1:1; start one") as caught:
            await caller.call(lambda client: client.server_info())
    assert (caught.value.attempts, caught.value.fate, fake.slept) == (1, "unsent", [])
    policy = RetryPolicy(wait_for_server=True, max_attempts=3)
    async with calling(kind, "127.0.0.1:1", fake=fake, retry=policy) as caller:
        with pytest.raises(ServerError) as caught:
            await caller.call(lambda client: client.server_info())
    assert (caught.value.attempts, len(fake.slept)) == (3, 2)


async def test_an_address_that_is_none_is_told_at_once(kind: str) -> None:
    fake = FakeTime()
    async with calling(kind, "127.0.0.1:x", fake=fake) as caller:
        with pytest.raises(ServerError, match="127.0.0.1:x cannot be looked up") as caught:
            await caller.call(lambda client: client.server_info())
    assert (caught.value.fate, fake.slept) == ("unsent", [])


async def test_a_server_that_went_away_is_waited_for(kind: str, serve: Serve) -> None:
    server, fake = serve(GetServerInfo=[INFO]), FakeTime()
    async with calling(
        kind, server.address, fake=fake, retry=RetryPolicy(max_attempts=3)
    ) as caller:
        await caller.call(lambda client: client.server_info())
        server.stop()
        with pytest.raises(ServerError) as caught:
            await caller.call(lambda client: client.server_info())
    assert (caught.value.attempts, len(fake.slept)) == (3, 2)
