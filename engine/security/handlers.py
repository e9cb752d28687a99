"""Method handlers of grpc.aio wrapped: something happens around each call, whatever its kind.

What is no message of its method is refused as the caller's mistake. gRPC itself would answer
UNKNOWN, and log a traceback for whoever sends such bytes.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from engine.errors import InvalidRequest
from engine.operations.calls import current_request_id
from engine.serving.status import status_of

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
else:
    Handler = Any  # what the generated code makes is a class that does not derive from it
Context = Any
_TAKEN_S = 1.0
_TAKEN_BYTES = 16 << 20
Around = Callable[[Context], AbstractAsyncContextManager[None]]


def wrapped(handler: Handler, around: Around) -> Handler:
    """The same handler inside `around(context)`, which runs in the task of the call.

    The replies of an async generator are written from a coroutine, so that `around` sees the
    cancellation of the call at once, and not when the generator is collected.
    """
    make, inner = _kind(handler)
    deserialize = handler.request_deserializer
    if not isinstance(deserialize, _Deserializer):  # the innermost of those that are wrapped
        inner = _refusing_torn(inner, streamed=bool(handler.request_streaming))
        deserialize = _Deserializer(deserialize)

    async def behaviour(request: Any, context: Context) -> Any:
        async with around(context):
            return await inner(request, context)

    return make(
        behaviour,
        request_deserializer=deserialize,
        response_serializer=handler.response_serializer,
    )


class _Torn:
    """In place of a message that cannot be read."""


class _Deserializer:
    """Reads messages, and leaves it to the handler to say what is none."""

    def __init__(self, deserialize: Callable[[bytes], Any] | None) -> None:
        self._deserialize = deserialize

    def __call__(self, content: bytes) -> Any:
        try:
            return content if self._deserialize is None else self._deserialize(content)
        except DecodeError:
            return _Torn()


def _refusing_torn(inner: Callable[..., Any], *, streamed: bool) -> Callable[..., Awaitable[Any]]:
    """A behaviour that answers torn messages with INVALID_ARGUMENT, around one that never sees
    them; the replies of an async generator are written."""

    async def behaviour(request: Any, context: Context) -> Any:
        try:
            request = _sound(request) if streamed else _checked(request)
            if not inspect.isasyncgenfunction(inner):
                return await inner(request, context)
            async with aclosing(inner(request, context)) as replies:
                async for reply in replies:
                    with unless_gone():
                        await context.write(reply)
        except InvalidRequest as error:  # our services turn it into a status themselves
            status = status_of(error, current_request_id())
            await end_with(context, status)

    return behaviour


def _checked(request: Any) -> Any:
    if isinstance(request, _Torn):
        raise InvalidRequest(
            "what was sent is not a message of this method: it cannot be parsed, or a text in it "
            "is not UTF-8; make it by the .proto files of this server"
        )
    return request


async def _sound(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


def refusing(refuse: Callable[[Context], Awaitable[None]]) -> Handler:
    """A handler for any method that ends the call; what it sends is thrown away unread."""

    async def behaviour(requests: AsyncIterator[bytes], context: Context) -> None:
        await _take(requests)
        await refuse(context)

    return grpc.stream_stream_rpc_method_handler(behaviour)  # pyright: ignore[reportArgumentType]


async def _take(requests: AsyncIterator[bytes]) -> None:
    """Take a little of what is sent: a client of grpc.aio that is told no while it writes reports
    INTERNAL, and not what it was told."""
    num_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_TAKEN_S):
            async for request in requests:
                num_bytes += len(request)
                if num_bytes > _TAKEN_BYTES:
                    return


async def end_with(context: Context, status: grpc.Status) -> None:
    """End a call with a status; to a caller that has gone meanwhile there is nothing to tell."""
    with unless_gone():
        await context.abort(status.code, status.details or "", status.trailing_metadata or ())


@contextmanager
def unless_gone() -> Generator[None]:
    """To a caller that has gone nothing can be sent: that cancels the call, and is no fault."""
    try:
        yield
    except grpc.aio.InternalError:
        raise asyncio.CancelledError("the caller has gone") from None


def _kind(handler: Any) -> tuple[Callable[..., Any], Any]:
    """What makes a handler of this kind, and the function behind it."""
    match bool(handler.request_streaming), bool(handler.response_streaming):
        case False, False:
            return grpc.unary_unary_rpc_method_handler, handler.unary_unary
        case False, True:
            return grpc.unary_stream_rpc_method_handler, handler.unary_stream
        case True, False:
            return grpc.stream_unary_rpc_method_handler, handler.stream_unary
        case _:
            return grpc.stream_stream_rpc_method_handler, handler.stream_stream
