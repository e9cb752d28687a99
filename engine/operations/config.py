"""What `oneword serve` can be told about how it is watched: logs, metrics, probes and traces."""

import ipaddress
from dataclasses import dataclass
from typing import Literal

from engine.errors import ConfigError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationsConfig:
    """How the server tells what it does (docs/operations.md)."""

    log_format: Literal["text", "json"] = "text"  # of the log on stderr, one line a record
    access_log: bool = True  # a line for each call, with its status and duration
    metrics_listen: str | None = None  # host:port, or a port of this machine; None: no HTTP at all
    metrics_tenants: int = 0  # tenants that the metrics name, the first so many; 0: none
    trace_exporter: str | None = None  # "otlp", "console", or as OpenTelemetry calls it; None: off
    trace_sample_ratio: float = 1.0  # of the calls whose caller does not decide it

    def __post_init__(self) -> None:
        if self.log_format not in ("text", "json"):
            raise ConfigError(f"log_format must be text or json, got {self.log_format!r}")
        if self.metrics_listen is not None:
            split_address(self.metrics_listen)
        if self.metrics_tenants < 0:
            raise ConfigError(f"metrics_tenants must not be negative, got {self.metrics_tenants}")
        if not 0.0 <= self.trace_sample_ratio <= 1.0:
            raise ConfigError(
                f"trace_sample_ratio must be between 0 and 1, got {self.trace_sample_ratio}"
            )


def split_address(address: str) -> tuple[str, int]:
    """Host and port; a port alone is one of this machine. Raises `ConfigError`."""
    host, colon, port = address.rpartition(":")
    is_port = port.isascii() and port.isdigit() and int(port) < 1 << 16
    is_host = bool(host) if colon else not host
    if ":" in host:
        is_host = host.startswith("[") and host.endswith("]")
    if not (is_port and is_host):
        raise ConfigError(
            "metrics_listen must be a port, or host:port with a port of 0 to 65535 (IPv6 as "
            f"[::1]:9464), got {address!r}"
        )
    return host.strip("[]") or LOOPBACK, int(port)


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name that may resolve to anything
        return False
