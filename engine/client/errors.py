"""What a call failed with: for its caller to act on, and for retries to judge by."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from engine.errors import OneWordError
from protos.oneword.v1.generation_pb2 import Failure

_STATUS_TRAILER = "grpc-status-details-bin"
_PUSHBACK_TRAILER = "grpc-retry-pushback-ms"
# What gRPC says where nobody listens, as against a bad address or a connection that broke.
_CONNECT_FAILED = re.compile("failed to connect", re.IGNORECASE)
_NAME_UNKNOWN = re.compile("errors resolving|DNS resolution failed", re.IGNORECASE)
_DISTRUSTED = re.compile("certificate|handshake failed|WRONG_VERSION_NUMBER", re.IGNORECASE)
# How gRPC and proxies tell of a connection that broke, where not as UNAVAILABLE.
_BROKE = re.compile("RST_STREAM|stream removed", re.IGNORECASE)
_STALE_ETAG = "STALE_ETAG"  # the reason of ABORTED that no repetition mends
_WORKER_DIED = "WORKER_DIED"  # that of UNAVAILABLE for a request that has ended several processes
_TOO_LARGE = re.compile("message larger than max|message too large", re.IGNORECASE)
_CODES = {code.value[0]: code for code in StatusCode}

# answered: the server said so. unsent: it cannot have begun. unknown: the answer was lost.
Fate = Literal["answered", "unsent", "unknown"]


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request that is to be mended."""

    field: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What a server tells of a failure besides code and message."""

    reason: str = ""  # for programs, as in google.rpc.ErrorInfo: "QUEUE_FULL"
    field_violations: tuple[FieldViolation, ...] = ()
    retry_after_s: float | None = None  # when to come back; None: it did not say
    request_id: str = ""  # what the server's log calls the call
    never_again: bool = False  # it told not to try again


class ServerError(OneWordError):
    """A call that failed; `code` says how, the message what to do.

    `transient`: the same call may succeed later, and repeating it does no harm. `attempts` counts
    those that were made.
    """

    def __init__(
        self,
        code: StatusCode,
        message: str,
        *,
        hints: Hints | None = None,
        transient: bool = False,
        fate: Fate = "answered",
    ) -> None:
        super().__init__(message)
        hints = hints or Hints()
        self.code = code
        self.reason = hints.reason
        self.field_violations = hints.field_violations
        self.retry_after_s = hints.retry_after_s
        self.request_id = hints.request_id
        self.transient = transient
        self.fate: Fate = fate
        self.attempts = 1


def error_of_call(error: grpc.RpcError, *, address: str, timeout_s: float | None) -> ServerError:
    """What a call of either kind, blocking or asyncio, has raised."""
    # Every error of a call has these; the type stubs do not say so.
    call: Any = error
    code, text = call.code(), call.details() or ""
    trailers = dict(call.trailing_metadata() or ())
    status = _status_in(trailers)
    hints = _hints(status, trailers.get(_PUSHBACK_TRAILER))
    fate: Fate = "answered"
    if status is None and (code is StatusCode.UNAVAILABLE or _broke(code, text)):
        unsent = _CONNECT_FAILED.search(text) or _NAME_UNKNOWN.search(text)
        fate = "unsent" if unsent else "unknown"
    failure = ServerError(
        code,
        _explain(code, text, fate, address, timeout_s),
        hints=hints,
        transient=_is_transient(code, text, hints, answered=status is not None),
        fate=fate,
    )
    failure.__cause__ = error
    return failure


def error_of_failure(failure: Failure) -> ServerError:
    """What a part of a call has failed with: an item of a batch, or a job."""
    code = _CODES.get(failure.code, StatusCode.UNKNOWN)
    hints = Hints(
        reason=failure.reason,
        retry_after_s=max(0.0, failure.retry_after_s)
        if failure.HasField("retry_after_s")
        else None,
    )
    transient = _is_transient(code, "", hints, answered=True)
    return ServerError(code, failure.message or code.name, hints=hints, transient=transient)


def _is_transient(code: StatusCode, text: str, hints: Hints, *, answered: bool) -> bool:
    if hints.never_again:
        return False
    match code:
        case StatusCode.UNAVAILABLE:
            return hints.reason != _WORKER_DIED and (answered or not _DISTRUSTED.search(text))
        case StatusCode.ABORTED:
            return hints.reason != _STALE_ETAG  # another one was faster: the caller must look again
        case StatusCode.RESOURCE_EXHAUSTED if answered:
            return hints.retry_after_s is not None  # a full disk does not say when it will do
        case StatusCode.RESOURCE_EXHAUSTED:  # of the transport: too many calls, or too many bytes
            return not _TOO_LARGE.search(text)
        case _:
            return not answered and _broke(code, text)


def _broke(code: StatusCode, text: str) -> bool:
    if code is StatusCode.CANCELLED:  # a gRPC server whose queue of calls is full says no more
        return text == "CANCELLED"
    return code in (StatusCode.INTERNAL, StatusCode.UNKNOWN) and bool(_BROKE.search(text))


def _status_in(trailers: dict[str, Any]) -> Status | None:
    """What the server itself has sent; None for what the transport or a proxy made up."""
    try:
        return Status.FromString(trailers[_STATUS_TRAILER])
    except (KeyError, TypeError, DecodeError):
        return None


def _hints(status: Status | None, pushback: str | None) -> Hints:
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry, request = error_details_pb2.RetryInfo(), error_details_pb2.RequestInfo()
    waits: list[float] = []
    for detail in () if status is None else status.details:
        try:
            if detail.Unpack(retry):
                waits.append(retry.retry_delay.seconds + retry.retry_delay.nanos * 1e-9)
            for message in (info, bad_request, request):
                detail.Unpack(message)
        except DecodeError:
            continue
    never_again = False
    if pushback is not None:  # gRFC A6: a negative number, or none at all, forbids it
        never_again = not (pushback.isascii() and pushback.isdigit())
        if not never_again:
            waits.append(int(pushback[:12]) / 1e3)
    return Hints(
        reason=info.reason,
        field_violations=_violations(bad_request.field_violations),
        retry_after_s=max(0.0, *waits) if waits else None,
        request_id=request.request_id,
        never_again=never_again,
    )


def _violations(
    messages: Iterable[error_details_pb2.BadRequest.FieldViolation],
) -> tuple[FieldViolation, ...]:
    return tuple(FieldViolation(message.field, message.description) for message in messages)


def _explain(code: StatusCode, text: str, fate: Fate, address: str, timeout_s: float | None) -> str:
    match code:
        case _ if fate != "answered" and _DISTRUSTED.search(text):
            return f"no TLS with {address}; check tls_ca, and the server's name ({text})"
        case _ if fate == "unsent" and _NAME_UNKNOWN.search(text):
            return f"{address} cannot be looked up; check the address ({text})"
        case _ if fate == "unsent":
            return f"no server at {address}; start one with `oneword serve`"
        case _ if fate == "unknown":
            return f"no connection to {address}, or it broke; try again ({text})"
        case StatusCode.UNIMPLEMENTED:
            return f"the server at {address} is not a OneWord server of this version"
        case StatusCode.DEADLINE_EXCEEDED if timeout_s is not None:
            return f"no answer within {timeout_s:g} s; allow more time, or ask for less ({text})"
        case _:
            return text or code.name
