"""Requests being carried out: each once, however many callers wait for it.

A caller that names its request (`request_id`) may ask again after a lost answer, also while the
first call still runs: both then read from one execution. What is done is remembered for a while.
Everything here belongs to the event loop; only `EventStream.put` is called by the batcher's thread.
"""

import asyncio
import hashlib
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field

from engine.batching.batcher import Failed, Finished, ImageDone, StepDone
from engine.errors import InvalidRequest, QueueFull, quoted
from engine.requests import check_request_id
from engine.serving.streams import EventStream
from protos.oneword.v1.generation_pb2 import GenerateRequest, GenerateResponse

MAX_WAITING_PROGRESS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A request that the batcher has taken: how it is steered, and how its events are told."""

    cancel: Callable[[], None]
    set_deadline: Callable[[float | None], None]
    accepted: GenerateResponse
    reply: Callable[[StepDone | ImageDone | Finished], Awaitable[GenerateResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """How long what is done is remembered."""

    seconds: float = 600.0
    max_bytes: int = 64 << 20  # of answers
    max_requests: int = 10_000


@dataclass(frozen=True, slots=True)
class Key:
    """Whose request it is, and what its caller calls it."""

    tenant: str
    request_id: str


class Reader:
    """What one caller has yet to be told: images and the end, and the newest progress."""

    def __init__(
        self, execution: "Execution", *, repeated: bool, follows_steps: bool = True
    ) -> None:
        self.repeated = repeated  # whether an earlier call has begun it
        self.follows_steps = follows_steps
        self._execution = execution
        self._waiting: deque[GenerateResponse] = deque(execution.told)
        self._num_progress = 0
        self._changed = asyncio.Event()

    def put(self, response: GenerateResponse) -> None:
        is_progress = response.HasField("progress")
        if is_progress and not self.follows_steps:
            return
        self._waiting.append(response)
        if is_progress:
            self._num_progress += 1
            if self._num_progress > MAX_WAITING_PROGRESS:
                self._drop_oldest_progress()
        self._changed.set()

    def wake(self) -> None:
        self._changed.set()

    def _drop_oldest_progress(self) -> None:
        for index, response in enumerate(self._waiting):
            if response.HasField("progress"):
                del self._waiting[index]
                self._num_progress -= 1
                return

    async def __aiter__(self) -> AsyncIterator[GenerateResponse]:
        """All that there is to tell, until the end; raises what the request failed with."""
        while True:
            while self._waiting:
                response = self._waiting.popleft()
                self._num_progress -= response.HasField("progress")
                yield self._as_told(response)
            if self._execution.error is not None:
                raise self._execution.error
            if self._execution.ended:
                return
            self._changed.clear()
            await self._changed.wait()

    def _as_told(self, response: GenerateResponse) -> GenerateResponse:
        if not (self.repeated and response.HasField("accepted")):
            return response
        again = GenerateResponse()
        again.CopyFrom(response)
        again.accepted.repeated = True
        return again


@dataclass(slots=True, eq=False)
class Execution:
    """One request on its way, and what was said of it so far."""

    key: Key
    name: str  # by which its caller, the log and the errors call it
    body: bytes  # digest of the request
    named: bool  # by its caller, who can ask for it again
    of_job: bool  # was checked when it was submitted
    told: list[GenerateResponse] = field(default_factory=list[GenerateResponse])  # no progress
    readers: set[Reader] = field(default_factory=set[Reader])
    deadline: float | None = 0.0  # the latest of its callers'; None: one has none
    started: Started | None = None  # once it is submitted
    error: Exception | None = None
    ended: bool = False
    task: "asyncio.Task[None] | None" = None
    num_bytes: int = 0  # of what was told

    def tell(self, response: GenerateResponse) -> None:
        if not response.HasField("progress"):
            self.told.append(response)
            self.num_bytes += response.ByteSize()
        for reader in self.readers:
            reader.put(response)

    @property
    def follows_steps(self) -> bool:
        """Whether anybody does; asked by the batcher's thread too."""
        return any(reader.follows_steps for reader in tuple(self.readers))

    def end(self, error: Exception | None = None) -> None:
        """Nothing follows; only what was told is kept, and not the plan that it came from."""
        self.error, self.ended = error, True
        self.started = self.task = None
        for reader in self.readers:
            reader.wake()

    def extend(self, deadline: float | None) -> None:
        """Another caller waits, perhaps for longer."""
        if self.deadline is None or deadline is None:
            self.deadline = None
        else:
            self.deadline = max(self.deadline, deadline)
        if self.started is not None:
            self.started.set_deadline(self.deadline)


class Executions:
    """The requests under way, and for a while those that are done, by what callers call them."""

    def __init__(
        self,
        start: Callable[
            [Execution, GenerateRequest, EventStream], AbstractAsyncContextManager[Started]
        ],
        *,
        memory: Memory | None = None,
        step_interval_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`start` submits a request to the batcher, whose events go into the stream, and is left
        when the request has ended. Steps of an image are told so far apart (`EventStream`)."""
        self.memory = memory or Memory()
        self._step_interval_s = step_interval_s
        self._start = start
        self._clock = clock
        self._by_key: dict[Key, Execution] = {}
        self._done: deque[tuple[float, Execution]] = deque()  # remembered, the oldest first
        self._num_bytes = 0

    @asynccontextmanager
    async def reading(
        self,
        request: GenerateRequest,
        *,
        tenant: str,
        server_id: str,
        deadline: float | None,
        of_job: bool = False,
        follows_steps: bool = True,
    ) -> AsyncGenerator[Reader]:
        """Follow a request, begun now or by an earlier call with its id.

        The work ends when the last reader has left. `server_id` names a request that its caller
        does not name; who does not follow its steps is not told of them. Raises `InvalidRequest`
        for an id that is none or names another request.
        """
        execution, repeated = self._enter(request, tenant, server_id, of_job)
        reader = Reader(execution, repeated=repeated, follows_steps=follows_steps)
        execution.readers.add(reader)
        execution.extend(deadline)
        try:
            yield reader
        finally:
            execution.readers.discard(reader)
            if not execution.readers and not execution.ended:
                self._abandon(execution)

    def _enter(
        self, request: GenerateRequest, tenant: str, server_id: str, of_job: bool
    ) -> tuple[Execution, bool]:
        check_request_id(request.request_id)
        self._forget_old()
        # One without a name is like no other, whatever the server calls it.
        key = Key(tenant, request.request_id or f"\0{uuid.uuid4().hex}")
        body = digest_of(request)
        if known := self._by_key.get(key):
            if known.body != body:
                raise InvalidRequest(
                    f"request_id {quoted(request.request_id)} was used for another request; choose "
                    "a new one for each request, and repeat a request as it was",
                    field="request_id",
                )
            return known, True
        execution = Execution(
            key=key,
            name=request.request_id or server_id,
            body=body,
            named=bool(request.request_id),
            of_job=of_job,
        )
        self._by_key[key] = execution
        execution.task = asyncio.create_task(self._carry_out(execution, request))
        return execution, False

    async def _carry_out(self, execution: Execution, request: GenerateRequest) -> None:
        events = EventStream(
            asyncio.get_running_loop(),
            follows_steps=lambda: execution.follows_steps,
            step_interval_s=self._step_interval_s,
        )
        try:
            async with self._start(execution, request, events) as started:
                execution.started = started
                execution.extend(execution.deadline)  # who came while it was planned
                execution.tell(started.accepted)
                try:
                    await _forward(execution, events, started)
                finally:
                    started.cancel()
        except Exception as error:
            self._forget(execution)  # the next call with this id tries again
            execution.end(error)
        else:
            execution.end()
            self._remember(execution)

    def _abandon(self, execution: Execution) -> None:
        self._forget(execution)
        if execution.task is not None:
            execution.task.cancel()

    def _remember(self, execution: Execution) -> None:
        if not execution.named:
            self._forget(execution)
            return
        self._done.append((self._clock() + self.memory.seconds, execution))
        self._num_bytes += execution.num_bytes
        self._forget_old()

    def _forget_old(self) -> None:
        while self._done and (
            self._done[0][0] <= self._clock()
            or self._num_bytes > self.memory.max_bytes
            or len(self._done) > self.memory.max_requests
        ):
            _, oldest = self._done.popleft()
            self._num_bytes -= oldest.num_bytes
            self._forget(oldest)

    def _forget(self, execution: Execution) -> None:
        if self._by_key.get(execution.key) is execution:
            del self._by_key[execution.key]


async def _forward(execution: Execution, events: EventStream, started: Started) -> None:
    while True:
        event = await events.get()
        if isinstance(event, Failed):
            raise event.error
        execution.tell(await started.reply(event))
        if isinstance(event, Finished):
            return


async def patiently(
    begin: Callable[[], AsyncGenerator[GenerateResponse]], *, max_wait_s: float
) -> AsyncGenerator[GenerateResponse]:
    """What `begin` tells, begun again for as long as the queue has no room for it.

    It waits as long as the queue says, at most `max_wait_s` at a time.
    """
    while True:
        try:
            async with aclosing(begin()) as responses:
                async for response in responses:
                    yield response
            return
        except QueueFull as full:  # of which nothing was told yet
            await asyncio.sleep(min(full.retry_after_s, max_wait_s))


def digest_of(request: GenerateRequest) -> bytes:
    """What tells one request from another, but for its name."""
    body = GenerateRequest()
    body.CopyFrom(request)
    body.ClearField("request_id")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()


def seed_of(tenant: str, request_id: str) -> int:
    """The seed of a named request that has none: 32 bits that follow from its name.

    So an answer that was forgotten, or given by another server, is given again as it was.
    """
    digest = hashlib.sha256(f"{tenant}\0{request_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
