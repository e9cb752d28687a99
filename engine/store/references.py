"""References to stored concepts: `name`, `name@latest`, `name@3`, `name@stable`, `name@sha256:...`.

The digest is the concept id, or its first digits. Before the name may stand the caller's own tenant
and a slash. A text that is itself the name of a concept is that name first; a name in angle
brackets can never be mistaken, since nothing of a name may follow its bracket.
"""

import re
from dataclasses import dataclass

from engine.errors import InvalidRequest, quoted

LATEST = "latest"
MIN_DIGEST_DIGITS = 8
MAX_DIGEST_DIGITS = 64
_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,62}")
# 18 digits fit into the databases' 64 bits.
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_DIGEST = re.compile(r"sha256:([0-9A-Fa-f]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A name and at most one of the three: without any, its latest version."""

    name: str
    version: int | None = None
    alias: str = ""
    digest: str = ""  # the beginning of a concept id


def without_tenant(text: str, tenant: str) -> str:
    """A reference without the caller's own tenant; that of another stays, and names nothing."""
    return text.removeprefix(f"{tenant}/")


def parse_reference(text: str) -> Reference | None:
    """Read `name@...`; None for what is none. Raises `InvalidRequest` for a digest too short."""
    name, at, selector = text.rpartition("@")
    if not at or not name:
        return None
    if selector == LATEST:
        return Reference(name=name)
    if _VERSION.fullmatch(selector):
        return Reference(name=name, version=int(selector))
    if match := _DIGEST.fullmatch(selector):
        return Reference(name=name, digest=_digest(match[1], text))
    if _ALIAS.fullmatch(selector):
        return Reference(name=name, alias=selector)
    return None


def _digest(digits: str, text: str) -> str:
    if not MIN_DIGEST_DIGITS <= len(digits) <= MAX_DIGEST_DIGITS:
        raise InvalidRequest(
            f"the digest in {quoted(text)} has {len(digits)} digits, it needs {MIN_DIGEST_DIGITS} "
            f"to {MAX_DIGEST_DIGITS}; take them from the concept id",
            field="placeholder_token",
        )
    return digits.lower()


def check_alias(alias: str) -> None:
    """Refuse aliases that could be read as a version, a digest or the latest one."""
    if not _ALIAS.fullmatch(alias) or alias == LATEST:
        raise InvalidRequest(
            f"{quoted(alias)} cannot be an alias: it has 1 to 63 of a-z, 0-9, '.', '_' and '-', "
            f"begins with a letter and is not {LATEST!r}; choose another, for instance 'stable'",
            field="alias",
        )
