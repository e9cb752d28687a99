"""Method handlers of grpc.aio wrapped: something happens around each call, whatever its kind."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from typing import TYPE_CHECKING, Any

import grpc

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

    async def behaviour(request: Any, context: Context) -> Any:
        async with around(context):
            if not inspect.isasyncgenfunction(inner):
                return await inner(request, context)
            async with aclosing(inner(request, context)) as replies:
                async for reply in replies:
                    await context.write(reply)

    return make(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


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
