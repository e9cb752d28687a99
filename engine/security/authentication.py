"""The gate of the server: every call on every path is from somebody who may make it, or refused.

A call with a token is judged by its headers, before any of its request is read. What the token may
not do, or a method that does not exist, is told to known callers alone. A call without a token is
judged by its client certificate, where the server asks for those. A token that does not count is
refused even with a good certificate: there is no quiet second try.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from engine.errors import EngineError, PermissionDenied, Unauthenticated, quoted
from engine.operations.calls import current_request_id
from engine.security.callers import ANONYMOUS, set_current_caller
from engine.security.credential_source import CredentialSource
from engine.security.credentials import Credential
from engine.security.handlers import Context, Handler, refusing, wrapped
from engine.security.method_scopes import SCOPE
from engine.security.rate_limits import Quota, RateLimits, TokenBucket
from engine.serving.status import status_of

# Of all callers together that have no credentials, on methods that are open to them.
ANONYMOUS_QUOTA = Quota(requests_per_second=50.0, burst=100, concurrent_rpcs=32)
_LOGGED = Quota(requests_per_second=1.0, burst=20)  # refusals; a flood must not fill the disk
Metadata = Sequence[tuple[str, str | bytes]]

logger = logging.getLogger(__name__)


class Authentication(grpc.aio.ServerInterceptor):
    """Finds the caller of each call, checks its scope and its tenant's quota."""

    def __init__(
        self,
        source: CredentialSource,
        *,
        certificates: bool,
        open_methods: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.time,
        limits: RateLimits | None = None,
    ) -> None:
        """`certificates`: TLS verifies those of clients. `open_methods` need no credentials."""
        self._source = source
        self._certificates = certificates
        self._open_methods = open_methods
        self._clock = clock
        self._limits = limits or RateLimits()
        self._under_way: dict[asyncio.Timeout, Credential] = {}
        self._log = _RefusalLog()

    # The stub says that there is always a handler; there is none for an unknown method.
    async def intercept_service(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        details: Any = handler_call_details  # the stub has its fields as properties of `object`
        method: str = details.method
        if method in self._open_methods:
            return _admitting(await continuation(handler_call_details), self._anonymous)
        try:
            credential = self._of_token(details.invocation_metadata or ())
            handler = await continuation(handler_call_details)
            if credential is not None and handler is not None:
                check_scope(credential, method)
        except EngineError as error:
            return self._refusing(error, method)
        if credential is not None:
            return _admitting(handler, lambda context: self._admitted(context, credential))
        # The certificate is known once the call has a context.
        allowed = None if handler is None else method
        return wrapped(
            handler or refusing(_unknown_method),
            lambda context: self._certified(context, method, allowed),
        )

    def recheck(self) -> None:
        """End the calls under way whose credential is gone or another one by now."""
        now = asyncio.get_running_loop().time()
        by_key = self._source.current.by_key
        for scope, credential in self._under_way.items():
            if by_key.get(credential.key) != credential and not scope.expired():
                scope.reschedule(now)

    def _of_token(self, metadata: Metadata) -> Credential | None:
        """The credential of the token that came along; None without one, if there may be none."""
        headers = [value for key, value in metadata if key == "authorization"]
        if not headers and self._certificates:
            return None
        if len(headers) != 1:
            raise Unauthenticated(f"{len(headers)} authorization headers")
        return self._unexpired(self._source.current.of_header(headers[0]))

    def _unexpired(self, credential: Credential) -> Credential:
        if credential.has_expired(self._clock()):
            raise Unauthenticated(f"{credential.key} has expired")
        return credential

    @asynccontextmanager
    async def _anonymous(self, context: Context) -> AsyncGenerator[None]:
        async with _refusals(context):
            set_current_caller(ANONYMOUS)
            with self._limits.admitted(ANONYMOUS.tenant, ANONYMOUS_QUOTA):
                yield

    @asynccontextmanager
    async def _admitted(self, context: Context, credential: Credential) -> AsyncGenerator[None]:
        """A call of a known caller, from the first to the last of what happens in it."""
        async with _refusals(context):
            caller = credential.caller
            set_current_caller(caller)
            quota = self._source.current.quota(caller.tenant)
            with self._limits.admitted(caller.tenant, quota):
                async with self._while_valid(credential):
                    yield

    @asynccontextmanager
    async def _certified(
        self, context: Context, method: str, allowed: str | None
    ) -> AsyncGenerator[None]:
        """The same for a caller with a certificate; `allowed` is None for an unknown method."""
        async with _refusals(context):
            try:
                found = self._source.current.of_certificate(context.auth_context())
                credential = self._unexpired(found)
                if allowed is not None:
                    check_scope(credential, allowed)
            except EngineError as error:
                self._log.add(error, method, context)
                raise
        async with self._admitted(context, credential):
            yield

    @asynccontextmanager
    async def _while_valid(self, credential: Credential) -> AsyncGenerator[None]:
        """End what runs inside when its credential expires or is revoked."""
        ends = None
        if credential.expires is not None:
            left_s = credential.expires.timestamp() - self._clock()
            ends = asyncio.get_running_loop().time() + left_s
        scope = asyncio.timeout_at(ends)
        try:
            async with scope:
                self._under_way[scope] = credential
                try:
                    yield
                finally:
                    del self._under_way[scope]
        except TimeoutError:
            if not scope.expired():
                raise
            raise Unauthenticated(f"{credential.key} ended during a call") from None

    def _refusing(self, error: EngineError, method: str) -> Handler:
        async def refuse(context: Context) -> None:
            self._log.add(error, method, context)
            async with _refusals(context):
                raise error

        return refusing(refuse)


def check_scope(credential: Credential, method: str) -> None:
    """Raise `PermissionDenied` unless the scopes of a caller are enough for a method."""
    caller = credential.caller
    if method not in SCOPE:
        raise PermissionDenied(f"{quoted(method)} is not open to anybody on this server")
    scope = SCOPE[method]
    if scope is not None and scope not in caller.scopes:
        raise PermissionDenied(
            f"this call needs the scope {scope.value!r}; {caller.name!r} of tenant "
            f"{caller.tenant!r} has {', '.join(sorted(caller.scopes))}; ask the operator for it"
        )


def _admitting(handler: Handler | None, around: Any) -> Handler | None:
    """None where there is no such method: gRPC says so."""
    return wrapped(handler, around) if handler is not None else handler


@asynccontextmanager
async def _refusals(context: Context) -> AsyncGenerator[None]:
    """Turn what is refused here into a status; `CancelledError` passes."""
    try:
        yield
    except EngineError as error:
        status = status_of(error, current_request_id())
        await context.abort(status.code, status.details or "", status.trailing_metadata or ())


async def _unknown_method(context: Context) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


class _RefusalLog:
    """Who was refused what, at most so many lines a second."""

    def __init__(self) -> None:
        self._bucket = TokenBucket(_LOGGED, time.monotonic())
        self._left_out = 0

    def add(self, error: EngineError, method: str, context: Context) -> None:
        if self._bucket.take(_LOGGED, time.monotonic()) > 0.0:
            self._left_out += 1
            return
        # The method is the caller's text. What the caller sent to identify itself is not logged.
        logger.warning(
            "refused %s from %s: %s (%d refusals before it were not logged)",
            quoted(method),
            quoted(context.peer()),
            error.reason if isinstance(error, Unauthenticated) else error,
            self._left_out,
        )
        self._left_out = 0
