"""Stored concepts over a real gRPC server: imported, listed, exported, replaced and deleted."""

import grpc
import grpc.aio
import pytest
from grpc import StatusCode

from engine.concepts import Concept, concept_from_bytes, concept_to_bytes
from engine.store.concept_store import ConceptStore, StoredConcept
from protos.oneword.v1 import concepts_pb2, generation_pb2
from tests import service_harness
from tests.fakes import DIM
from tests.service_harness import SOUND, Harness, code_of, fingerprint_of, import_file, make_concept

# Fixtures.
start_server, served = service_harness.start_server, service_harness.served


async def test_import_describe_and_export(served: Harness) -> None:
    concept = make_concept(embedding_fingerprint=fingerprint_of(served), metadata={"steps": "500"})
    imported = await import_file(served, concept_to_bytes(concept))
    by_id = concepts_pb2.GetConceptRequest(concept_id=concept.concept_id)
    described = (await served.concepts.GetConcept(by_id)).concept
    assert imported.changed
    assert (described.placeholder_token, described.num_vectors, described.dim) == (
        "<cat-toy>",
        2,
        DIM,
    )
    assert dict(described.metadata) == {"steps": "500"}
    assert described.import_time == imported.concept.import_time
    for file_format in (
        concepts_pb2.CONCEPT_FORMAT_UNSPECIFIED,
        concepts_pb2.CONCEPT_FORMAT_ONEWORD,
        concepts_pb2.CONCEPT_FORMAT_DIFFUSERS,
    ):
        request = concepts_pb2.ExportConceptRequest(
            placeholder_token="<cat-toy>", format=file_format
        )
        exported = await served.concepts.ExportConcept(request)
        back = concept_from_bytes(exported.content, source="export")
        assert (back.placeholder_token, back.concept_id) == ("<cat-toy>", concept.concept_id)
        again = await import_file(served, exported.content)
        assert not again.changed


async def test_an_imported_concept_can_be_used_at_once_and_a_deleted_one_cannot(
    served: Harness,
) -> None:
    await import_file(served, SOUND, placeholder_token="<mine>")
    assert await served.generate(prompt="a <mine>")
    await served.concepts.DeleteConcept(
        concepts_pb2.DeleteConceptRequest(placeholder_token="<mine>")
    )
    assert (await served.refusal(prompt="a <mine>")).code() == StatusCode.NOT_FOUND
    for call in (
        served.concepts.GetConcept(concepts_pb2.GetConceptRequest(placeholder_token="<mine>")),
        served.concepts.ExportConcept(concepts_pb2.ExportConceptRequest(concept_id="0" * 64)),
        served.concepts.DeleteConcept(concepts_pb2.DeleteConceptRequest(placeholder_token="<m>")),
    ):
        assert await code_of(call) == StatusCode.NOT_FOUND


async def test_a_taken_name_needs_overwrite(served: Harness) -> None:
    await import_file(served, SOUND)
    other = concept_to_bytes(make_concept(value=-1.0))
    assert await code_of(import_file(served, other)) == StatusCode.ALREADY_EXISTS
    replaced = await import_file(served, other, overwrite=True)
    assert replaced.changed
    assert replaced.concept.concept_id == make_concept(value=-1.0).concept_id
    again = await import_file(served, other, overwrite=True)
    assert (again.changed, again.concept) == (False, replaced.concept)


async def test_a_concept_asked_for_by_its_id_has_that_id(
    served: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process replaces the concept after its row was found and before it is read."""
    assert served.store.folder
    other = ConceptStore(served.store.folder)
    first, second = make_concept(value=1.0), make_concept(value=2.0)
    read = ConceptStore._read

    def overtaken(self: ConceptStore, stored: StoredConcept) -> Concept:
        other.import_concept(second, overwrite=True)
        return read(self, stored)

    monkeypatch.setattr(ConceptStore, "_read", overtaken)
    served.store.import_concept(first)
    by_id = concepts_pb2.GetConceptRequest(concept_id=first.concept_id)
    assert (await served.concepts.GetConcept(by_id)).concept.concept_id == first.concept_id
    assert other.get("<cat-toy>").concept_id == second.concept_id
    export = concepts_pb2.ExportConceptRequest(concept_id=first.concept_id)
    content = (await served.concepts.ExportConcept(export)).content
    assert concept_from_bytes(content, source="export").concept_id == first.concept_id
    other.close()


async def test_versions_and_aliases_are_referred_to_like_names(served: Harness) -> None:
    for value in (1.0, 2.0):
        served.store.import_concept(make_concept(value=value), overwrite=True)
    served.store.set_alias("<cat-toy>", "stable", version=1)
    first = make_concept(value=1.0).concept_id
    for reference in ("<cat-toy>@1", "<cat-toy>@stable", f"<cat-toy>@sha256:{first}"):
        request = concepts_pb2.GetConceptRequest(placeholder_token=reference)
        assert (await served.concepts.GetConcept(request)).concept.concept_id == first
        pinned = generation_pb2.ConceptReference(placeholder_token=reference)
        responses = await served.generate(prompt="a <cat-toy>", concepts=[pinned])
        assert responses[-1].summary.matched_concepts[0].concept_id == first
    latest = await served.generate(prompt="a <cat-toy>")
    assert latest[-1].summary.matched_concepts[0].concept_id == make_concept(value=2.0).concept_id


async def test_listing_walks_through_all_pages(served: Harness) -> None:
    tokens = sorted(f"<c{index}>" for index in range(23))
    for token in tokens:
        served.store.import_concept(make_concept(token, metadata={"long": "text"}))
    found: list[str] = []
    request = concepts_pb2.ListConceptsRequest(page_size=10)
    sizes: list[int] = []
    while True:
        page = await served.concepts.ListConcepts(request)
        sizes.append(len(page.concepts))
        found += [concept.placeholder_token for concept in page.concepts]
        assert not any(concept.metadata for concept in page.concepts)
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert (sizes, found) == ([10, 10, 3], tokens)


async def test_a_last_page_that_is_full_has_no_next_one(served: Harness) -> None:
    for token in ("<a>", "<b>"):
        served.store.import_concept(make_concept(token))
    page = await served.concepts.ListConcepts(concepts_pb2.ListConceptsRequest(page_size=2))
    assert (len(page.concepts), page.next_page_token) == (2, "")


@pytest.mark.parametrize(
    "request_",
    [
        concepts_pb2.ListConceptsRequest(page_size=-1),
        concepts_pb2.ListConceptsRequest(page_size=1001),
        concepts_pb2.ListConceptsRequest(page_token="not one of ours!"),
        concepts_pb2.ListConceptsRequest(page_token="//////8="),
    ],
)
async def test_bad_pages_are_invalid(
    served: Harness, request_: concepts_pb2.ListConceptsRequest
) -> None:
    assert await code_of(served.concepts.ListConcepts(request_)) == StatusCode.INVALID_ARGUMENT


async def test_a_request_for_no_concept_is_invalid(served: Harness) -> None:
    served.store.import_concept(make_concept())
    unknown_format = concepts_pb2.ExportConceptRequest(placeholder_token="<cat-toy>", format=9)  # pyright: ignore[reportArgumentType]
    for call in (
        served.concepts.GetConcept(concepts_pb2.GetConceptRequest()),
        served.concepts.ExportConcept(unknown_format),
    ):
        assert await code_of(call) == StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "token", ["../../etc/passwd", "..\\x", "/abs", "<%2e%2e>", "<con>", "<\u00e9>", "__metadata__"]
)
async def test_hostile_names_are_kept_as_names_or_refused(served: Harness, token: str) -> None:
    request = concepts_pb2.ImportConceptRequest(content=SOUND, placeholder_token=token)
    try:
        await served.concepts.ImportConcept(request)
    except grpc.aio.AioRpcError as error:
        assert error.code() == StatusCode.INVALID_ARGUMENT
        return
    for file_format in (concepts_pb2.CONCEPT_FORMAT_ONEWORD, concepts_pb2.CONCEPT_FORMAT_DIFFUSERS):
        export = concepts_pb2.ExportConceptRequest(placeholder_token=token, format=file_format)
        content = (await served.concepts.ExportConcept(export)).content
        assert concept_from_bytes(content, source="export").placeholder_token == token


async def test_a_damaged_stored_concept_is_data_loss(served: Harness) -> None:
    await import_file(served, SOUND)
    assert served.store.folder
    (path,) = (served.store.folder / "files").iterdir()
    path.write_bytes(b"gone")
    error = await served.refusal(prompt="<cat-toy>")
    assert error.code() == StatusCode.DATA_LOSS
    assert str(path.parent) not in (error.details() or "")
