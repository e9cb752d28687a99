"""The calls with one answer: what is sent, and what its caller gets. Of both kinds of client."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from engine.errors import InvalidRequest
from protos.oneword.v1 import (
    admin_pb2_grpc,
    concepts_pb2,
    concepts_pb2_grpc,
    generation_pb2_grpc,
    server_info_pb2,
    server_info_pb2_grpc,
    training_pb2_grpc,
)
from protos.oneword.v1.generation_pb2 import GenerateRequest

PAGE_SIZE = 500
ConceptFileFormat = Literal["oneword", "diffusers"]
T = TypeVar("T")


class Stubs:
    """The services of a server, on a channel of either kind."""

    def __init__(self, channel: Any) -> None:
        self.generation = generation_pb2_grpc.ImageGenerationServiceStub(channel)
        self.jobs = generation_pb2_grpc.ImageJobServiceStub(channel)
        self.concepts = concepts_pb2_grpc.ConceptServiceStub(channel)
        self.server_info = server_info_pb2_grpc.ServerInfoServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)
        self.training = training_pb2_grpc.TrainingServiceStub(channel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """A call that can be made again without harm, and gives the same."""

    method: Callable[[Stubs], Any]
    request: Callable[[], Any]  # anew for each attempt: an upload is used up by one
    read: Callable[[Any], T]
    removes: bool = False  # so that after a lost answer NOT_FOUND is a success


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some of a list, and where it goes on."""

    items: Sequence[T]
    next_page_token: str


def new_request_id() -> str:
    return uuid.uuid4().hex


def named_request(request: GenerateRequest | None, fields: Mapping[str, Any]) -> GenerateRequest:
    """A copy of the request, or one of these fields, with an id by which it can be repeated."""
    if request is not None and fields:
        raise InvalidRequest(
            f"there is a request, and its {', '.join(fields)} besides; give one of the two"
        )
    named = GenerateRequest(**fields)
    if request is not None:
        named.CopyFrom(request)
    named.request_id = named.request_id or new_request_id()
    return named


def server_info() -> Call[server_info_pb2.GetServerInfoResponse]:
    return Call(
        method=lambda stubs: stubs.server_info.GetServerInfo,
        request=server_info_pb2.GetServerInfoRequest,
        read=lambda reply: reply,
    )


def import_concept(
    content: bytes, placeholder_token: str, overwrite: bool, etag: str
) -> Call[concepts_pb2.ImportConceptResponse]:
    request = concepts_pb2.ImportConceptRequest(
        content=content, placeholder_token=placeholder_token, overwrite=overwrite, etag=etag
    )
    return Call(
        method=lambda stubs: stubs.concepts.ImportConcept,
        request=lambda: request,
        read=lambda reply: reply,
    )


def get_concept(placeholder_token: str) -> Call[concepts_pb2.Concept]:
    request = concepts_pb2.GetConceptRequest(placeholder_token=placeholder_token)
    return Call(
        method=lambda stubs: stubs.concepts.GetConcept,
        request=lambda: request,
        read=lambda reply: reply.concept,
    )


def list_concepts(page_token: str) -> Call[Page[concepts_pb2.Concept]]:
    request = concepts_pb2.ListConceptsRequest(page_size=PAGE_SIZE, page_token=page_token)
    return Call(
        method=lambda stubs: stubs.concepts.ListConcepts,
        request=lambda: request,
        read=lambda reply: Page(reply.concepts, reply.next_page_token),
    )


def delete_concept(placeholder_token: str, etag: str) -> Call[None]:
    request = concepts_pb2.DeleteConceptRequest(placeholder_token=placeholder_token, etag=etag)
    return Call(
        method=lambda stubs: stubs.concepts.DeleteConcept,
        request=lambda: request,
        read=lambda _reply: None,
        removes=True,
    )


def undelete_concept(placeholder_token: str) -> Call[concepts_pb2.Concept]:
    request = concepts_pb2.UndeleteConceptRequest(placeholder_token=placeholder_token)
    return Call(
        method=lambda stubs: stubs.concepts.UndeleteConcept,
        request=lambda: request,
        read=lambda reply: reply.concept,
    )


def list_concept_versions(
    placeholder_token: str, page_token: str
) -> Call[Page[concepts_pb2.Concept]]:
    request = concepts_pb2.ListConceptVersionsRequest(
        placeholder_token=placeholder_token, page_size=PAGE_SIZE, page_token=page_token
    )
    return Call(
        method=lambda stubs: stubs.concepts.ListConceptVersions,
        request=lambda: request,
        read=lambda reply: Page(reply.versions, reply.next_page_token),
    )


def set_concept_alias(
    placeholder_token: str, alias: str, version: int | None, etag: str
) -> Call[concepts_pb2.Concept]:
    if version is not None and not 0 < version < 1 << 63:
        raise InvalidRequest(
            f"version must be at least 1, and is the number of one, got {version}", field="version"
        )
    request = concepts_pb2.SetConceptAliasRequest(
        placeholder_token=placeholder_token, alias=alias, version=version, etag=etag
    )
    return Call(
        method=lambda stubs: stubs.concepts.SetConceptAlias,
        request=lambda: request,
        read=lambda reply: reply.concept,
    )


def delete_concept_alias(placeholder_token: str, alias: str, etag: str) -> Call[None]:
    request = concepts_pb2.DeleteConceptAliasRequest(
        placeholder_token=placeholder_token, alias=alias, etag=etag
    )
    return Call(
        method=lambda stubs: stubs.concepts.DeleteConceptAlias,
        request=lambda: request,
        read=lambda _reply: None,
        removes=True,
    )


def export_concept(placeholder_token: str, file_format: ConceptFileFormat) -> Call[bytes]:
    request = concepts_pb2.ExportConceptRequest(
        placeholder_token=placeholder_token,
        format=concepts_pb2.CONCEPT_FORMAT_DIFFUSERS
        if file_format == "diffusers"
        else concepts_pb2.CONCEPT_FORMAT_ONEWORD,
    )
    return Call(
        method=lambda stubs: stubs.concepts.ExportConcept,
        request=lambda: request,
        read=lambda reply: reply.content,
    )
