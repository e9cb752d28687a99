"""How a client reaches a server: encrypted or not, with a token, with a certificate."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from engine.endpoint import DEFAULT_ADDRESS, MAX_MESSAGE_BYTES
from engine.errors import ConfigError

SERVER_VARIABLE = "ONEWORD_SERVER"  # HOST:PORT
TOKEN_VARIABLE = "ONEWORD_TOKEN"
CA_VARIABLE = "ONEWORD_CA"  # path of a PEM file
TLS_VARIABLE = "ONEWORD_TLS"  # "1": with the authorities of this system
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Calls are repeated in one place, `engine.client.retries`: gRPC repeating them as well, by
    # itself or by a service config, would multiply the attempts and not know the budget.
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    # gRPC tries to connect again only so often, and calls fail at once in between. Its own two
    # minutes at most would keep a client away from a server that has long been back.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # and this long a connection may take
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Finds a server that vanished without a word under a stream that is quiet. Servers drop
    # clients that ping more often than every 5 minutes, unless they are told otherwise.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSecurity:
    """What a client shows of itself, and whom it takes for the server."""

    token: str | None = field(default=None, repr=False)
    tls: bool = False  # with the authorities of this system; any of the files below implies it
    tls_ca: Path | None = None  # PEM: the authority of the server's certificate
    tls_cert: Path | None = None  # PEM: the client's own certificate, for servers that want one
    tls_key: Path | None = None  # PEM
    allow_insecure_token: bool = False  # send it in plain text; for a network that is trusted

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("a client certificate needs both tls_cert and tls_key")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ConfigError("a token has printable ASCII alone; look where it was read from")

    @property
    def is_encrypted(self) -> bool:
        return self.tls or self.tls_ca is not None or self.tls_cert is not None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What is sent along with every call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)


def address_from_env(environ: Mapping[str, str]) -> str:
    return environ.get(SERVER_VARIABLE) or DEFAULT_ADDRESS


def security_from_env(environ: Mapping[str, str]) -> ClientSecurity:
    """What the variables of the environment say; those that are empty count as absent."""
    ca = environ.get(CA_VARIABLE)
    return ClientSecurity(
        token=environ.get(TOKEN_VARIABLE) or None,
        tls=environ.get(TLS_VARIABLE, "") not in ("", "0"),
        tls_ca=Path(ca) if ca else None,
    )


def open_channel(address: str, security: ClientSecurity) -> grpc.Channel:
    """A channel to a server; nothing is sent yet.

    Raises `ConfigError`: a token does not go unencrypted over a network.
    """
    if security.is_encrypted:
        return grpc.secure_channel(address, _credentials(security), CHANNEL_OPTIONS)
    _check_token(address, security)
    return grpc.insecure_channel(address, CHANNEL_OPTIONS)


def open_async_channel(address: str, security: ClientSecurity) -> grpc.aio.Channel:
    """The same for asyncio; to be called where its event loop runs."""
    if security.is_encrypted:
        return grpc.aio.secure_channel(address, _credentials(security), CHANNEL_OPTIONS)
    _check_token(address, security)
    return grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)


def _check_token(address: str, security: ClientSecurity) -> None:
    if security.token is None or security.allow_insecure_token or is_on_this_machine(address):
        return
    raise ConfigError(
        f"the token would go to {address} for everybody on the way to read; use TLS (tls_ca)"
    )


def is_on_this_machine(address: str) -> bool:
    """Whether what goes to this address leaves the machine not at all."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _credentials(security: ClientSecurity) -> grpc.ChannelCredentials:
    try:
        ca, key, cert = (
            None if path is None else path.read_bytes()
            for path in (security.tls_ca, security.tls_key, security.tls_cert)
        )
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from error
    return grpc.ssl_channel_credentials(ca, key, cert)
