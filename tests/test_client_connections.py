"""How clients and commands reach a server: what they need, whom they trust, what they show."""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc import StatusCode

from engine.client import Client
from engine.client.channel import ClientSecurity, is_on_this_machine
from engine.client.errors import ServerError
from engine.errors import ConfigError
from oneword import connection
from protos.oneword.v1 import server_info_pb2
from tests.client_setup import FakeTime, ScriptedServer, answer, calling
from tests.test_client_retries import Serve
from tests.test_client_retries import kind as kind
from tests.test_client_retries import serve as serve

ROOT = Path(__file__).resolve().parent.parent
INFO = answer(server_info_pb2.GetServerInfoResponse())


# What a client needs


def test_a_client_needs_grpc_alone() -> None:
    code = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("onnxruntime", "tokenizers", "safetensors", "PIL", "numpy",
                                      "jaxtyping", "torch", "trainer", "tqdm"):
            raise ImportError(f"{name} is not for clients")

sys.meta_path.insert(0, Blocked())
import grpc
from engine.client import AsyncClient
from engine.client import Client, ServerError
with Client("127.0.0.1:1") as client:
    try:
        client.generate(prompt="a cat")
    except ServerError as error:
        print(error.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "StatusCode.UNAVAILABLE"


# Tokens


@pytest.mark.parametrize(
    ("address", "is_here"),
    [
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/tmp/x", True),
        ("10.0.0.1:1", False),
        ("0.0.0.0:1", False),
        ("localhost.example:1", False),
        ("127.0.0.1.example:1", False),
        ("dns:localhost:1", False),
        ("example", False),
    ],
)
async def test_a_token_does_not_go_over_a_network_in_plain_text(
    kind: str, address: str, is_here: bool
) -> None:
    assert is_on_this_machine(address) == is_here
    security = ClientSecurity(token="secret")
    if is_here:
        async with calling(kind, address, security=security):
            pass
    else:
        with pytest.raises(ConfigError, match="use TLS"):
            async with calling(kind, address, security=security):
                pass
    insecure = ClientSecurity(token="x", allow_insecure_token=True)
    for allowed in (insecure, ClientSecurity(token="x", tls=True)):
        async with calling(kind, address, security=allowed):
            pass
    assert "secret" not in repr(security)


@pytest.mark.parametrize("token", ["a\nb", "a\rb", "tokén", "a\0"], ids=ascii)
def test_a_token_that_is_no_header_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII") as caught:
        ClientSecurity(token=token)
    assert token not in str(caught.value)


async def test_every_attempt_shows_the_token(kind: str, serve: Serve) -> None:
    server = serve(GetServerInfo=[INFO])
    security = ClientSecurity(token="ow_1_x")
    async with calling(kind, server.address, security=security) as caller:
        await caller.call(lambda client: client.server_info())
    assert [seen.authorization for seen in server.seen["GetServerInfo"]] == ["Bearer ow_1_x"]


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def pems(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The authority's certificate, and a client's own with its key."""
    folder = tmp_path_factory.mktemp("pems")
    own = authority.issue_cert("client.example")
    paths = {name: folder / f"{name}.pem" for name in ("tls_ca", "tls_cert", "tls_key", "other")}
    authority.cert_pem.write_to_path(paths["tls_ca"])
    own.cert_chain_pems[0].write_to_path(paths["tls_cert"])
    own.private_key_pem.write_to_path(paths["tls_key"])
    trustme.CA().cert_pem.write_to_path(paths["other"])
    return paths


@pytest.fixture
def mutual(authority: trustme.CA) -> Iterator[ScriptedServer]:
    """A server that wants to see certificates."""
    own = authority.issue_cert("127.0.0.1")
    credentials = grpc.ssl_server_credentials(
        [(own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())],
        authority.cert_pem.bytes(),
        require_client_auth=True,
    )
    server = ScriptedServer({"GetServerInfo": [INFO]}, credentials=credentials)
    yield server
    server.stop()


async def test_a_client_shows_its_certificate(
    kind: str, mutual: ScriptedServer, pems: dict[str, Path]
) -> None:
    security = ClientSecurity(
        tls_ca=pems["tls_ca"], tls_cert=pems["tls_cert"], tls_key=pems["tls_key"], token="t"
    )
    async with calling(kind, mutual.address, security=security) as caller:
        await caller.call(lambda client: client.server_info())
    assert mutual.seen["GetServerInfo"][0].authorization == "Bearer t"


async def test_a_server_that_is_not_trusted_is_no_server(
    kind: str, mutual: ScriptedServer, pems: dict[str, Path]
) -> None:
    fake = FakeTime()
    security = ClientSecurity(tls_ca=pems["other"], token="t")
    async with calling(kind, mutual.address, security=security, fake=fake) as caller:
        with pytest.raises(ServerError, match="no TLS with .*check tls_ca") as caught:
            await caller.call(lambda client: client.server_info())
    assert (caught.value.code, caught.value.transient) == (StatusCode.UNAVAILABLE, False)
    assert not mutual.seen and not fake.slept


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.pem cannot be read"):
        Client("127.0.0.1:1", security=ClientSecurity(tls_ca=tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match="both tls_cert and tls_key"):
        ClientSecurity(tls_cert=tmp_path / "cert.pem")


# The environment, and the flags of commands


def security_of(client: Any) -> tuple[str, tuple[tuple[str, str], ...]]:
    return client._link._line._address, client._link._line.metadata


def test_the_environment_names_server_token_and_authority(pems: dict[str, Path]) -> None:
    environ = {"ONEWORD_SERVER": "host.example:443", "ONEWORD_TOKEN": "t"}
    with pytest.raises(ConfigError, match="use TLS"):
        Client.from_env(environ=environ)
    environ["ONEWORD_CA"] = str(pems["tls_ca"])
    with Client.from_env(environ=environ) as client:
        assert security_of(client) == ("host.example:443", (("authorization", "Bearer t"),))
    environ |= {"ONEWORD_CA": "", "ONEWORD_TLS": "1"}
    Client.from_env(environ=environ).close()
    for empty in ({}, dict.fromkeys(environ, "")):
        with Client.from_env(environ=empty) as client:
            assert security_of(client) == ("127.0.0.1:50051", ())


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("SERVER", "TOKEN", "CA", "TLS"):
        monkeypatch.delenv(f"ONEWORD_{name}", raising=False)
    return monkeypatch


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    connection.add_server_arguments(parser)
    return parser.parse_args(words)


def test_flags_go_before_the_environment(
    clean_environment: pytest.MonkeyPatch, tmp_path: Path, pems: dict[str, Path]
) -> None:
    with connection.connect(arguments()) as client:
        assert security_of(client) == ("127.0.0.1:50051", ())
    clean_environment.setenv("ONEWORD_SERVER", "a.example:1")
    clean_environment.setenv("ONEWORD_TOKEN", "of-the-environment")
    clean_environment.setenv("ONEWORD_CA", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="none cannot be read"):
        connection.connect(arguments())
    tls = ("--tls-ca", str(pems["tls_ca"]))
    with connection.connect(arguments(*tls)) as client:
        address, metadata = security_of(client)
    assert (address, metadata[0][1]) == ("a.example:1", "Bearer of-the-environment")
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("of-the-file\n")
    flags = ("--server", "b.example:1", "--token-file", str(token))
    with connection.connect(arguments(*flags, *tls)) as client:
        address, metadata = security_of(client)
    assert (address, metadata[0][1]) == ("b.example:1", "Bearer of-the-file")


def test_a_token_file_is_its_owners_alone(
    clean_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("x")
    token.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        connection.connect(arguments("--token-file", str(token)))
    with pytest.raises(ConfigError, match="cannot be read"):
        connection.connect(arguments("--token-file", str(tmp_path)))
