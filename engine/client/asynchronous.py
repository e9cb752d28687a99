"""The client for asyncio: `engine.client.Client`, awaited. Nothing in it blocks the event loop."""

import asyncio
import builtins
import os
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from engine.client import calls as calls
from engine.client.admin import AsyncAdminClient
from engine.client.calls import ConceptFileFormat, named_request
from engine.client.channel import ClientSecurity, address_from_env, security_from_env
from engine.client.errors import ServerError
from engine.client.generation import (
    BatchStream,
    Collected,
    Event,
    GenerateStream,
    GenerationResult,
    OnResult,
    Outcome,
)
from engine.client.jobs import AsyncJobsClient
from engine.client.link import AsyncLink
from engine.client.retries import RetryPolicy
from engine.client.training import AsyncTrainingClient
from engine.endpoint import DEFAULT_ADDRESS
from protos.oneword.v1.concepts_pb2 import Concept, ImportConceptResponse
from protos.oneword.v1.generation_pb2 import GenerateRequest, Progress
from protos.oneword.v1.server_info_pb2 import GetServerInfoResponse


class AsyncClient:
    """A connection to one server; make it where the event loop runs, in an `async with` block.

    Every method is that of `Client`, and raises `ServerError`. Cancelling a task cancels its call.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float | None = None,
        security: ClientSecurity | None = None,
        retry: RetryPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._link = AsyncLink(
            address,
            timeout_s=timeout_s,
            security=security,
            retry=retry,
            clock=clock,
            sleep=sleep,
            chance=chance,
        )
        self.jobs = AsyncJobsClient(self._link)
        self.training = AsyncTrainingClient(self._link)
        self.admin = AsyncAdminClient(self._link)

    @classmethod
    def from_env(
        cls,
        *,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> "AsyncClient":
        address, security = address_from_env(environ), security_from_env(environ)
        return cls(address, timeout_s=timeout_s, security=security, retry=retry)

    async def close(self) -> None:
        await self._link.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def generate(
        self,
        request: GenerateRequest | None = None,
        *,
        on_progress: Callable[[Progress], None] = lambda _progress: None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> GenerationResult:
        collected, result = Collected(), None
        async with aclosing(self.stream(request, timeout_s=timeout_s, **fields)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    on_progress(event)
                result = collected.add(event) or result
        assert result is not None  # a stream ends with its summary, or raises
        return result

    def stream(
        self,
        request: GenerateRequest | None = None,
        *,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> AsyncGenerator[Event]:
        """As `Client.stream`; close it (`contextlib.aclosing`) where it is left early."""
        stream = GenerateStream(named_request(request, fields))
        return self._link.stream(stream, self._link.within(timeout_s))

    async def generate_many(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_result: OnResult = lambda _index, _outcome: None,
        timeout_s: float | None = None,
    ) -> builtins.list[Outcome]:
        batch = BatchStream([named_request(request, {}) for request in requests])
        async with aclosing(self._outcomes(batch, self._link.within(timeout_s))) as outcomes:
            async for index, outcome in outcomes:
                on_result(index, outcome)
        return [batch.outcomes[index] for index in range(len(requests))]

    async def _outcomes(
        self, batch: BatchStream, timeout_s: float | None
    ) -> AsyncGenerator[tuple[int, Outcome]]:
        try:
            async with aclosing(self._link.stream(batch, timeout_s)) as outcomes:
                async for outcome in outcomes:
                    yield outcome
        except ServerError as error:
            for outcome in batch.give_up(error):
                yield outcome

    async def import_concept(
        self,
        content: bytes,
        *,
        placeholder_token: str = "",
        overwrite: bool = False,
        etag: str = "",
    ) -> ImportConceptResponse:
        return await self._link.call(
            calls.import_concept(content, placeholder_token, overwrite, etag)
        )

    async def get(self, placeholder_token: str) -> Concept:
        return await self._link.call(calls.get_concept(placeholder_token))

    def list(self) -> AsyncIterator[Concept]:
        return self._link.pages(calls.list_concepts)

    async def delete(self, placeholder_token: str, *, etag: str = "") -> None:
        await self._link.call(calls.delete_concept(placeholder_token, etag))

    async def undelete(self, placeholder_token: str) -> Concept:
        return await self._link.call(calls.undelete_concept(placeholder_token))

    def versions(self, placeholder_token: str) -> AsyncIterator[Concept]:
        return self._link.pages(partial(calls.list_concept_versions, placeholder_token))

    async def set_alias(
        self, placeholder_token: str, alias: str, *, version: int | None = None, etag: str = ""
    ) -> Concept:
        return await self._link.call(
            calls.set_concept_alias(placeholder_token, alias, version, etag)
        )

    async def delete_alias(self, placeholder_token: str, alias: str, *, etag: str = "") -> None:
        await self._link.call(calls.delete_concept_alias(placeholder_token, alias, etag))

    async def export(
        self, placeholder_token: str, file_format: ConceptFileFormat = "oneword"
    ) -> bytes:
        return await self._link.call(calls.export_concept(placeholder_token, file_format))

    async def server_info(self) -> GetServerInfoResponse:
        return await self._link.call(calls.server_info())
