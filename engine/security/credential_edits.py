"""Changes to a credentials file: a token added or revoked, everything else left as it was written.

The file is text that an operator also edits. So a change is a change of text, and it is made only
if the text then means what it meant before, but for that one token.
"""

import base64
import fcntl
import os
import re
import secrets
import tomllib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, quoted
from engine.files import write_private
from engine.security.callers import Scope
from engine.security.credentials import (
    Credential,
    check_name,
    parse_credentials,
    parse_scopes,
    read_private_file,
    secret_sha256,
)

_HEADER = """\
# Who may call a OneWord server: docs/security.md. Keep this file private (chmod 600).
# A server that runs takes changes over within a second or so.
"""
_TABLE = re.compile(r"^[ \t]*\[", re.MULTILINE)
_MAX_DAYS = 36_500


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken:
    """A token that was made now. `token` is shown once and kept nowhere."""

    token: str
    token_id: str
    expires: datetime | None


def create_token(
    path: Path,
    *,
    tenant: str,
    name: str,
    scopes: Sequence[str],
    expires_in_days: float | None = None,
    now: datetime | None = None,
) -> NewToken:
    """Add a token to the file, or begin the file with it. Raises `ConfigError`."""
    check_name("tenant", tenant)
    check_name("name", name)
    granted = parse_scopes(list(scopes), "the token")
    now = (now or datetime.now(UTC)).replace(microsecond=0)
    expires = _end(now, expires_in_days)
    token_id, secret = _random(10), _random(32)
    entry = _entry(token_id, secret, tenant, name, granted, now, expires)
    with _locked(path):
        before = read_private_file(path) if path.exists() else _HEADER
        after = f"{before.rstrip()}\n\n{entry}"
        _check_change(path, before, after, added=token_id)
        write_private(path, after.encode())
    return NewToken(token=f"ow_{token_id}_{secret}", token_id=token_id, expires=expires)


def revoke_token(path: Path, token_id: str) -> None:
    """Take a token out of the file; raises `ConfigError` where there is none of this id."""
    with _locked(path):
        before = read_private_file(path)
        known = parse_credentials(before, source=str(path)).by_key
        if f"token {token_id}" not in known:
            raise ConfigError(
                f"{path} has no token {quoted(token_id)}; `oneword tokens list` shows them"
            )
        after = _without(before, token_id)
        _check_change(path, before, after, removed=token_id)
        write_private(path, after.encode())


def list_tokens(path: Path) -> list[Credential]:
    """All credentials of the file, certificates too; raises `ConfigError`."""
    return list(parse_credentials(read_private_file(path), source=str(path)).by_key.values())


def _random(num_bytes: int) -> str:
    return base64.b32encode(secrets.token_bytes(num_bytes)).decode().rstrip("=").lower()


def _end(now: datetime, days: float | None) -> datetime | None:
    if days is None:
        return None
    if not 0.0 < days <= _MAX_DAYS:
        raise ConfigError(f"expires_in_days must be above 0 and at most {_MAX_DAYS}, got {days}")
    return now + timedelta(days=days)


def _entry(
    token_id: str,
    secret: str,
    tenant: str,
    name: str,
    scopes: frozenset[Scope],
    created: datetime,
    expires: datetime | None,
) -> str:
    lines = [
        "[[tokens]]",
        f'id = "{token_id}"',
        f'sha256 = "{secret_sha256(secret)}"',
        f'tenant = "{tenant}"',  # `check_name` left nothing that would need an escape
        f'name = "{name}"',
        "scopes = [" + ", ".join(f'"{scope}"' for scope in Scope if scope in scopes) + "]",
        f"created = {_time(created)}",
    ]
    if expires is not None:
        lines.append(f"expires = {_time(expires)}")
    return "\n".join(lines) + "\n"


def _time(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _without(text: str, token_id: str) -> str:
    """The text without the `[[tokens]]` that has this id, up to the next table."""
    line = re.search(rf"^[ \t]*id[ \t]*=[ \t]*[\"']{token_id}[\"']", text, re.MULTILINE)
    if line is None:
        return text
    tables = [table.start() for table in _TABLE.finditer(text)]
    start = max((table for table in tables if table < line.start()), default=line.start())
    end = min((table for table in tables if table > line.start()), default=len(text))
    return text[:start].rstrip() + "\n\n" + text[end:] if end < len(text) else text[:start]


def _check_change(
    path: Path, before: str, after: str, *, added: str | None = None, removed: str | None = None
) -> None:
    """Raise unless the two texts differ in this one token, and the new one is sound."""
    parse_credentials(before, source=str(path))
    expected, found = _values(path, before), _values(path, after)
    expected["tokens"] = [t for t in expected.get("tokens", []) if t["id"] != removed]
    others = [token for token in found.get("tokens", []) if token["id"] != added]
    if {**found, "tokens": others} != expected:
        raise ConfigError(
            f"{path} is written in a way that cannot be changed safely here; edit it by hand: each "
            "token in a table of its own, begun with [[tokens]]"
        )
    parse_credentials(after, source=str(path))


def _values(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} cannot be changed here: {error}; edit it by hand") from error


@contextmanager
def _locked(path: Path) -> Generator[None]:
    """One change at a time: the folder is locked, for the file itself is replaced."""
    try:
        folder = os.open(path.resolve().parent, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
