"""TLS for the server: certificates checked before they are used, and taken anew when they change.

gRPC verifies client certificates either always or never (there is no "if given" in its Python API):
with a client CA every connection needs one, health probes too.
"""

import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from engine.errors import ConfigError
from engine.security.config import SecurityConfig
from engine.security.credential_source import Stamp, stamp_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """The files of a server's TLS."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @classmethod
    def of(cls, config: SecurityConfig) -> "Certificates | None":
        """None where the server does without TLS."""
        if config.tls_cert is None or config.tls_key is None:
            return None
        return cls(cert=config.tls_cert, key=config.tls_key, client_ca=config.tls_client_ca)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`; raises `ConfigError` for files that cannot be used.

        The files are looked at before each handshake, on a thread of gRPC. New ones that cannot be
        used are logged, and the old ones stay. Connections that stand are not affected.
        """
        seen = self._stamps()
        first = self.read()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal seen
            stamps = self._stamps()
            if stamps == seen:
                return None
            seen = stamps
            try:
                return self.read()
            except ConfigError as error:
                logger.error("%s; the certificate of before is used on", error)
                return None

        # The stub does not know that None says "no change".
        return grpc.dynamic_ssl_server_credentials(
            first,
            fetch,  # pyright: ignore[reportArgumentType]
            self.client_ca is not None,
        )

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Read and check the files."""
        check_pair(self.cert, self.key)
        client_ca = None
        if self.client_ca is not None:
            client_ca = _read(self.client_ca)
            check_authorities(client_ca, self.client_ca)
        return grpc.ssl_server_certificate_configuration(
            [(_read(self.key), _read(self.cert))], root_certificates=client_ca
        )

    def _stamps(self) -> tuple[Stamp | None, ...]:
        files = (self.cert, self.key, self.client_ca)
        return tuple(stamp_of(path) for path in files if path is not None)


def check_pair(cert: Path, key: Path) -> None:
    """Raise `ConfigError` unless the key is this certificate's, and not for everybody to read."""
    _read(cert)
    _read(key)
    mode = os.stat(key).st_mode
    if mode & 0o007:
        raise ConfigError(
            f"the TLS key {key} can be read or written by everybody (mode {mode & 0o777:o}); "
            f"make it private: chmod 600 {key}"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without the empty password, OpenSSL would ask for one on the terminal.
        context.load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"{cert} and {key} are no certificate (PEM) and its key without a password: {error}"
        ) from error


def check_authorities(pem: bytes, source: Path) -> None:
    """Raise `ConfigError` for a file without a certificate."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{source} holds no certificates (PEM): {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
