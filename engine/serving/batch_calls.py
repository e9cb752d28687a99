"""Many requests in one call: some at a time, each ending on its own."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

from engine.errors import InvalidRequest
from engine.faults import log_fault
from engine.serving.executions import patiently
from engine.serving.status import failure_of, is_internal
from protos.oneword.v1.generation_pb2 import (
    GenerateBatchRequest,
    GenerateBatchResponse,
    GenerateRequest,
    GenerateResponse,
)

MAX_BATCH_REQUESTS = 256
# Items that are under way together: enough to fill the device, few enough to leave the queue to
# others.
CONCURRENT_ITEMS = 16
_MAX_WAIT_S = 1.0

logger = logging.getLogger(__name__)

Follow = Callable[[GenerateRequest, str], AsyncGenerator[GenerateResponse]]


def check_batch(request: GenerateBatchRequest) -> None:
    """Raise `InvalidRequest` for a batch without items, or with too many."""
    if not 1 <= len(request.requests) <= MAX_BATCH_REQUESTS:
        raise InvalidRequest(
            f"requests must have 1 to {MAX_BATCH_REQUESTS} items, got {len(request.requests)}; "
            "make several calls of them",
            field="requests",
        )


async def answer_batch(
    requests: Sequence[GenerateRequest],
    follow: Follow,
    write: Callable[[GenerateBatchResponse], Awaitable[None]],
    *,
    server_id: str,
) -> None:
    """Write the events of all items as they come; a failure ends its item alone.

    An item for which the queue has no room waits until it has. `follow` gives the events of one
    request, which the server calls by the second argument. Raises what `write` raises, when nothing
    goes on.
    """
    turns, writing = asyncio.Semaphore(CONCURRENT_ITEMS), asyncio.Lock()

    async def answer(index: int, request: GenerateRequest) -> None:
        async with turns, aclosing(_events(index, request, follow, server_id)) as events:
            async for event in events:
                async with writing:
                    await write(event)

    try:
        async with asyncio.TaskGroup() as group:
            for item in enumerate(requests):
                group.create_task(answer(*item))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _events(
    index: int, request: GenerateRequest, follow: Follow, server_id: str
) -> AsyncGenerator[GenerateBatchResponse]:
    name = f"{server_id}-{index}"
    try:
        responses = patiently(lambda: follow(request, name), max_wait_s=_MAX_WAIT_S)
        async with aclosing(responses):
            async for response in responses:
                yield GenerateBatchResponse(index=index, response=response)
    except Exception as error:
        if is_internal(error):
            log_fault(logger, error, "request %s failed", name)
        yield GenerateBatchResponse(index=index, failure=failure_of(error, name))
