"""The call that is being served: its id, its method and when it began, for whoever logs or traces.

The id comes from the caller's `x-request-id`, if that is one, so that a log of theirs and a log of
ours can be read together; else it is made here. It is told in the initial metadata of the answer.
"""

import re
import time
import uuid
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field

REQUEST_ID_HEADER = "x-request-id"
# What an id may be: nothing that a log, a shell or a browser could take for more than a word.
_SANE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One RPC, from its headers to its status."""

    request_id: str
    method: str  # "/package.Service/Method"; "unknown" for what this server does not have
    peer: str = ""  # the caller's address without its port
    started: float = field(default_factory=time.perf_counter)


_current: ContextVar[Call | None] = ContextVar("call", default=None)


def current_call() -> Call | None:
    """The call whose task this is; None outside of calls."""
    return _current.get()


def set_current_call(call: Call) -> None:
    """Say which call is served, for the rest of this task. gRPC gives each call its own."""
    _current.set(call)


def current_request_id() -> str:
    """The id of the call that is served, or a new one."""
    call = _current.get()
    return uuid.uuid4().hex if call is None else call.request_id


def request_id_of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The caller's id if it sent one that is sane, else a new one."""
    sent = [value for key, value in metadata if key == REQUEST_ID_HEADER]
    if len(sent) == 1 and isinstance(sent[0], str) and _SANE.fullmatch(sent[0]):
        return sent[0]
    return uuid.uuid4().hex


def host_of(peer: str) -> str:
    """gRPC's name of a peer without the port, which is another one for each connection."""
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return kind
    host = address.rpartition(":")[0]
    return host.replace("%5B", "").replace("%5D", "").strip("[]")
