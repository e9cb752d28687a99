"""The way of a request's events from the worker thread to the event loop: bounded and paced."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

from engine.batching.batcher import Event, ImageDone, StepDone

MAX_WAITING_STEPS = 32


class EventStream:
    """Events of one request; for a reader that lags, the oldest steps are dropped.

    Images and the last event always arrive: there are no more of them than the request asked for.
    What need not be told does not wake the event loop, which shares the cores with the model.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        follows_steps: Callable[[], bool] = lambda: True,
        step_interval_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`follows_steps` is asked on the worker thread. Of one image's steps those are told that
        come `step_interval_s` after the one told last, the last one, and those with a preview."""
        self._loop = loop
        self._follows_steps = follows_steps
        self._step_interval_s = step_interval_s
        self._clock = clock
        self._told: dict[int, float] = {}  # when a step was told last, by image
        self._last_image: ImageDone | None = None  # told together with the end that follows it
        self._events: deque[Event] = deque()
        self._not_empty = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event, from any thread."""
        if isinstance(event, StepDone) and not self._is_due(event):
            return
        if isinstance(event, ImageDone) and event.is_last:
            self._last_image = event
            return
        images = [] if self._last_image is None else [self._last_image]
        self._last_image = None
        self._loop.call_soon_threadsafe(self._append, *images, event)

    async def get(self) -> Event:
        """Wait for the next event."""
        while not self._events:
            self._not_empty.clear()
            await self._not_empty.wait()
        return self._events.popleft()

    def _is_due(self, event: StepDone) -> bool:
        if not self._follows_steps():
            return False
        if event.preview is not None or event.step == event.num_steps:
            return True
        now = self._clock()
        if now - self._told.get(event.image_index, float("-inf")) < self._step_interval_s:
            return False
        self._told[event.image_index] = now
        return True

    def _append(self, *events: Event) -> None:
        self._events.extend(events)
        steps = [waiting for waiting in self._events if isinstance(waiting, StepDone)]
        if len(steps) > MAX_WAITING_STEPS:
            self._events.remove(steps[0])
        self._not_empty.set()
