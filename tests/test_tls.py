"""Encryption and client certificates: what is accepted, refused, and changed without a restart."""

import asyncio
import datetime
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import trustme
from grpc import StatusCode
from grpc_health.v1 import health_pb2

from engine.client import Client, ServerError
from engine.client.channel import ClientSecurity, is_on_this_machine
from engine.errors import ConfigError
from engine.security.config import SecurityConfig, check_listen
from engine.security.tls import Certificates
from protos.oneword.v1 import server_info_pb2
from tests import security_setup
from tests.security_setup import Pems, Secured, StartSecured, channel_credentials

# Fixtures.
start_secured = security_setup.start_secured

INFO = "/oneword.v1.ServerInfoService/GetServerInfo"
REQUEST = server_info_pb2.GetServerInfoRequest()
CERTIFICATES = """
[[certificates]]
identity = "dns:ci.acme.example"
tenant = "acme"
name = "ci-certificate"
scopes = ["generate"]
[[certificates]]
identity = "dns:old.acme.example"
tenant = "acme"
name = "old"
scopes = ["generate"]
expires = 2001-01-01T00:00:00Z
"""


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def pems(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Pems:
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    return Pems.write(tmp_path_factory.mktemp("server"), authority, certificate)


@pytest.fixture
async def mutual(start_secured: StartSecured, pems: Pems, tmp_path: Path) -> AsyncIterator[Secured]:
    """A server that asks for client certificates."""
    credentials = tmp_path / "credentials.toml"
    credentials.touch(0o600)
    credentials.write_text(CERTIFICATES)
    yield await start_secured(
        tls_cert=pems.cert, tls_key=pems.key, tls_client_ca=pems.ca, credentials=credentials
    )


async def refused_connection(secured: Secured, credentials: Any) -> str:
    """That no call gets through, and what the transport says."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await secured.caller(credentials=credentials).call(INFO, REQUEST)
    assert caught.value.code() == StatusCode.UNAVAILABLE
    return caught.value.details() or ""


# Client certificates (attack group 11)


async def test_a_certificate_that_the_file_knows_is_a_caller(
    mutual: Secured, authority: trustme.CA
) -> None:
    client = channel_credentials(authority, authority.issue_cert("ci.acme.example"))
    caller = mutual.caller(credentials=client)
    assert await caller.call(INFO, REQUEST)
    error = await caller.refusal("/oneword.v1.ConceptService/ListConcepts")
    assert error.code() == StatusCode.PERMISSION_DENIED
    assert "'ci-certificate' of tenant 'acme' has generate" in (error.details() or "")
    unknown = await caller.refusal("/oneword.v1.AdminService/Drain")
    assert unknown.code() == StatusCode.UNIMPLEMENTED


async def test_a_genuine_certificate_that_the_file_does_not_know_is_nobody(
    mutual: Secured, authority: trustme.CA
) -> None:
    for names in (["stranger.example"], ["ci.acme.example", "old.acme.example"]):
        client = channel_credentials(authority, authority.issue_cert(*names))
        caller = mutual.caller(credentials=client)
        for method in (INFO, "/oneword.v1.AdminService/Drain"):
            assert (await caller.refusal(method)).code() == StatusCode.UNAUTHENTICATED
        (health,) = await caller.call(
            "/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest()
        )
        assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_common_name_does_not_stand_in_for_a_dns_name(
    mutual: Secured, authority: trustme.CA
) -> None:
    forged = authority.issue_cert("evil.example", common_name="ci.acme.example")
    caller = mutual.caller(credentials=channel_credentials(authority, forged))
    assert (await caller.refusal(INFO)).code() == StatusCode.UNAUTHENTICATED


async def test_an_entry_that_has_expired_is_nobody(mutual: Secured, authority: trustme.CA) -> None:
    old = channel_credentials(authority, authority.issue_cert("old.acme.example"))
    error = await mutual.caller(credentials=old).refusal(INFO)
    assert error.code() == StatusCode.UNAUTHENTICATED


async def test_no_certificate_is_no_connection(mutual: Secured, authority: trustme.CA) -> None:
    await refused_connection(mutual, channel_credentials(authority))


async def test_a_certificate_of_another_authority_is_no_connection(
    mutual: Secured, authority: trustme.CA
) -> None:
    certificate = trustme.CA().issue_cert("ci.acme.example")
    await refused_connection(mutual, channel_credentials(authority, certificate))


async def test_an_expired_certificate_is_no_connection(
    mutual: Secured, authority: trustme.CA
) -> None:
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    expired = authority.issue_cert("ci.acme.example", not_after=yesterday)
    await refused_connection(mutual, channel_credentials(authority, expired))


async def test_plain_text_is_no_connection(mutual: Secured) -> None:
    await refused_connection(mutual, None)


async def test_a_bad_token_is_not_mended_by_a_good_certificate(
    mutual: Secured, authority: trustme.CA
) -> None:
    client = channel_credentials(authority, authority.issue_cert("ci.acme.example"))
    caller = mutual.caller("ow_" + "a" * 16 + "_" + "a" * 52, credentials=client)
    assert (await caller.refusal(INFO)).code() == StatusCode.UNAUTHENTICATED
    good = mutual.token(tenant="other", scopes=["concepts"])
    await mutual.learn_of()
    both = mutual.caller(good, credentials=client)
    assert await both.call("/oneword.v1.ConceptService/ListConcepts", *_list_request())


def _list_request() -> tuple[Any, ...]:
    return security_setup.sound_requests("/oneword.v1.ConceptService/ListConcepts")


# What a client checks


async def test_a_client_refuses_a_server_of_another_name_or_authority(
    start_secured: StartSecured, authority: trustme.CA, tmp_path: Path
) -> None:
    other = Pems.write(tmp_path / "other", authority, authority.issue_cert("elsewhere.example"))
    secured = await start_secured(tls_cert=other.cert, tls_key=other.key)
    await refused_connection(secured, channel_credentials(authority))
    await refused_connection(secured, channel_credentials(trustme.CA()))


async def test_tokens_work_over_tls(
    start_secured: StartSecured, authority: trustme.CA, pems: Pems
) -> None:
    secured = await start_secured(tls_cert=pems.cert, tls_key=pems.key)
    token = secured.token()
    await secured.learn_of()
    client = channel_credentials(authority)
    assert await secured.caller(token, credentials=client).call(INFO, REQUEST)
    error = await secured.caller(credentials=client).refusal(INFO)
    assert error.code() == StatusCode.UNAUTHENTICATED


# Without a restart


async def test_new_files_are_used_for_new_connections(
    start_secured: StartSecured, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = trustme.CA(), trustme.CA()
    pems = Pems.write(tmp_path / "tls", first, first.issue_cert("127.0.0.1"))
    secured = await start_secured(tls_cert=pems.cert, tls_key=pems.key)
    token = secured.token()
    await secured.learn_of()
    standing = secured.caller(token, credentials=channel_credentials(first))
    assert await standing.call(INFO, REQUEST)

    pems.cert.write_text("no certificate")
    assert await secured.caller(token, credentials=channel_credentials(first)).call(INFO, REQUEST)
    assert "the certificate of before is used on" in caplog.text

    Pems.write(tmp_path / "tls", second, second.issue_cert("127.0.0.1"))
    renewed = secured.caller(token, credentials=channel_credentials(second))
    assert await renewed.call(INFO, REQUEST)
    assert await standing.call(INFO, REQUEST)


# What a configuration may say


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tls_cert": Path("c")}, "tls_cert is given without tls_key"),
        ({"tls_key": Path("k")}, "tls_key is given without tls_cert"),
        ({"tls_client_ca": Path("ca")}, "tls_client_ca is for TLS"),
        (
            {"tls_cert": Path("c"), "tls_key": Path("k"), "tls_client_ca": Path("ca")},
            "give a credentials file",
        ),
    ],
)
def test_half_a_configuration_is_refused(fields: dict[str, Path], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SecurityConfig(**fields)  # pyright: ignore[reportArgumentType]


def test_the_network_needs_tls_and_authentication() -> None:
    tls: dict[str, Path] = {"tls_cert": Path("c"), "tls_key": Path("k")}
    both = SecurityConfig(credentials=Path("f"), **tls)  # pyright: ignore[reportArgumentType]
    check_listen("0.0.0.0:1", both, insecure=False)
    for security, lacks in (
        (SecurityConfig(), "TLS or authentication"),
        (SecurityConfig(**tls), "authentication"),  # pyright: ignore[reportArgumentType]
        (SecurityConfig(credentials=Path("f")), "TLS"),
    ):
        for address in ("0.0.0.0:1", "[::]:1", ":1", "box:1"):
            with pytest.raises(ConfigError, match=f"without {lacks}; give tls_cert"):
                check_listen(address, security, insecure=False)
            check_listen(address, security, insecure=True)
        check_listen("127.0.0.1:1", security, insecure=False)
        check_listen("unix:/tmp/x", security, insecure=False)


@pytest.mark.parametrize(
    "address", ["unix-abstract:x", "dns:0.0.0.0:1", "ipv4:0.0.0.0:1", "vsock:1:1", "0.0.0.0:1/"]
)
def test_other_schemes_are_no_way_round(address: str) -> None:
    with pytest.raises(ConfigError):
        check_listen(address, SecurityConfig(), insecure=False)


def test_files_that_cannot_be_used_are_said_before_the_server_starts(
    pems: Pems, authority: trustme.CA, tmp_path: Path
) -> None:
    other = Pems.write(tmp_path, authority, authority.issue_cert("127.0.0.1"))
    text = tmp_path / "text"
    text.write_text("hello")
    text.chmod(0o600)
    for certificates, message in (
        (Certificates(cert=pems.cert, key=other.key), "no certificate .* and its key"),
        (Certificates(cert=text, key=pems.key), "no certificate"),
        (Certificates(cert=pems.cert, key=text), "no certificate"),
        (Certificates(cert=pems.cert, key=tmp_path / "none"), "cannot be read"),
        (Certificates(cert=pems.cert, key=pems.key, client_ca=text), "holds no certificates"),
    ):
        with pytest.raises(ConfigError, match=message):
            certificates.server_credentials()
    other.key.chmod(0o644)
    with pytest.raises(ConfigError, match="read or written by everybody.*chmod 600"):
        Certificates(cert=other.cert, key=other.key).server_credentials()


# The project's own client


async def test_the_client_speaks_tls_with_a_token_or_a_certificate(
    mutual: Secured, authority: trustme.CA, pems: Pems, tmp_path: Path
) -> None:
    own = Pems.write(tmp_path / "client", authority, authority.issue_cert("ci.acme.example"))

    def info(**settings: Any) -> str:
        security = ClientSecurity(**settings)
        with Client(mutual.address, security=security) as client:
            return client.server_info().model.name

    tls = {"tls_ca": pems.ca, "tls_cert": own.cert, "tls_key": own.key}
    assert await asyncio.to_thread(info, **tls) == "fake"
    token = mutual.token()
    await mutual.learn_of()
    assert await asyncio.to_thread(info, token=token, **tls) == "fake"
    with pytest.raises(ServerError) as caught:
        await asyncio.to_thread(info, token="x", **tls)
    assert caught.value.code == StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("address", "is_here"),
    [
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/tmp/x", True),
        ("10.0.0.1:1", False),
        ("localhost.example:1", False),
        ("127.0.0.1.example:1", False),
        ("dns:localhost:1", False),
    ],
)
def test_a_token_does_not_go_over_a_network_in_plain_text(address: str, is_here: bool) -> None:
    assert is_on_this_machine(address) == is_here
    if is_here:
        Client(address, security=ClientSecurity(token="x")).close()
    else:
        with pytest.raises(ConfigError, match="use TLS"):
            Client(address, security=ClientSecurity(token="x"))
    Client(address, security=ClientSecurity(token="x", tls=True)).close()
    assert "secret" not in repr(ClientSecurity(token="secret"))
