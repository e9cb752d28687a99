"""Who may call: bearer tokens and client certificates, read from one private TOML file.

    [defaults]                      # the quota of every tenant, as far as it has none of its own
    requests_per_second = 20.0
    burst = 40
    concurrent_rpcs = 32

    [tenants.acme]                  # of one tenant, in place of the defaults
    requests_per_second = 100.0

    [[tokens]]                      # written by `oneword tokens create`
    id = "mzxw6ytboi4dqnzz"
    sha256 = "..."                  # of the secret; the token itself is nowhere
    tenant = "acme"
    name = "ci"
    scopes = ["generate", "concepts"]
    expires = 2027-01-01T00:00:00Z  # optional

    [[certificates]]
    identity = "dns:ci.acme.example"  # or "uri:spiffe://...", or "cn:..." of one without those
    tenant = "acme"
    name = "ci"
    scopes = ["generate"]

A secret is 256 random bits, so its plain SHA-256 cannot be searched: the slow hashes that passwords
need would only cost time in every call.
"""

import dataclasses
import hashlib
import hmac
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, Unauthenticated, quoted
from engine.security.callers import Caller, Scope
from engine.security.rate_limits import Quota

MAX_FILE_BYTES = 16 << 20
TOKEN = re.compile(
    r"ow_([a-z2-7]{16})_([a-z2-7]{52})"
)  # base32: 80 bits to find it by, 256 to know
_BEARER = re.compile(r"(?i:bearer) (\S+)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
_TOKEN_ID = re.compile(r"[a-z2-7]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_IDENTITY = re.compile(r"(dns|uri|cn):[\x20-\x7e]{1,255}")
_NOBODY = "0" * 64  # compared with where there is no such token, so that it takes as long
_COMMON = {"tenant", "name", "scopes", "expires"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """One entry of the file."""

    key: str  # "token ID", or the identity of a certificate; nothing secret
    caller: Caller
    expires: datetime | None = None
    secret_sha256: str = field(default="", repr=False)  # of a token

    def has_expired(self, now: float) -> bool:
        """Whether it has at this time, in seconds since the epoch."""
        return self.expires is not None and self.expires.timestamp() <= now


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """The whole file."""

    by_key: Mapping[str, Credential] = field(default_factory=dict[str, Credential])
    quotas: Mapping[str, Quota] = field(default_factory=dict[str, Quota])
    default_quota: Quota = field(default_factory=Quota)

    def quota(self, tenant: str) -> Quota:
        return self.quotas.get(tenant, self.default_quota)

    def of_header(self, value: str | bytes) -> Credential:
        """The credential of an `authorization` header; raises `Unauthenticated`."""
        bearer = _BEARER.fullmatch(value) if isinstance(value, str) else None
        token = TOKEN.fullmatch(bearer[1]) if bearer else None
        if token is None:
            raise Unauthenticated("malformed header")
        found = self.by_key.get(f"token {token[1]}")
        known = found.secret_sha256 if found else _NOBODY
        if not hmac.compare_digest(secret_sha256(token[2]), known) or found is None:
            raise Unauthenticated(f"wrong secret of {found.key}" if found else "unknown token")
        return found

    def of_certificate(self, auth_context: Mapping[str, Sequence[bytes]]) -> Credential:
        """The credential of a certificate that TLS has verified; raises `Unauthenticated`.

        A common name counts only in a certificate that has no DNS name and no URI, as browsers
        have it: who may choose the one may not be who vouches for the other. A certificate that
        fits several entries fits none.
        """
        found = [
            self.by_key[identity]
            for identity in identities_of(auth_context)
            if identity in self.by_key
        ]
        if len(found) != 1:
            raise Unauthenticated(f"a certificate that {len(found)} entries know")
        return found[0]


def secret_sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def identities_of(auth_context: Mapping[str, Sequence[bytes]]) -> list[str]:
    """What a client certificate says of itself, as gRPC tells it, in the words of the file."""
    alternative = [
        f"{kind}:{_text(name)}"
        for kind, key in (("dns", "peer_dns"), ("uri", "peer_uri"))
        for name in auth_context.get(key, ())
    ]
    return alternative or [f"cn:{_text(name)}" for name in auth_context.get("x509_common_name", ())]


def _text(name: str | bytes) -> str:
    return name if isinstance(name, str) else name.decode(errors="replace")


def read_credentials(path: Path) -> Credentials:
    """Read the file; raises `ConfigError` for one that others can read, or that is not sound."""
    return parse_credentials(read_private_file(path), source=str(path))


def read_private_file(path: Path) -> str:
    """The text of a file that must be its owner's alone."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & 0o077:
                raise ConfigError(
                    f"{path} can be read or written by others (mode {mode & 0o777:o}); "
                    f"make it private: chmod 600 {path}"
                )
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has more than {MAX_FILE_BYTES} bytes; it is no such file")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error


def parse_credentials(text: str, *, source: str) -> Credentials:
    """Read the content of a credentials file; errors name `source` and the entry."""
    try:
        fields = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{source} is not TOML: {error}") from error
    try:
        return _credentials(fields)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _credentials(fields: Mapping[str, Any]) -> Credentials:
    _check_keys(fields, {"defaults", "tenants", "tokens", "certificates"}, "the file")
    default_quota = _quota(_table(fields, "defaults"), Quota(), "defaults")
    quotas = {
        tenant: _quota(_mapping(quota, tenant), default_quota, f"tenants.{tenant}")
        for tenant, quota in _table(fields, "tenants").items()
    }
    by_key: dict[str, Credential] = {}
    for credential in (
        *map(_token, _entries(fields, "tokens")),
        *map(_certificate, _entries(fields, "certificates")),
    ):
        if credential.key in by_key:
            raise ConfigError(f"{credential.key} is there twice; remove one of the two")
        by_key[credential.key] = credential
    return Credentials(by_key=by_key, quotas=quotas, default_quota=default_quota)


def _quota(fields: Mapping[str, Any], default: Quota, where: str) -> Quota:
    _check_keys(fields, {f.name for f in dataclasses.fields(Quota)}, where)
    for name, value in fields.items():
        whole = name != "requests_per_second"
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ConfigError(f"{where}.{name} must be a number, got {quoted(str(value))}")
    return dataclasses.replace(default, **fields)


def _token(fields: Mapping[str, Any]) -> Credential:
    where = f"token {quoted(str(fields.get('id')))}"
    _check_keys(fields, {"id", "sha256", "created", *_COMMON}, where)
    token_id = _matching(fields, "id", _TOKEN_ID, where)
    digest = _matching(fields, "sha256", _SHA256, where)
    return _credential(f"token {token_id}", fields, where, secret_sha256=digest)


def _certificate(fields: Mapping[str, Any]) -> Credential:
    where = f"certificate {quoted(str(fields.get('identity')))}"
    _check_keys(fields, {"identity", *_COMMON}, where)
    return _credential(_matching(fields, "identity", _IDENTITY, where), fields, where)


def _credential(
    key: str, fields: Mapping[str, Any], where: str, *, secret_sha256: str = ""
) -> Credential:
    caller = Caller(
        tenant=_matching(fields, "tenant", _NAME, where),
        name=_matching(fields, "name", _NAME, where),
        scopes=parse_scopes(fields.get("scopes"), where),
    )
    expires = fields.get("expires")
    if expires is not None and not (isinstance(expires, datetime) and expires.tzinfo):
        raise ConfigError(
            f"{where}: expires must be a time with its offset, as 2027-01-01T00:00:00Z"
        )
    return Credential(
        key=key,
        caller=caller,
        expires=expires.astimezone(UTC) if expires else None,
        secret_sha256=secret_sha256,
    )


def parse_scopes(names: object, where: str) -> frozenset[Scope]:
    """Scopes by their names; raises `ConfigError` with the known ones."""
    known = [scope.value for scope in Scope]
    if not isinstance(names, list) or not names or any(name not in known for name in names):
        raise ConfigError(f"{where}: scopes must be a list of {', '.join(known)}; got {names!r}")
    return frozenset(Scope(name) for name in names)


def check_name(what: str, value: str) -> None:
    """Raise `ConfigError` for what cannot name a tenant, a token or a certificate."""
    if not _NAME.fullmatch(value):
        raise ConfigError(
            f"{what} must be 1 to 64 letters, digits and ._@+- and begin with a letter or digit, "
            f"got {quoted(value)}"
        )


def _matching(fields: Mapping[str, Any], name: str, pattern: re.Pattern[str], where: str) -> str:
    value = fields.get(name)
    if isinstance(value, str) and pattern is _NAME:
        check_name(f"{where}: {name}", value)
    elif not isinstance(value, str) or not pattern.fullmatch(value):
        raise ConfigError(f"{where}: {name} is missing or malformed")
    return value


def _table(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return _mapping(fields.get(name, {}), name)


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a table, written as [{name}]")
    return value


def _entries(fields: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    entries = fields.get(name, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{name} must be tables, each written as [[{name}]]")
    return entries


def _check_keys(fields: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(fields) - known):
        raise ConfigError(
            f"{where} has unknown keys: {', '.join(map(quoted, unknown))}; "
            f"known: {', '.join(sorted(known))}"
        )
