"""Signatures of files: ed25519, in a small text file beside what is signed.

A signature covers the exact bytes of a file and its name, so that the manifest of a bundle is not
taken for that of its plans. Each line of `NAME.sig` is `ed25519 KEY_ID SIGNATURE`; one of a trusted
key is enough, so that keys can be changed. Needs the package `cryptography`.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import BundleError, ConfigError
from engine.files import write_atomically, write_private
from engine.security.credentials import read_private_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )
else:
    Ed25519PrivateKey = Ed25519PublicKey = Any  # imported where signatures are used, not before

SUFFIX = ".sig"
_CONTEXT = b"oneword signature 1\n"
_ALGORITHM = "ed25519"
_MAX_SIGNATURE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class TrustedKeys:
    """Public keys whose signatures count."""

    by_id: dict[str, Ed25519PublicKey]

    @classmethod
    def read(cls, paths: Iterable[Path]) -> "TrustedKeys":
        """Raises `ConfigError` for what is no public key file."""
        keys = [read_public_key(path) for path in paths]
        return cls({key_id(key): key for key in keys})

    def check(self, path: Path, content: bytes, *, name: str) -> None:
        """Raise `BundleError` unless one of these keys signed the content that `path` had."""
        signature_path = signature_of(path)
        if not signature_path.is_file():
            raise BundleError(
                f"{path} is not signed: {signature_path.name} is missing; this server opens only "
                f"what {self} signed: build with --sign-key, or sign it with `oneword keys sign`"
            )
        found = _read_signatures(signature_path)
        for signer, signature in found:
            if signer in self.by_id and _is_genuine(
                self.by_id[signer], signature, _signed(name, content)
            ):
                return
        if any(signer in self.by_id for signer, _ in found):
            raise BundleError(
                f"{path} is not what was signed: the signature does not fit its content; somebody "
                "has changed it, build or fetch it again"
            )
        signers = ", ".join(signer for signer, _ in found) or "nobody"
        raise BundleError(
            f"{path} is signed by {signers}, and not by {self}, whom this server trusts"
        )

    def __str__(self) -> str:
        return "key " + " or ".join(sorted(self.by_id))


def sign_file(path: Path, key: Ed25519PrivateKey, *, name: str) -> Path:
    """Sign a file as it is now, in place of earlier signatures; returns the signature's path."""
    signature = base64.b64encode(key.sign(_signed(name, path.read_bytes()))).decode()
    line = f"{_ALGORITHM} {key_id(key.public_key())} {signature}\n"
    write_atomically(signature_of(path), line.encode())
    return signature_of(path)


def signature_of(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _signed(name: str, content: bytes) -> bytes:
    return _CONTEXT + name.encode() + b"\n" + content


def _is_genuine(key: Ed25519PublicKey, signature: bytes, content: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True


def _read_signatures(path: Path) -> list[tuple[str, bytes]]:
    """Key ids and signatures of a signature file; raises `BundleError`."""
    with path.open("rb") as file:
        content = file.read(_MAX_SIGNATURE_BYTES)
    found: list[tuple[str, bytes]] = []
    try:
        for line in content.decode("ascii").splitlines():
            algorithm, signer, signature = line.split(" ")
            if algorithm == _ALGORITHM and signer.isalnum():
                found.append((signer, base64.b64decode(signature, validate=True)))
    except (ValueError, binascii.Error) as error:
        raise BundleError(f"{path} is not a signature file; sign again") from error
    return found


def create_keys(path: Path) -> str:
    """Make a pair of keys: `path`, private, and `path`.pub; returns the id of the key."""
    serialization, ed25519 = _serialization(), _ed25519()
    public_path = path.with_name(path.name + ".pub")
    for file in (path, public_path):
        if file.exists():
            raise ConfigError(f"{file} is there already; keys are not overwritten")
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    write_private(path, private)
    write_atomically(public_path, public)
    return key_id(key.public_key())


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Raises `ConfigError` for what is no ed25519 key, or not private."""
    content = read_private_file(path).encode()
    try:
        key = _serialization().load_pem_private_key(content, password=None)
    except (ValueError, TypeError, _unsupported()) as error:
        raise ConfigError(f"{path} is not a private key without a password (PEM)") from error
    return _of_kind(key, _ed25519().Ed25519PrivateKey, path)


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Raises `ConfigError` for what is no ed25519 key."""
    try:
        key = _serialization().load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, _unsupported()) as error:
        raise ConfigError(f"{path} is not a public key (PEM)") from error
    return _of_kind(key, _ed25519().Ed25519PublicKey, path)


def key_id(key: Ed25519PublicKey) -> str:
    """A short name of a key: the beginning of its SHA-256."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def _of_kind(key: Any, kind: type, path: Path) -> Any:
    if not isinstance(key, kind):
        raise ConfigError(f"{path} is not an ed25519 key; make one with `oneword keys create`")
    return key


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise ConfigError(
            "signatures need the package cryptography; install it with: "
            "pip install 'oneword[signing]'"
        ) from error
    return serialization


def _ed25519() -> Any:
    from cryptography.hazmat.primitives.asymmetric import ed25519

    return ed25519


def _unsupported() -> type[Exception]:
    from cryptography.exceptions import UnsupportedAlgorithm

    return UnsupportedAlgorithm
