"""Around each call of the server, whatever its method: an id, a line in the log, a count.

It stands outermost, so that what is refused further in is counted and logged too.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from engine.errors import ShuttingDown
from engine.operations.calls import (
    REQUEST_ID_HEADER,
    Call,
    current_request_id,
    host_of,
    request_id_of,
    set_current_call,
)
from engine.operations.metrics import Metrics
from engine.security.callers import current_caller
from engine.security.handlers import Context, Handler, refusing, wrapped
from engine.serving.status import status_of

UNKNOWN = "unknown"
# Answered while the server drains: how else would anybody know.
_ALWAYS_OPEN = ("/grpc.health.", "/grpc.reflection.", "/oneword.v1.ServerInfoService/")
# A probe comes every few seconds and says nothing new.
_QUIET = ("/grpc.health.",)
# A flood of calls that are turned away must not become a flood of lines.
_QUIET_REASONS = ("UNAUTHENTICATED", "RATE_LIMITED")
# Refusals at the door that are no fault of the request; the batcher's own are counted there.
_SHED = {"RATE_LIMITED": "rate_limited"}
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}

access = logging.getLogger("engine.access")


def methods_of(services: Iterable[str]) -> frozenset[str]:
    """The paths of all methods of some services."""
    pool = descriptor_pool.Default()
    found = [pool.FindServiceByName(name) for name in services]
    return frozenset(
        f"/{service.full_name}/{method.name}" for service in found for method in service.methods
    )


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Numbers, counts and logs calls; refuses new ones once the server drains."""

    def __init__(
        self, metrics: Metrics, methods: Iterable[str], *, access_log: bool = True
    ) -> None:
        """`methods` are the paths that the server has: others are counted as one."""
        self._metrics = metrics
        self._methods = frozenset(methods)
        self._access_log = access_log
        self._draining = False
        self.in_flight = 0

    def drain(self) -> None:
        """Refuse new calls from now on, but for those that ask how the server is."""
        self._draining = True

    # The stub says that there is always a handler; there is none for an unknown method.
    async def intercept_service(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        details: Any = handler_call_details  # the stub has its fields as properties of `object`
        path: str = details.method
        request_id = request_id_of(details.invocation_metadata or ())
        if self._draining and not path.startswith(_ALWAYS_OPEN):
            handler = refusing(_refuse)
            self._metrics.shed.add("shutting_down")
        else:
            handler = await continuation(handler_call_details) or refusing(_unknown_method)
        method = path if path in self._methods else UNKNOWN
        return wrapped(handler, lambda context: self._around(context, request_id, method))

    @asynccontextmanager
    async def _around(self, context: Context, request_id: str, method: str) -> AsyncGenerator[None]:
        call = Call(request_id=request_id, method=method, peer=host_of(context.peer()))
        set_current_call(call)
        self.in_flight += 1
        allowed_s = context.time_remaining()
        cancelled = False
        try:
            await context.send_initial_metadata(((REQUEST_ID_HEADER, request_id),))
            yield
        except asyncio.CancelledError:
            cancelled = True
            raise
        finally:
            self.in_flight -= 1
            self._ended(call, *end_of(context, cancelled, allowed_s))

    def _ended(self, call: Call, code: str, reason: str) -> None:
        duration_s = time.perf_counter() - call.started
        self._metrics.rpcs.add(call.method, code)
        self._metrics.rpc_seconds.observe(duration_s, call.method)
        if reason in _SHED:
            self._metrics.shed.add(_SHED[reason])
        if self._access_log:
            quiet = call.method.startswith(_QUIET) or reason in _QUIET_REASONS
            # Whoever is not known is nobody's caller, whatever the task's default says.
            tenant = "" if code == "UNAUTHENTICATED" else current_caller().tenant
            fields = {
                "code": code,
                "reason": reason,
                "tenant": tenant,
                "duration_ms": round(1e3 * duration_s, 3),
                "peer": call.peer,
            }
            access.log(
                logging.DEBUG if quiet else logging.INFO,
                "%s %s %.1f ms tenant=%s peer=%s request_id=%s%s",
                call.method,
                code,
                1e3 * duration_s,
                tenant,
                call.peer,
                call.request_id,
                f" reason={reason}" if reason else "",
                extra={"fields": fields},
            )


def end_of(context: Context, cancelled: bool, allowed_s: float | None) -> tuple[str, str]:
    """The status code of a call that ended, and the reason that its details name.

    `allowed_s` is what its caller allowed when it began.
    """
    if cancelled:
        # A caller whose time is up hangs up. Its clock may be a little ahead: gRPC rounds the time
        # that it sends up, by at most a percent or so.
        late = allowed_s is not None and context.time_remaining() <= 0.02 * allowed_s + 0.02
        return ("DEADLINE_EXCEEDED" if late else "CANCELLED"), ""
    code = context.code()
    number = code.value[0] if isinstance(code, grpc.StatusCode) else int(code or 0)
    for key, value in context.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return _NAMES[number], _reason(value)
    return _NAMES[number], ""


def _reason(content: bytes) -> str:
    info = error_details_pb2.ErrorInfo()
    for detail in Status.FromString(content).details:
        if detail.Unpack(info):
            return info.reason
    return ""


async def _refuse(context: Context) -> None:
    error = ShuttingDown("the server is shutting down; send the request to another one")
    status = status_of(error, current_request_id())
    await context.abort(status.code, status.details or "", status.trailing_metadata or ())


async def _unknown_method(context: Context) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
