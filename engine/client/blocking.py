"""A blocking client of the server: what `oneword generate --server` and scripts call."""

import builtins
import os
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from engine.client import calls as calls
from engine.client.admin import AdminClient
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
from engine.client.jobs import JobsClient
from engine.client.link import Link
from engine.client.retries import RetryPolicy
from engine.client.training import TrainingClient
from engine.endpoint import DEFAULT_ADDRESS
from protos.oneword.v1.concepts_pb2 import Concept, ImportConceptResponse
from protos.oneword.v1.generation_pb2 import GenerateRequest, Progress
from protos.oneword.v1.server_info_pb2 import GetServerInfoResponse


class Client:
    """A connection to one server. Every method raises `ServerError`; use it in a `with` block.

    Calls that a broken connection or a busy server has failed are repeated as `RetryPolicy` says,
    never beyond their deadline; each does its work once. Threads may share a client.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float | None = None,
        security: ClientSecurity | None = None,
        retry: RetryPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """`timeout_s` is the deadline of every call with all its attempts; None: no deadline.

        Raises `ConfigError`.
        """
        self._link = Link(
            address,
            timeout_s=timeout_s,
            security=security,
            retry=retry,
            clock=clock,
            sleep=sleep,
            chance=chance,
        )
        self.jobs = JobsClient(self._link)
        self.training = TrainingClient(self._link)
        self.admin = AdminClient(self._link)

    @classmethod
    def from_env(
        cls,
        *,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> "Client":
        """The server and the token that the environment names: ONEWORD_SERVER, _TOKEN, _CA, _TLS.

        Raises `ConfigError`.
        """
        address, security = address_from_env(environ), security_from_env(environ)
        return cls(address, timeout_s=timeout_s, security=security, retry=retry)

    def close(self) -> None:
        self._link.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def generate(
        self,
        request: GenerateRequest | None = None,
        *,
        on_progress: Callable[[Progress], None] = lambda _progress: None,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> GenerationResult:
        """Generate images from a request, or from the fields of one; leaving early cancels it."""
        collected, result = Collected(), None
        with closing(self.stream(request, timeout_s=timeout_s, **fields)) as events:
            for event in events:
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
    ) -> Generator[Event]:
        """Accepted, then Progress and ImageResult as they come, then Summary; each once.

        Closing the generator (`contextlib.closing`) cancels the request.
        """
        stream = GenerateStream(named_request(request, fields))
        return self._link.stream(stream, self._link.within(timeout_s))

    def generate_many(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_result: OnResult = lambda _index, _outcome: None,
        timeout_s: float | None = None,
    ) -> builtins.list[Outcome]:
        """The result of each request, or the `ServerError` that it has failed with.

        `on_result` is told each of them with the index of its request, as soon as it is there.
        """
        batch = BatchStream([named_request(request, {}) for request in requests])
        with closing(self._outcomes(batch, self._link.within(timeout_s))) as outcomes:
            for index, outcome in outcomes:
                on_result(index, outcome)
        return [batch.outcomes[index] for index in range(len(requests))]

    def _outcomes(
        self, batch: BatchStream, timeout_s: float | None
    ) -> Generator[tuple[int, Outcome]]:
        try:
            yield from self._link.stream(batch, timeout_s)
        except ServerError as error:
            yield from batch.give_up(error)

    def import_concept(
        self,
        content: bytes,
        *,
        placeholder_token: str = "",
        overwrite: bool = False,
        etag: str = "",
    ) -> ImportConceptResponse:
        """Store the bytes of a concept file.

        With an `etag`, a name that is to be changed must still have it, here and below: else the
        code is ABORTED, the reason `STALE_ETAG`, and nothing is done.
        """
        return self._link.call(calls.import_concept(content, placeholder_token, overwrite, etag))

    def get(self, placeholder_token: str) -> Concept:
        """Describe a stored concept, with its metadata."""
        return self._link.call(calls.get_concept(placeholder_token))

    def list(self) -> Iterator[Concept]:
        """All stored concepts in the order of their names, fetched page by page."""
        return self._link.pages(calls.list_concepts)

    def delete(self, placeholder_token: str, *, etag: str = "") -> None:
        """Remove a stored concept."""
        self._link.call(calls.delete_concept(placeholder_token, etag))

    def undelete(self, placeholder_token: str) -> Concept:
        """Bring a deleted concept back, with its versions and aliases; gives the latest."""
        return self._link.call(calls.undelete_concept(placeholder_token))

    def versions(self, placeholder_token: str) -> Iterator[Concept]:
        """The versions of a stored concept, the newest first, fetched page by page."""
        return self._link.pages(partial(calls.list_concept_versions, placeholder_token))

    def set_alias(
        self, placeholder_token: str, alias: str, *, version: int | None = None, etag: str = ""
    ) -> Concept:
        """Let `name@alias` stand for a version (None: the latest); gives that version."""
        return self._link.call(calls.set_concept_alias(placeholder_token, alias, version, etag))

    def delete_alias(self, placeholder_token: str, alias: str, *, etag: str = "") -> None:
        """Take an alias from a stored concept."""
        self._link.call(calls.delete_concept_alias(placeholder_token, alias, etag))

    def export(self, placeholder_token: str, file_format: ConceptFileFormat = "oneword") -> bytes:
        """The bytes of a stored concept as a file."""
        return self._link.call(calls.export_concept(placeholder_token, file_format))

    def server_info(self) -> GetServerInfoResponse:
        """The model, the limits and the load of the server."""
        return self._link.call(calls.server_info())
