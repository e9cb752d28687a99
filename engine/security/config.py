"""Who may reach the server and call it: what `oneword serve` can be told about that."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from engine.security.method_scopes import HEALTH, REFLECTION


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    """Encryption, authentication and signatures; each of them is off unless it is given files."""

    tls_cert: Path | None = None  # PEM: the server's certificate, then those between it and the CA
    tls_key: Path | None = None  # PEM, private, without a password
    tls_client_ca: Path | None = None  # PEM: clients must have a certificate of one of these
    credentials: Path | None = None  # TOML: who may call (engine/security/credentials.py)
    authenticate_health: bool = False  # a probe has no credentials, and learns nothing but health
    authenticate_reflection: bool = True  # reflection needs credentials
    trusted_keys: tuple[Path, ...] = ()  # PEM: only bundles signed with one of them are opened

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, lacks = ("tls_key", "tls_cert") if self.tls_key else ("tls_cert", "tls_key")
            raise ConfigError(f"{given} is given without {lacks}; TLS needs both")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("tls_client_ca is for TLS; give tls_cert and tls_key as well")
        if self.tls_client_ca is not None and self.credentials is None:
            raise ConfigError(
                "tls_client_ca says whose certificates are genuine, not what they may do; give a "
                "credentials file with their [[certificates]] as well"
            )

    @property
    def open_methods(self) -> frozenset[str]:
        """What may be called without credentials."""
        health = frozenset() if self.authenticate_health else HEALTH
        return health | (frozenset() if self.authenticate_reflection else REFLECTION)


def check_listen(address: str, security: SecurityConfig, *, insecure: bool) -> None:
    """Raise `ConfigError` for what is no address, and for one that strangers could reach."""
    if address.startswith("unix:"):
        return
    host, colon, port = address.rpartition(":")
    is_port = port.isascii() and port.isdigit() and int(port) < 1 << 16
    # gRPC reads ::1:0 as one long address, so a host with colons must have its brackets.
    is_host = ":" not in host or (host.startswith("[") and host.endswith("]"))
    if not (colon and is_port and is_host):
        raise ConfigError(
            "listen must be host:port with a port of 0 to 65535 (IPv6 as [::1]:50051), "
            f"or unix:PATH, got {address!r}"
        )
    missing = {"TLS": security.tls_cert is None, "authentication": security.credentials is None}
    lacks = " or ".join(name for name, is_missing in missing.items() if is_missing)
    if lacks and not insecure and not _is_loopback(host.strip("[]")):
        raise ConfigError(
            f"listening on {address} would open this server to the network without {lacks}; give "
            "tls_cert, tls_key and credentials (docs/security.md), or listen on "
            f"127.0.0.1:{port} behind a proxy that has both, or say insecure if the network is "
            "trusted"
        )


def is_exposed(address: str, security: SecurityConfig) -> bool:
    """Whether others than this machine reach an address, where nobody asks who they are."""
    host = address.rpartition(":")[0].strip("[]")
    is_local = address.startswith("unix:") or _is_loopback(host)
    return security.credentials is None and not is_local


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name that may resolve to anything
        return False
