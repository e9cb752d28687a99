"""How commands reach a server: `--server`, TLS, and where the token is read."""

import argparse
import os
from pathlib import Path

from engine.client import Client
from engine.client_channel import ClientSecurity
from engine.credentials import read_private_file

TOKEN_VARIABLE = "ONEWORD_TOKEN"


def add_security_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for servers that ask who calls. There is none for the token itself: `ps` shows it."""
    group = parser.add_argument_group("for servers with TLS and authentication")
    group.add_argument("--tls", action="store_true", help="TLS, trusting this system's authorities")
    for name, summary in (
        ("tls-ca", "TLS, trusting this authority (PEM)"),
        ("tls-cert", "show this certificate (PEM)"),
        ("tls-key", "its private key (PEM)"),
        ("token-file", f"file with the token (default: the environment's {TOKEN_VARIABLE})"),
    ):
        group.add_argument(f"--{name}", type=Path, metavar="FILE", help=summary)


def connect(arguments: argparse.Namespace, *, timeout_s: float | None = None) -> Client:
    """The client that the flags describe; raises `ConfigError`."""
    security = ClientSecurity(
        token=_token(arguments.token_file),
        tls=arguments.tls,
        tls_ca=arguments.tls_ca,
        tls_cert=arguments.tls_cert,
        tls_key=arguments.tls_key,
    )
    return Client(arguments.server, timeout_s=timeout_s, security=security)


def _token(path: Path | None) -> str | None:
    if path is not None:
        return read_private_file(path).strip()
    return os.environ.get(TOKEN_VARIABLE) or None
