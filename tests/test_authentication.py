"""Who may call what: every method, every way in, every way to get a token wrong."""

import asyncio
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2

from engine.errors import PermissionDenied, Unauthenticated
from engine.security.authentication import ANONYMOUS_QUOTA, Authentication, check_scope
from engine.security.callers import LOCAL_CALLER, Caller, Scope, current_caller
from engine.security.credential_edits import create_token, revoke_token
from engine.security.credential_source import CredentialSource
from engine.security.credentials import Credential
from engine.security.method_scopes import HEALTH, REFLECTION, SCOPE
from engine.security.rate_limits import Quota, TokenBucket
from protos.oneword.v1 import (
    admin_pb2,
    concepts_pb2,
    generation_pb2,
    server_info_pb2,
    training_pb2,
)
from tests import security_setup
from tests.security_setup import METHODS, Secured, StartSecured
from tests.service_harness import details
from tests.training_harness import TIMEOUT_S

# Fixtures.
start_secured, secured = security_setup.start_secured, security_setup.secured

GENERATE = "/oneword.v1.ImageGenerationService/Generate"
INFO = "/oneword.v1.ServerInfoService/GetServerInfo"
UNKNOWN = (
    "/oneword.v1.AdminService/Drain",
    "/oneword.v1.ImageGenerationService/generate",
    "/grpc.channelz.v1.Channelz/GetServers",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "//oneword.v1.ImageGenerationService/Generate",
    "/",
)


# The table


def registered_methods() -> set[str]:
    services = [
        service
        for file in (generation_pb2, concepts_pb2, server_info_pb2, training_pb2, admin_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
    ]
    return {
        f"/{service.full_name}/{method.name}" for service in services for method in service.methods
    }


def test_every_method_of_every_service_has_a_row() -> None:
    assert set(SCOPE) == registered_methods() | HEALTH | REFLECTION
    assert set(METHODS) == set(SCOPE), "and a request in these tests"


def test_a_method_without_a_row_is_refused_whoever_calls() -> None:
    everything = Caller(tenant="acme", name="root", scopes=frozenset(Scope))
    with pytest.raises(PermissionDenied, match="not open to anybody"):
        check_scope(Credential(key="x", caller=everything), "/oneword.v1.ConceptService/Purge")


async def test_without_credentials_there_is_a_local_caller() -> None:
    assert current_caller() == LOCAL_CALLER
    assert (LOCAL_CALLER.tenant, LOCAL_CALLER.scopes) == ("default", frozenset(Scope))


# Other paths (attack group 11)


@pytest.mark.parametrize("method", sorted(set(SCOPE) - HEALTH) + list(UNKNOWN))
async def test_no_path_is_open_without_credentials(secured: Secured, method: str) -> None:
    error = await secured.caller().refusal(method)
    assert (error.code(), error.details()) == (StatusCode.UNAUTHENTICATED, str(Unauthenticated()))
    assert details(error)["google.rpc.ErrorInfo"].reason == "UNAUTHENTICATED"
    assert secured.denoiser.num_calls == 0


async def test_a_caller_that_is_known_is_told_what_there_is_not(secured: Secured) -> None:
    caller = await secured.known()
    for method in UNKNOWN:
        assert (await caller.refusal(method)).code() == StatusCode.UNIMPLEMENTED, method


async def test_health_is_open_and_nothing_else(secured: Secured) -> None:
    stranger = secured.caller()
    (reply,) = await stranger.call("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    watch = stranger.start("/grpc.health.v1.Health/Watch", health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


async def test_health_can_be_closed_and_reflection_opened(start_secured: StartSecured) -> None:
    secured = await start_secured(authenticate_health=True, authenticate_reflection=False)
    stranger = secured.caller()
    for method in HEALTH:
        assert (await stranger.refusal(method)).code() == StatusCode.UNAUTHENTICATED
    (reflection,) = REFLECTION
    request = security_setup.sound_requests(reflection)
    (reply,) = await stranger.call(reflection, *request)
    assert reply.list_services_response.service


async def test_watchers_of_health_cannot_take_all_the_places(secured: Secured) -> None:
    stranger, request = secured.caller(), health_pb2.HealthCheckRequest()
    watches = [
        stranger.start("/grpc.health.v1.Health/Watch", request)
        for _ in range(ANONYMOUS_QUOTA.concurrent_rpcs)
    ]
    for watch in watches:
        await watch.read()
    error = await stranger.refusal("/grpc.health.v1.Health/Watch", request)
    assert error.code() == StatusCode.RESOURCE_EXHAUSTED
    caller = await secured.known()
    assert await caller.call(INFO, server_info_pb2.GetServerInfoRequest())
    for watch in watches:
        watch.cancel()


async def test_a_unix_socket_asks_for_credentials_too(
    start_secured: StartSecured, tmp_path: Path
) -> None:
    secured = await start_secured(listen=f"unix:{tmp_path / 'socket'}")
    assert (tmp_path / "socket").stat().st_mode & 0o777 == 0o600
    assert (await secured.caller().refusal(GENERATE)).code() == StatusCode.UNAUTHENTICATED
    caller = await secured.known()
    assert await caller.call(INFO, server_info_pb2.GetServerInfoRequest())


# Scopes


@pytest.mark.parametrize("scope", list(Scope))
async def test_a_scope_opens_its_methods_and_no_others(secured: Secured, scope: Scope) -> None:
    caller = await secured.known(scopes=[scope])
    for method, needed in SCOPE.items():
        if method in HEALTH or needed in (None, scope):
            continue
        error = await caller.refusal(method)
        assert error.code() == StatusCode.PERMISSION_DENIED, method
        assert f"needs the scope '{needed}'" in (error.details() or "")
        assert details(error)["google.rpc.ErrorInfo"].reason == "PERMISSION_DENIED"
    assert await caller.call(INFO, server_info_pb2.GetServerInfoRequest())
    assert secured.store.list(limit=1, tenant="acme") == []


async def test_each_kind_of_call_works_with_its_scope(secured: Secured) -> None:
    """Unary and streamed requests, unary and streamed replies, through the real gate."""
    caller = await secured.known()
    replies = await caller.call(GENERATE, *security_setup.sound_requests(GENERATE))
    assert replies[-1].HasField("summary")
    create = "/oneword.v1.TrainingService/CreateTraining"
    (created,) = await caller.call(create, *security_setup.sound_requests(create))
    watch = training_pb2.WatchTrainingRequest(training_id=created.training.training_id)
    states = await caller.call(
        "/oneword.v1.TrainingService/WatchTraining", watch, timeout=TIMEOUT_S
    )
    assert states[-1].training.state == training_pb2.TRAINING_STATE_SUCCEEDED
    (reflection,) = REFLECTION
    assert await caller.call(reflection, *security_setup.sound_requests(reflection))


# Headers


def spoiled(token: str) -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    _, token_id, secret = token.split("_")
    other = ("b" if secret[0] == "a" else "a") + secret[1:]
    one = f"Bearer {token}"
    yield "none", ()
    yield "twice the same", (("authorization", one), ("authorization", one))
    yield "a bad one beside it", (("authorization", one), ("authorization", "Bearer x"))
    for name, value in {
        "empty": "",
        "scheme alone": "Bearer",
        "no token": "Bearer ",
        "no scheme": token,
        "wrong scheme": f"Basic {token}",
        "space behind": one + " ",
        "space before": " " + one,
        "two spaces": f"Bearer  {token}",
        "upper case": f"Bearer {token.upper()}",
        "longer": one + "a",
        "shorter": one[:-1],
        "wrong secret": f"Bearer ow_{token_id}_{other}",
        "secret of none": f"Bearer ow_{'a' * 16}_{secret}",
        "id alone": f"Bearer ow_{token_id}_",
        "hash as secret": f"Bearer ow_{token_id}_{'0' * 64}",
        "two tokens": f"{one}, {one}",
        "long": "Bearer " + "a" * 6000,
    }.items():
        yield name, (("authorization", value),)
    yield "other header", (("x-authorization", one),)


async def test_every_header_that_is_not_sound_gets_the_same_answer(secured: Secured) -> None:
    token = secured.token()
    await secured.learn_of()
    answers = set[tuple[Any, ...]]()
    for name, metadata in spoiled(token):
        caller = secured.caller()
        caller.metadata = metadata
        error = await caller.refusal(INFO)
        # gRPC takes spaces off the ends of a header on some ways; all others must be refused.
        answers.add((error.code(), error.details(), tuple(details(error))))
        assert error.code() == StatusCode.UNAUTHENTICATED, name
    assert len(answers) == 1
    sound = secured.caller(token)
    for scheme in ("Bearer", "bearer", "BEARER"):
        sound.metadata = (("authorization", f"{scheme} {token}"),)
        assert await sound.call(INFO, server_info_pb2.GetServerInfoRequest())


class Details:
    """What an interceptor is told of a call, with headers that no client of gRPC would send."""

    def __init__(self, value: str | bytes) -> None:
        self.method = INFO
        self.invocation_metadata = (("authorization", value),)


@pytest.mark.parametrize(
    "value", ["Bearer ow_é", "Bearer \udcff", "Bearer ow_aaaa\x00", b"Bearer \xff", "Bеarer x"]
)
async def test_text_that_is_no_ascii_is_refused(secured: Secured, value: str | bytes) -> None:
    gate = secured.server._authentication
    assert gate is not None
    with pytest.raises(Unauthenticated):
        gate._of_token(Details(value).invocation_metadata)


async def test_a_header_of_a_megabyte_ends_in_a_status(secured: Secured) -> None:
    caller = secured.caller()
    caller.metadata = (("authorization", "Bearer " + "a" * (1 << 20)),)
    error = await caller.refusal(INFO)
    assert error.code() in (StatusCode.UNAUTHENTICATED, StatusCode.RESOURCE_EXHAUSTED)
    known = await secured.known()
    assert await known.call(INFO, server_info_pb2.GetServerInfoRequest())


async def test_a_token_that_has_expired_is_as_good_as_none(secured: Secured) -> None:
    old = secured.token(expires_in_days=1.0, now=datetime.now(UTC) - timedelta(days=2))
    await secured.learn_of()
    error = await secured.caller(old).refusal(INFO)
    assert (error.code(), error.details()) == (StatusCode.UNAUTHENTICATED, str(Unauthenticated()))


# Revocation


async def test_a_revoked_token_ends_without_a_restart(secured: Secured) -> None:
    token = secured.token()
    caller = secured.caller(token)
    await secured.learn_of()
    assert await caller.call(INFO, server_info_pb2.GetServerInfoRequest())
    revoke_token(secured.credentials, token.split("_")[1])
    for _ in range(200):  # the server looks by itself, once a second
        try:
            await caller.call(INFO, server_info_pb2.GetServerInfoRequest())
        except grpc.aio.AioRpcError as error:
            assert error.code() == StatusCode.UNAUTHENTICATED
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the token still counts")


async def test_revoking_ends_the_calls_under_way(secured: Secured) -> None:
    token, other = secured.token(), secured.token()
    await secured.learn_of()
    secured.denoiser.gate.clear()
    calls = [
        secured.caller(one).start(GENERATE, *security_setup.sound_requests(GENERATE))
        for one in (token, other)
    ]
    for call in calls:
        assert (await call.read()).HasField("accepted")
    revoke_token(secured.credentials, token.split("_")[1])
    await secured.learn_of()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await calls[0].read()
    assert caught.value.code() == StatusCode.UNAUTHENTICATED
    secured.denoiser.gate.set()
    while not (reply := await calls[1].read()).HasField("summary"):  # another token's goes on
        assert reply.WhichOneof("event") in ("progress", "image")


async def test_a_call_ends_when_its_token_expires(secured: Secured) -> None:
    soon = secured.token(expires_in_days=1.0, now=datetime.now(UTC) - timedelta(days=1, seconds=-2))
    await secured.learn_of()
    secured.denoiser.gate.clear()
    call = secured.caller(soon).start(GENERATE, *security_setup.sound_requests(GENERATE))
    assert (await call.read()).HasField("accepted")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == StatusCode.UNAUTHENTICATED


async def test_cancelling_reaches_the_batcher_through_the_gate(secured: Secured) -> None:
    caller = await secured.known()
    secured.denoiser.gate.clear()
    call = caller.start(GENERATE, *security_setup.sound_requests(GENERATE))
    await asyncio.to_thread(secured.denoiser.wait_for_calls, 1)
    call.cancel()
    secured.denoiser.gate.set()
    for _ in range(500):
        if secured.server.batcher.load == (0, 0) and secured.server.generation.active == 0:
            break
        await asyncio.sleep(0.01)
    assert secured.server.generation.active == 0
    gate = secured.server._authentication
    assert gate is not None and not gate._under_way
    assert await caller.call(INFO, server_info_pb2.GetServerInfoRequest())


async def test_a_broken_file_leaves_the_credentials_of_before(
    secured: Secured, caplog: pytest.LogCaptureFixture
) -> None:
    caller = await secured.known()
    sound = secured.credentials.read_text()
    for content in ("[[tokens]", "[[tokens]]\nid = 1\n", ""):
        secured.credentials.write_text(content)
        await secured.learn_of()
        if content:
            assert await caller.call(INFO, server_info_pb2.GetServerInfoRequest())
            assert "still count" in caplog.text
    # An empty file is a sound one: nobody may call.
    assert (await caller.refusal(INFO)).code() == StatusCode.UNAUTHENTICATED
    secured.credentials.write_text(sound)
    secured.credentials.chmod(0o644)
    await secured.learn_of()
    assert (await caller.refusal(INFO)).code() == StatusCode.UNAUTHENTICATED
    secured.credentials.chmod(0o600)
    await secured.learn_of()
    assert await caller.call(INFO, server_info_pb2.GetServerInfoRequest())


# What is kept to itself


async def test_no_secret_is_in_a_log_or_an_answer(
    secured: Secured, caplog: pytest.LogCaptureFixture
) -> None:
    token = secured.token(scopes=["concepts"])
    _, token_id, secret = token.split("_")
    await secured.learn_of()
    with caplog.at_level(logging.DEBUG):
        denied = await secured.caller(token).refusal(GENERATE)
        wrong = secured.caller(f"ow_{token_id}_{'a' * 52}")
        refused = await wrong.refusal(INFO)
    for text in (caplog.text, str(denied), str(refused)):
        assert secret not in text
        assert "a" * 52 not in text
    assert f"wrong secret of token {token_id}" in caplog.text
    assert "needs the scope 'generate'" in caplog.text


async def test_a_flood_of_refusals_does_not_fill_the_log(
    secured: Secured, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = secured.caller()
    gate = secured.server._authentication
    assert gate is not None
    gate._log._bucket = TokenBucket(Quota(requests_per_second=1e-6, burst=3), 0.0)
    gate._log._bucket._updated = time.monotonic()
    for _ in range(6):
        await stranger.refusal(INFO)
    assert len([record for record in caplog.records if "refused" in record.getMessage()]) == 3
    assert gate._log._left_out == 3


def test_the_secret_is_compared_even_where_there_is_no_such_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known and unknown ids take the same path: one hash, one comparison in constant time."""
    compared: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "engine.security.credentials.hmac.compare_digest",
        lambda a, b: bool(compared.append((a, b))),
    )
    path = tmp_path / "credentials.toml"
    token = create_token(path, tenant="acme", name="ci", scopes=["generate"]).token
    credentials = CredentialSource(path).current
    for value in (token, f"ow_{'a' * 16}_{'a' * 52}"):
        with pytest.raises(Unauthenticated):
            credentials.of_header(f"Bearer {value}")
    assert [len(one) for pair in compared for one in pair] == [64] * 4


def test_the_clock_decides_about_expiry(tmp_path: Path) -> None:
    path = tmp_path / "credentials.toml"
    now = datetime.now(UTC)
    token = create_token(
        path, tenant="a", name="b", scopes=["train"], expires_in_days=1.0, now=now
    ).token
    at = now.replace(microsecond=0).timestamp() + 86_400
    for time_now, counts in ((at - 0.001, True), (at, False), (time.time(), True)):
        gate = Authentication(
            CredentialSource(path), certificates=False, clock=lambda moment=time_now: moment
        )
        header = (("authorization", f"Bearer {token}"),)
        if counts:
            assert gate._of_token(header)
        else:
            with pytest.raises(Unauthenticated):
                gate._of_token(header)
