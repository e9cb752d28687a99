"""Makes calls on a connection, and again where that helps: blocking, and under asyncio.

The two drivers differ in nothing but how they wait. What to send, what to tell and when to try
again is decided in `client_calls`, `client_generation`, `client_jobs` and `client_retries`.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable
from typing import Any, Protocol, TypeVar, runtime_checkable

import grpc
from grpc import StatusCode

from engine.client.calls import Call, Page, Stubs
from engine.client.channel import ClientSecurity, open_async_channel, open_channel
from engine.client.errors import ServerError, error_of_call
from engine.client.retries import Attempts, RetryPolicy, ServerRecord

T = TypeVar("T")
E_co = TypeVar("E_co", covariant=True)


@runtime_checkable
class Stream(Protocol[E_co]):
    """A call with many answers, which is taken up again where it broke."""

    @property
    def patient(self) -> bool: ...  # outlasts a server's absence
    @property
    def ended(self) -> bool: ...  # all is told
    @property
    def gains(self) -> int: ...  # grows with what a repeated call need not send
    def method(self, stubs: Stubs) -> Any: ...
    def request(self) -> Any:
        """For the attempt that begins now."""
        ...

    def read(self, response: Any) -> Iterable[E_co]:
        """What the caller is told of it."""
        ...

    def cut_short(self) -> ServerError | None:
        """Why the server has ended the stream before all was told; None: another call goes on."""
        ...


class _Line:
    """What both drivers know of their server."""

    def __init__(
        self,
        address: str,
        channel: Any,
        security: ClientSecurity,
        retry: RetryPolicy,
        timeout_s: float | None,
        clock: Callable[[], float],
        chance: Callable[[], float],
    ) -> None:
        self.channel = channel
        self.stubs = Stubs(channel)
        self.metadata = security.metadata
        self.timeout_s = timeout_s
        self._address = address
        self._record = ServerRecord(retry)
        self._clock, self._chance = clock, chance

    def attempts(self, timeout_s: float | None, *, patient: bool = False) -> Attempts:
        return Attempts(
            self._record,
            timeout_s=timeout_s,
            patient=patient,
            clock=self._clock,
            random=self._chance,
        )

    def error(self, error: grpc.RpcError, attempts: Attempts) -> ServerError:
        return error_of_call(error, address=self._address, timeout_s=attempts.timeout_s)


def _is_gone(call: Call[Any], attempts: Attempts, error: ServerError) -> bool:
    """Whether an earlier attempt, whose answer was lost, has removed what was to be removed."""
    return call.removes and attempts.answer_lost and error.code is StatusCode.NOT_FOUND


class Link:
    """A connection for blocking calls. Threads may share it."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float | None,
        security: ClientSecurity | None,
        retry: RetryPolicy | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        security = security or ClientSecurity()
        channel = open_channel(address, security)
        retry = retry or RetryPolicy()
        self._line = _Line(address, channel, security, retry, timeout_s, clock, chance)
        self._sleep = sleep

    def close(self) -> None:
        self._line.channel.close()

    def call(self, call: Call[T], timeout_s: float | None = None) -> T:
        """Within `timeout_s`, or else the time of every call."""
        line, attempts = self._line, self._line.attempts(self.within(timeout_s))
        while True:
            left = attempts.begin()
            try:
                send = call.method(line.stubs)
                reply = send(call.request(), timeout=left, metadata=line.metadata)
            except grpc.RpcError as error:
                failure = line.error(error, attempts)
                if _is_gone(call, attempts, failure):
                    return call.read(None)
                delay = attempts.failed(failure)
            else:
                attempts.succeeded()
                return call.read(reply)
            self._sleep(delay)

    def pages(self, page_of: Callable[[str], Call[Page[T]]]) -> Generator[T]:
        """The items of a list, fetched page by page."""
        page = self.call(page_of(""))
        yield from page.items
        while page.next_page_token:
            page = self.call(page_of(page.next_page_token))
            yield from page.items

    def stream(self, stream: Stream[T], timeout_s: float | None) -> Generator[T]:
        """What the stream tells, to its end; closing the generator cancels the call."""
        line, attempts = self._line, self._line.attempts(timeout_s, patient=stream.patient)
        while not stream.ended:
            left, failure = attempts.begin(), None
            send = stream.method(line.stubs)
            responses = send(stream.request(), timeout=left, metadata=line.metadata)
            try:
                for response in responses:
                    events = stream.read(response)
                    attempts.answered(stream.gains)
                    yield from events
                failure = stream.cut_short()
            except grpc.RpcError as error:
                failure = line.error(error, attempts)
            finally:
                responses.cancel()  # no effect on a call that has ended
            if failure is not None and not stream.ended:
                self._sleep(attempts.failed(failure))
        attempts.succeeded()

    def within(self, timeout_s: float | None) -> float | None:
        """The time that a call has, where its caller may say so."""
        return self._line.timeout_s if timeout_s is None else timeout_s


class AsyncLink:
    """A connection for calls under asyncio, made where the event loop runs."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float | None,
        security: ClientSecurity | None,
        retry: RetryPolicy | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        security = security or ClientSecurity()
        channel = open_async_channel(address, security)
        retry = retry or RetryPolicy()
        self._line = _Line(address, channel, security, retry, timeout_s, clock, chance)
        self._sleep = sleep

    async def close(self) -> None:
        await self._line.channel.close()

    async def call(self, call: Call[T], timeout_s: float | None = None) -> T:
        line, attempts = self._line, self._line.attempts(self.within(timeout_s))
        while True:
            left = attempts.begin()
            try:
                send = call.method(line.stubs)
                reply = await send(call.request(), timeout=left, metadata=line.metadata)
            except grpc.RpcError as error:
                failure = line.error(error, attempts)
                if _is_gone(call, attempts, failure):
                    return call.read(None)
                delay = attempts.failed(failure)
            else:
                attempts.succeeded()
                return call.read(reply)
            await self._sleep(delay)

    async def pages(self, page_of: Callable[[str], Call[Page[T]]]) -> AsyncGenerator[T]:
        page = await self.call(page_of(""))
        for item in page.items:
            yield item
        while page.next_page_token:
            page = await self.call(page_of(page.next_page_token))
            for item in page.items:
                yield item

    async def stream(self, stream: Stream[T], timeout_s: float | None) -> AsyncGenerator[T]:
        line, attempts = self._line, self._line.attempts(timeout_s, patient=stream.patient)
        while not stream.ended:
            left, failure = attempts.begin(), None
            send = stream.method(line.stubs)
            responses = send(stream.request(), timeout=left, metadata=line.metadata)
            try:
                async for response in responses:
                    events = stream.read(response)
                    attempts.answered(stream.gains)
                    for event in events:
                        yield event
                failure = stream.cut_short()
            except grpc.RpcError as error:
                failure = line.error(error, attempts)
            finally:
                responses.cancel()
            if failure is not None and not stream.ended:
                await self._sleep(attempts.failed(failure))
        attempts.succeeded()

    def within(self, timeout_s: float | None) -> float | None:
        return self._line.timeout_s if timeout_s is None else timeout_s
