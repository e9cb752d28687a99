"""How a client reaches a server: encrypted or not, with a token, with a certificate."""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from engine.endpoint import MAX_MESSAGE_BYTES
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSecurity:
    """What a client shows of itself, and whom it takes for the server."""

    token: str | None = field(default=None, repr=False)
    tls: bool = False  # with the authorities of this system; any of the files below implies it
    tls_ca: Path | None = None  # PEM: the authority of the server's certificate
    tls_cert: Path | None = None  # PEM: the client's own certificate, for servers that want one
    tls_key: Path | None = None  # PEM

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("a client certificate needs both tls_cert and tls_key")

    @property
    def is_encrypted(self) -> bool:
        return self.tls or self.tls_ca is not None or self.tls_cert is not None


def open_channel(address: str, security: ClientSecurity) -> grpc.Channel:
    """A channel to a server; nothing is sent yet. A token does not go unencrypted over a network.

    Raises `ConfigError`.
    """
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]
    if security.is_encrypted:
        channel = grpc.secure_channel(address, _credentials(security), options)
    elif security.token is not None and not is_on_this_machine(address):
        raise ConfigError(
            f"the token would go to {address} for everybody on the way to read; use TLS (tls_ca)"
        )
    else:
        channel = grpc.insecure_channel(address, options)
    if security.token is None:
        return channel
    return grpc.intercept_channel(channel, _Authorization(security.token))


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


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Authorization(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
):
    """Sends a token along with every call."""

    def __init__(self, token: str) -> None:
        self._header = ("authorization", f"Bearer {token}")

    def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return continuation(self._with_header(client_call_details), request)

    intercept_unary_stream = intercept_unary_unary  # pyright: ignore[reportAssignmentType]
    intercept_stream_unary = intercept_unary_unary  # pyright: ignore[reportAssignmentType]

    def _with_header(self, details: Any) -> Any:
        return _CallDetails(
            method=details.method,
            timeout=details.timeout,
            metadata=[*(details.metadata or ()), self._header],
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
            compression=details.compression,
        )
