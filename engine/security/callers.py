"""Who calls: the tenant and the scopes that the server's interceptor found for a call."""

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from engine.store.concept_store import DEFAULT_TENANT


class Scope(StrEnum):
    """What a caller may do. Scopes stand side by side: none of them holds another one."""

    GENERATE = "generate"  # draw, with the stored concepts of the tenant too
    CONCEPTS = "concepts"  # import, describe, list, export and delete concepts
    TRAIN = "train"  # have words learned; what is learned is stored as a concept
    ADMIN = "admin"  # run the server


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Somebody whom the server knows."""

    tenant: str
    name: str  # of the token or the certificate, as the credentials file has it
    scopes: frozenset[Scope]


# Of a server without authentication: whoever reaches it may do everything.
LOCAL_CALLER = Caller(tenant=DEFAULT_TENANT, name="local", scopes=frozenset(Scope))
# Of a method that is open to everybody, on a server with authentication: owns nothing.
ANONYMOUS = Caller(tenant="", name="anonymous", scopes=frozenset())

_current: ContextVar[Caller] = ContextVar("caller", default=LOCAL_CALLER)


def current_caller() -> Caller:
    """The caller of the RPC whose task this is.

    Only that task knows: take it before work goes to a thread of a pool, and hand it on.
    """
    return _current.get()


def set_current_caller(caller: Caller) -> None:
    """Say who calls, for the rest of this task. gRPC gives each call a task of its own."""
    _current.set(caller)
