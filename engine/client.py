"""A blocking client of the server: what `oneword generate --server` and scripts call."""

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_status import rpc_status

from engine.client_channel import ClientSecurity, open_channel
from engine.concepts import FileFormat
from engine.endpoint import DEFAULT_ADDRESS
from engine.errors import OneWordError
from engine.training_client import TrainingClient
from protos.oneword.v1 import (
    concepts_pb2,
    concepts_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_info_pb2,
    server_info_pb2_grpc,
    training_pb2_grpc,
)

_PAGE_SIZE = 500
# What gRPC says where nobody listens, as against a bad address or a connection that broke.
_CONNECT_FAILED = re.compile("failed to connect", re.IGNORECASE)


class ServerError(OneWordError):
    """A call that failed; `code` says how, the message what to do."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """The images of one request, in the order of their seeds, and what the server says of them."""

    request_id: str
    images: list[bytes]  # files in the format asked for
    summary: generation_pb2.Summary


class Client:
    """A connection to one server. Every method raises `ServerError`; use it in a `with` block."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float | None = None,
        security: ClientSecurity | None = None,
    ) -> None:
        """`timeout_s` is the deadline of every call; None: no deadline. Raises `ConfigError`."""
        self._address = address
        self._timeout_s = timeout_s
        self._channel = open_channel(address, security or ClientSecurity())
        self._generation = generation_pb2_grpc.ImageGenerationServiceStub(self._channel)
        self._concepts = concepts_pb2_grpc.ConceptServiceStub(self._channel)
        self._server_info = server_info_pb2_grpc.ServerInfoServiceStub(self._channel)
        self.training = TrainingClient(
            training_pb2_grpc.TrainingServiceStub(self._channel), timeout_s, self._errors
        )

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def generate(
        self,
        request: generation_pb2.GenerateRequest | None = None,
        *,
        on_progress: Callable[[generation_pb2.Progress], None] = lambda _progress: None,
        **fields: Any,
    ) -> GenerationResult:
        """Generate images from a request, or from the fields of one; leaving early cancels it."""
        request = request or generation_pb2.GenerateRequest(**fields)
        with self._errors():
            call = self._generation.Generate(request, timeout=self._timeout_s)
            try:
                return _collect(call, on_progress)
            finally:
                call.cancel()  # no effect on a call that has ended

    def import_concept(
        self, content: bytes, *, placeholder_token: str = "", overwrite: bool = False
    ) -> concepts_pb2.ImportConceptResponse:
        """Store the bytes of a concept file."""
        request = concepts_pb2.ImportConceptRequest(
            content=content, placeholder_token=placeholder_token, overwrite=overwrite
        )
        with self._errors():
            return self._concepts.ImportConcept(request, timeout=self._timeout_s)

    def get(self, placeholder_token: str) -> concepts_pb2.Concept:
        """Describe a stored concept, with its metadata."""
        request = concepts_pb2.GetConceptRequest(placeholder_token=placeholder_token)
        with self._errors():
            return self._concepts.GetConcept(request, timeout=self._timeout_s).concept

    def list(self) -> Iterator[concepts_pb2.Concept]:
        """All stored concepts in the order of their names, fetched page by page."""
        request = concepts_pb2.ListConceptsRequest(page_size=_PAGE_SIZE)
        while True:
            with self._errors():
                page = self._concepts.ListConcepts(request, timeout=self._timeout_s)
            yield from page.concepts
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def delete(self, placeholder_token: str) -> None:
        """Remove a stored concept."""
        request = concepts_pb2.DeleteConceptRequest(placeholder_token=placeholder_token)
        with self._errors():
            self._concepts.DeleteConcept(request, timeout=self._timeout_s)

    def export(self, placeholder_token: str, file_format: FileFormat = "oneword") -> bytes:
        """The bytes of a stored concept as a file."""
        request = concepts_pb2.ExportConceptRequest(
            placeholder_token=placeholder_token,
            format=concepts_pb2.CONCEPT_FORMAT_DIFFUSERS
            if file_format == "diffusers"
            else concepts_pb2.CONCEPT_FORMAT_ONEWORD,
        )
        with self._errors():
            return self._concepts.ExportConcept(request, timeout=self._timeout_s).content

    def server_info(self) -> server_info_pb2.GetServerInfoResponse:
        """The model, the limits and the load of the server."""
        with self._errors():
            return self._server_info.GetServerInfo(
                server_info_pb2.GetServerInfoRequest(), timeout=self._timeout_s
            )

    @contextmanager
    def _errors(self) -> Generator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise self._translated(error) from error

    def _translated(self, error: grpc.RpcError) -> ServerError:
        # Every error of a call is also its grpc.Call; the type stubs do not say so.
        assert isinstance(error, grpc.Call)
        answered = rpc_status.from_call(error) is not None  # by the server, not by the transport
        code, details = error.code(), error.details() or ""
        return ServerError(code, self._explain(code, details, answered))

    def _explain(self, code: grpc.StatusCode, details: str, answered: bool) -> str:
        match code:
            case grpc.StatusCode.UNAVAILABLE if not answered and _CONNECT_FAILED.search(details):
                return f"no server at {self._address}; start one with `oneword serve`"
            case grpc.StatusCode.UNAVAILABLE if not answered:
                return f"no connection to {self._address}, or it broke; try again ({details})"
            case grpc.StatusCode.UNIMPLEMENTED:
                return f"the server at {self._address} is not a OneWord server of this version"
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return f"no answer within {self._timeout_s} s; allow more time, or ask for less"
            case _:
                return details or code.name


def _collect(
    responses: Iterator[generation_pb2.GenerateResponse],
    on_progress: Callable[[generation_pb2.Progress], None],
) -> GenerationResult:
    request_id = ""
    images: dict[int, bytes] = {}
    for response in responses:
        match response.WhichOneof("event"):
            case "accepted":
                request_id = response.accepted.request_id
            case "progress":
                on_progress(response.progress)
            case "image":
                images[response.image.image_index] = response.image.image
            case "summary":
                return GenerationResult(
                    request_id=request_id,
                    images=[images[index] for index in sorted(images)],
                    summary=response.summary,
                )
            case None:  # an event that a later version has added
                pass
    raise ServerError(grpc.StatusCode.INTERNAL, "the server ended the stream without a summary")
