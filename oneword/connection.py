"""How commands reach a server: `--server`, TLS, and where the token is read."""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine.client import Client
from engine.client.channel import (
    CA_VARIABLE,
    SERVER_VARIABLE,
    TOKEN_VARIABLE,
    address_from_env,
    security_from_env,
)
from engine.client.retries import RetryPolicy
from engine.security.credentials import read_private_file


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """The server that is asked, and how it is reached."""
    parser.add_argument(
        "--server",
        default=address_from_env(os.environ),
        metavar="HOST:PORT",
        help=f"default: the environment's {SERVER_VARIABLE}, else %(default)s",
    )
    add_security_arguments(parser)


def add_security_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for servers that ask who calls. There is none for the token itself: `ps` shows it."""
    group = parser.add_argument_group("for servers with TLS and authentication")
    group.add_argument("--tls", action="store_true", help="TLS, trusting this system's authorities")
    for name, summary in (
        ("tls-ca", f"TLS, trusting this authority (PEM; default: the environment's {CA_VARIABLE})"),
        ("tls-cert", "show this certificate (PEM)"),
        ("tls-key", "its private key (PEM)"),
        ("token-file", f"file with the token (default: the environment's {TOKEN_VARIABLE})"),
    ):
        group.add_argument(f"--{name}", type=Path, metavar="FILE", help=summary)


def connect(
    arguments: argparse.Namespace,
    *,
    timeout_s: float | None = None,
    retry: RetryPolicy | None = None,
) -> Client:
    """The client that flags and environment describe, flags first; raises `ConfigError`."""
    security = security_from_env(os.environ)
    if arguments.token_file is not None:
        security = replace(security, token=read_private_file(arguments.token_file).strip())
    security = replace(
        security,
        tls=arguments.tls or security.tls,
        tls_ca=arguments.tls_ca or security.tls_ca,
        tls_cert=arguments.tls_cert,
        tls_key=arguments.tls_key,
    )
    return Client(arguments.server, timeout_s=timeout_s, security=security, retry=retry)


def add_server_action(
    parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], int | None]
) -> None:
    """Have a command be one that asks a server."""
    add_server_arguments(parser)
    parser.set_defaults(action=action)
