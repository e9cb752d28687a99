"""The way of a request's events from the worker thread to the event loop, bounded."""

import asyncio
from collections import deque

from engine.batching.batcher import Event, StepDone

MAX_WAITING_STEPS = 32


class EventStream:
    """Events of one request; for a reader that lags, the oldest steps are dropped.

    Images and the last event always arrive: there are no more of them than the request asked for.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[Event] = deque()
        self._not_empty = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event, from any thread."""
        self._loop.call_soon_threadsafe(self._append, event)

    async def get(self) -> Event:
        """Wait for the next event."""
        while not self._events:
            self._not_empty.clear()
            await self._not_empty.wait()
        return self._events.popleft()

    def _append(self, event: Event) -> None:
        self._events.append(event)
        steps = [waiting for waiting in self._events if isinstance(waiting, StepDone)]
        if len(steps) > MAX_WAITING_STEPS:
            self._events.remove(steps[0])
        self._not_empty.set()
